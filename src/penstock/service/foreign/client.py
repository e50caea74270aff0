"""A client's connection to the router: HTTP/1.1 by httptools, without a framework in between.

The bounds are those of `service/connection.py`: a head, or an upload, that never ends, a client
that reads nothing or sends requests ahead without end. Requests of one connection are answered in
their order, one at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

import httptools

from penstock.protocol.errors import InvalidRequest, PayloadTooLarge, PenstockError
from penstock.service.foreign.config import RouterConfig
from penstock.service.foreign.headers import Headers
from penstock.service.foreign.target import origin_form

#: Bytes that may come in a row without completing a head or adding to a body.
MAX_HEAD_BYTES = 64 * 1024
#: From the connection, or the end of the last request, until a head is complete; and the longest
#: pause within a body.
RECEIVE_TIMEOUT_S = 60.0
#: A client that is still sending when it has been answered gets this long to notice.
LINGER_S = 3.0

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


@dataclass(slots=True)
class Request:
    """One request, whole. Header names are in lower case."""

    method: str
    #: Path and query as engines get them, and the path unescaped (`origin_form`).
    target: bytes
    path: str
    headers: Headers
    keep_alive: bool
    http_1_0: bool
    body: bytes = b""
    #: Why it is answered without being looked at.
    refusal: PenstockError | None = None
    #: An id for logs and explanations: the client's, or one of ours.
    id: str = ""
    parts: list[bytes] = field(default_factory=list)
    size_bytes: int = 0
    _by_name: dict[bytes, bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = dict(self.headers)

    def header(self, name: bytes) -> bytes | None:
        return self._by_name.get(name)


class Answering(Protocol):
    """What answers a request, as its connection sees it."""

    def gone(self) -> None:
        """The client has left; nothing can be sent to it any more."""

    def pause(self) -> None:
        """It takes no more at the moment."""

    def resume(self) -> None: ...


Handler = Callable[["Client", Request], Answering]


class Client(asyncio.Protocol):
    def __init__(self, handler: Handler, config: RouterConfig, clients: set[Client]) -> None:
        self._handler = handler
        self._config = config
        self._clients = clients
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None
        self._waiting: deque[Request] = deque()
        self._answering: Answering | None = None
        self._answered: Request | None = None
        self._head_bytes = 0
        self._in_head = True
        self._target = b""
        self._headers: Headers = []
        self._fields_bytes = 0
        self._paused = False
        self._closing = False
        #: When the router drops it, by the loop's clock; None while an answer is made.
        self.deadline_s: float | None = None
        self.transport: asyncio.Transport | None = None
        self.draining = False
        #: Its address; "unknown" on a Unix socket.
        self.peer = "unknown"

    # --- the answer ----------------------------------------------------------------------------

    def head(self, status: int, headers: Headers, keep: bool = True) -> bytes:
        """The head of an answer to the present request; `headers` say how the body is framed.
        Without `keep` its end can only be told by closing."""
        assert self._answered is not None
        lines = [b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"Unknown"))]
        lines += [name + b": " + value for name, value in headers]
        if not (keep and self._keeps()):
            lines.append(b"connection: close")
        elif self._answered.http_1_0:
            lines.append(b"connection: keep-alive")
        lines += [b"", b""]
        return b"\r\n".join(lines)

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def finish(self, keep: bool = True) -> None:
        """The answer is complete. Without `keep` its end can only be told by closing."""
        keep = keep and self._keeps()
        self._answering = None
        self._answered = None
        if self.transport is None:
            return
        if not keep:
            self._close()
        elif self._waiting:
            self._start(self._waiting.popleft())
        else:
            self.transport.resume_reading()
            self._wait(RECEIVE_TIMEOUT_S)

    def answers(self, request: Request) -> bool:
        """It is this one's turn, and the answer is not complete."""
        return self._answered is request

    def abort(self) -> None:
        """The client must see that the answer is not whole."""
        self._answering = None
        if self.transport is not None:
            self.transport.abort()

    def expire(self) -> None:
        """Its deadline has passed."""
        if self._answering is not None:
            self._lost()
        if self.transport is not None:
            self.transport.abort()

    def close_if_idle(self) -> None:
        """The router takes nothing new: whoever has nothing running goes."""
        self.draining = True
        if self._answering is None and self._request is None and self.transport is not None:
            self.transport.close()

    # --- asyncio -------------------------------------------------------------------------------

    # A stream's transport; asyncio's stubs have one signature for datagrams, too.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) and peer else "unknown"
        transport.set_write_buffer_limits(self._config.client_buffer_bytes)
        self._clients.add(self)
        self._wait(RECEIVE_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clients.discard(self)
        self.transport = None
        self.deadline_s = None
        self._waiting.clear()
        self._request = None
        if self._answering is not None:
            self._lost()

    def pause_writing(self) -> None:
        self._paused = True
        self._wait(self._config.client_stall_s)
        if self._answering is not None:
            self._answering.pause()

    def resume_writing(self) -> None:
        self._paused = False
        if self._answering is not None:
            self.deadline_s = None
            self._answering.resume()
        elif not self._closing:
            self._wait(RECEIVE_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError) as exc:
            self._bad(f"this is no request of HTTP/1.1 that is understood here: {exc}")
            return
        if self._head_bytes > MAX_HEAD_BYTES:
            self._bad("the request's head is too large", b"431")

    # --- httptools -----------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._in_head = True
        self._target, self._headers, self._fields_bytes = b"", [], 0

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            self._fields_bytes += len(name) + len(value)
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        parser = self._parser
        refusal: PenstockError | None = None
        try:
            target, path = origin_form(self._target)
        except InvalidRequest as exc:
            target, path, refusal = b"/", "/", exc
        self._request = request = Request(
            method=parser.get_method().decode(),
            target=target,
            path=path,
            headers=self._headers,
            keep_alive=parser.should_keep_alive(),
            http_1_0=parser.get_http_version() == "1.0",
            refusal=refusal,
        )
        if parser.should_upgrade():
            request.refusal = InvalidRequest("upgrades are not supported")
            request.keep_alive = False
        if self._fields_bytes + len(self._target) > MAX_HEAD_BYTES:
            request.refusal = InvalidRequest("the request's head is too large")
            request.keep_alive = False
        length = request.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > self._config.max_body_bytes:
            self._too_large(request)
        elif request.header(b"expect") is not None and not self._answering:
            self.write(_CONTINUE)
        if self._answering is None:
            self._wait(RECEIVE_TIMEOUT_S)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        request = self._request
        if request is None or request.refusal is not None:
            return
        request.parts.append(body)
        request.size_bytes += len(body)
        if request.size_bytes > self._config.max_body_bytes:
            self._too_large(request)
        elif self._answering is None:
            self._wait(RECEIVE_TIMEOUT_S)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        request, self._request = self._request, None
        if request is None:
            return  # answered already
        request.body = b"".join(request.parts)
        request.parts = []
        if self._answering is None and self._answered is None:
            self._start(request)
        else:
            # One that waits is enough; until it is its turn nothing more is read, and a client
            # that leaves is noticed when it is written to.
            self._waiting.append(request)
            if self.transport is not None:
                self.transport.pause_reading()

    # --- inside --------------------------------------------------------------------------------

    def _start(self, request: Request) -> None:
        self.deadline_s = None
        self._answered = request
        answering = self._handler(self, request)
        if self._answered is request:  # else it has been answered within the call
            self._answering = answering
            if self._paused:
                answering.pause()

    def _too_large(self, request: Request) -> None:
        """Answered at once; what is still coming gets a moment, so that the answer is seen."""
        limit = self._config.max_body_bytes
        request.refusal = PayloadTooLarge(f"the body is larger than the limit of {limit} bytes")
        request.keep_alive = False
        request.parts = []
        if self._answering is None and self._answered is None:
            self._request = None
            self._start(request)

    def _bad(self, why: str, status: bytes = b"400") -> None:
        if self.transport is None or self.transport.is_closing():
            return
        if self._answering is None:
            reason = _REASONS[int(status)]
            body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,' % (
                why.replace("\\", "").replace('"', "'").encode("ascii", "replace")
            )
            body += b'"code":"invalid_request"}}'
            self.transport.write(
                b"HTTP/1.1 %b %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%b" % (status, reason, len(body), body)
            )
            self._close()
        else:
            self._lost()
            self.transport.close()

    def _lost(self) -> None:
        answering, self._answering = self._answering, None
        if answering is not None:
            answering.gone()

    def _keeps(self) -> bool:
        return self._answered is not None and self._answered.keep_alive and not self.draining

    def _close(self) -> None:
        assert self.transport is not None
        self._closing = True
        if self.transport.can_write_eof():
            # What it still sends must not turn into a reset that takes the answer with it.
            self.transport.write_eof()
            self._wait(LINGER_S)
        else:
            self.transport.close()

    def _wait(self, seconds: float) -> None:
        self.deadline_s = asyncio.get_running_loop().time() + seconds
