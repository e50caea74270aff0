"""One try of one request on one engine: its answer on the way through, and what it tells of both.

Until the first byte has gone to the client the answer is held, so that another engine can be tried;
after it, bytes go on as they come. Of a stream of events only whole ones go on: should the engine
die within one, the error event that follows must not be a part of it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from penstock.service.foreign.engine import Engine
from penstock.service.foreign.headers import Headers, end_to_end
from penstock.service.foreign.upstream import Upstream, UpstreamError

if TYPE_CHECKING:
    from penstock.service.foreign.exchange import Exchange

#: Another engine may have more luck with a request that was answered so.
RETRIED = frozenset((429, 500, 502, 503, 504))

_LAST_CHUNK = b"0\r\n\r\n"
_DONE = b"data: [DONE]"


#: What is no such count is no usage: an engine's slip must not end up in sums for good.
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    """Of chat and text completions, and of responses."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Counted(msgspec.Struct):
    usage: _Usage | None = None
    id: Any = None


_counted = msgspec.json.Decoder(_Counted)


class Attempt:
    """The `Sink` of one connection. `done` is set once: None when the answer is whole."""

    def __init__(self, exchange: Exchange, engine: Engine, now_s: float) -> None:
        self.exchange = exchange
        self.engine = engine
        #: While it waits for the answer here; afterwards it may be another request's.
        self.connection: Upstream | None = None
        self.sent = False
        self.done: asyncio.Future[UpstreamError | None] = exchange.loop.create_future()
        self.begun_s = now_s
        #: Of the last byte, or of the request.
        self.news_s = now_s
        self.status = 0
        self.headers: Headers = []
        self.held: list[bytes] = []
        self.held_bytes = 0
        #: The client has had a byte of it.
        self.committed = False
        self.streams = False
        self.num_events = 0
        self.usage = _Usage()
        self.response_id: str | None = None
        self._chunked = False
        self._last_event = b""
        self._done_seen = False

    def abandon(self, error: UpstreamError) -> None:
        """Give the engine up for this request; it sees its client leave."""
        if self.connection is not None:
            self.connection.abandon()
        self.on_failure(error)

    # --- Sink ----------------------------------------------------------------------------------

    def on_head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers
        self.streams = status == 200 and any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in headers
        )

    def on_body(self, data: bytes) -> None:
        self.news_s = self.engine.spoke_s = self.exchange.clock()
        if self.streams:
            self._events(data)
        elif self.committed:
            self._send(data)
        else:
            self.held.append(data)
            self.held_bytes += len(data)
            if self.held_bytes > self.exchange.config.hold_bytes:
                self.commit()

    def on_end(self) -> None:
        if self._cut_off():
            self.on_failure(UpstreamError("closed the connection"))
            return
        if self.streams:
            self._read_usage(self._last_event.partition(b"data: ")[2])
            if self.held:  # an event without its end is the engine's affair
                self.commit()
        elif not self.committed:
            self._read_usage(b"".join(self.held))
        if self.committed:
            self.end()
        self._set_done(None)

    def on_failure(self, error: UpstreamError) -> None:
        self._set_done(error)

    # --- to the client -------------------------------------------------------------------------

    def commit(self) -> None:
        """Send the head and what has been held: from here on this is the answer."""
        body = b"".join(self.held)
        self.held, self.held_bytes = [], 0
        if self.committed:
            self._send(body)
            return
        self.committed = self.exchange.begun = True
        self.exchange.client.write(self._head() + self._framed(body))

    def send_whole(self) -> None:
        """The answer is complete, and held."""
        assert not self.committed and self.done.done()
        body = b"".join(self.held)
        self.held = []
        self.committed = self.exchange.begun = True
        request = self.exchange.request
        bodiless = self.status in (204, 304) or request.method == "HEAD"
        length = None if bodiless else len(body)
        self.exchange.client.write(self._head(length) + (b"" if bodiless else body))
        self.exchange.client.finish()

    def end(self) -> None:
        if self._chunked:
            self.exchange.client.write(_LAST_CHUNK)
        self.exchange.client.finish(keep=self._framing_ends())

    def end_with(self, event: bytes) -> None:
        """After a failure in a stream: this event, and the end."""
        self.held = []
        self.exchange.client.write(self._framed(event))
        self.end()

    # --- inside --------------------------------------------------------------------------------

    def _events(self, data: bytes) -> None:
        """Whole events go on at once; the rest waits for its end, within the cap."""
        if self.held:
            data = b"".join((*self.held, data))
            self.held = []
        if not data.endswith((b"\n\n", b"\r\n\r\n")):
            end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
            if end < 4:  # neither was found: -1 + 2, -1 + 4
                end = 0 if len(data) <= self.exchange.config.hold_bytes else len(data)
            if end < len(data):
                self.held.append(data[end:])
                data = data[:end]
                if not data:
                    return
        found = data.count(b"\n\n") or data.count(b"\r\n\r\n")
        start = data.rfind(b"data: {")
        if start >= 0:
            self._last_event = data[start:]
        self.num_events += found
        done = _DONE in data
        self._done_seen = self._done_seen or done
        self.exchange.on_events(self, found - done)
        if self.committed:
            self._send(data)
        else:
            tail, self.held = self.held, [data]
            self.commit()
            self.held = tail

    def _send(self, data: bytes) -> None:
        self.exchange.client.write(self._framed(data))

    def _framed(self, data: bytes) -> bytes:
        if self._chunked and data:
            return b"%x\r\n%b\r\n" % (len(data), data)
        return data

    def _head(self, length: int | None = None) -> bytes:
        """`length` of a body that is known whole; else as the engine framed it, or in chunks."""
        exchange = self.exchange
        headers = end_to_end(self.headers)
        if length is not None:
            headers = [h for h in headers if h[0] != b"content-length"]
            headers.append((b"content-length", b"%d" % length))
        elif not self._has_length(headers) and exchange.request.method != "HEAD":
            self._chunked = not exchange.request.http_1_0
            if self._chunked:
                headers.append((b"transfer-encoding", b"chunked"))
        if all(name != b"x-request-id" for name, _ in headers):
            headers.append((b"x-request-id", exchange.request.id.encode()))
        keep = length is not None or self._framing_ends()
        return exchange.client.head(self.status, headers, keep)

    def _cut_off(self) -> bool:
        """A stream of completions whose end is that of its connection, without [DONE]: so it looks
        when an engine that sends no chunks is killed."""
        framing = (b"content-length", b"transfer-encoding")
        return (
            self.streams
            and not self._done_seen
            and self.exchange.request.path.endswith("/completions")
            and all(name not in framing for name, _ in self.headers)
        )

    def _framing_ends(self) -> bool:
        """The client can tell where the body ends without a closed connection."""
        return self._chunked or self._has_length(self.headers) or self.status in (204, 304)

    @staticmethod
    def _has_length(headers: Headers) -> bool:
        return any(name == b"content-length" for name, _ in headers)

    def _read_usage(self, document: bytes) -> None:
        """What the engine counted, where it says so."""
        if b'"usage"' not in document and b'"resp_' not in document[:4096]:
            return
        try:
            found = _counted.decode(document.partition(b"\n")[0] if self.streams else document)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        self.usage = found.usage or self.usage
        if isinstance(found.id, str) and found.id.startswith("resp_"):
            self.response_id = found.id[:256]

    @property
    def prompt_tokens(self) -> int | None:
        u = self.usage
        return u.prompt_tokens if u.prompt_tokens is not None else u.input_tokens

    @property
    def completion_tokens(self) -> int | None:
        u = self.usage
        return u.completion_tokens if u.completion_tokens is not None else u.output_tokens

    @property
    def cached_tokens(self) -> int | None:
        details = self.usage.prompt_tokens_details or self.usage.input_tokens_details
        return None if details is None else details.cached_tokens

    def _set_done(self, error: UpstreamError | None) -> None:
        self.connection = None
        if not self.done.done():
            self.done.set_result(error)
