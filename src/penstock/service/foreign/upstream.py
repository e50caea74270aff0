"""Connections to an engine: HTTP/1.1, kept alive, one request at a time on each."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Protocol
from urllib.parse import urlsplit

import httptools

from penstock.service.foreign.headers import Headers

#: uvicorn closes a connection that was idle for 5 s: ours should have gone before.
_IDLE_S = 4.0
_MAX_IDLE = 512
_MAX_HEAD_BYTES = 256 * 1024


class UpstreamError(Exception):
    """The engine's connection came to nothing: what happened, in words.

    `stale`: on a connection that had been used before, and without a byte of an answer; the engine
    had closed it meanwhile, which says nothing about the engine.
    """

    def __init__(self, what: str, stale: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.stale = stale


class Sink(Protocol):
    """Who wants an answer. Calls come in order, and none after `on_end` or `on_failure`."""

    def on_head(self, status: int, headers: Headers) -> None: ...

    def on_body(self, data: bytes) -> None:
        """All of it that came in one read; never empty."""

    def on_end(self) -> None: ...

    def on_failure(self, error: UpstreamError) -> None: ...


class Upstream(asyncio.Protocol):
    """One connection. Header names arrive in lower case."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._head_only = False
        self._last = False
        self._headers: Headers = []
        self._parts: list[bytes] = []
        self._head_bytes = 0
        self._has_head = False
        self._ended = False
        self._keep = False
        self._answers = 0
        self._transport: asyncio.Transport | None = None
        self.idle_since_s = 0.0

    # --- the router's side ---------------------------------------------------------------------

    def ask(self, request: bytes, sink: Sink, head_only: bool = False, last: bool = False) -> None:
        """`head_only`: of the answer to HEAD, which has no body whatever its headers say. `last`:
        the request says `connection: close`; whatever the engine makes of it, so it is."""
        assert self._sink is None and self._transport is not None
        self._sink = sink
        self._head_only = head_only
        self._last = last
        self._transport.write(request)

    def pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abandon(self) -> None:
        """Nobody wants the answer any more: the engine sees a closed connection, and stops. Only
        whoever waits for the answer may do so: after it, the connection is somebody else's."""
        self._sink = None
        if self._transport is not None:
            self._transport.abort()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # --- asyncio -------------------------------------------------------------------------------

    # A stream's transport; asyncio's stubs have one signature for datagrams, too.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.lost(self)
        if self._sink is None:
            return
        if self._has_head and self._until_close() and exc is None:
            self._finish(keep=False)
            return
        stale = self._answers > 0 and not self._has_head and not self._head_bytes
        what = f"closed the connection ({exc})" if exc else "closed the connection"
        self._fail(UpstreamError(what, stale))

    def data_received(self, data: bytes) -> None:
        if self._sink is None:
            self.abandon()  # it speaks when not spoken to
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(UpstreamError("answered with an upgrade"))
            return
        except httptools.HttpParserError as exc:
            self._fail(UpstreamError(f"answered with something that is not HTTP ({exc})"))
            return
        if not self._has_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._fail(UpstreamError("answered with headers without end"))
            return
        if self._parts and self._sink is not None:
            parts, self._parts = self._parts, []
            self._sink.on_body(parts[0] if len(parts) == 1 else b"".join(parts))
        if self._ended:
            self._finish(keep=self._keep)

    # --- httptools -----------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # else a trailer
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return  # its headers are of no use to anybody; on_message_complete forgets them
        self._has_head = True
        if self._sink is not None:
            self._sink.on_head(status, self._headers)
        if self._head_only:
            self._ended = True

    def on_body(self, body: bytes) -> None:
        if self._ended:
            raise httptools.HttpParserError("a second answer")
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if not self._has_head:
            self._headers = []
            return
        self._ended = True
        self._keep = self._parser.should_keep_alive()  # known here only

    # --- inside --------------------------------------------------------------------------------

    def _until_close(self) -> bool:
        names = {name for name, _ in self._headers}
        return not names & {b"content-length", b"transfer-encoding"}

    def _finish(self, keep: bool) -> None:
        sink, self._sink = self._sink, None
        self._answers += 1
        keep = keep and not self._head_only and not self._last
        self._headers, self._has_head, self._ended, self._head_bytes = [], False, False, 0
        if keep:
            self._pool.give_back(self)
        elif self._transport is not None:
            self._transport.close()
        if sink is not None:
            sink.on_end()

    def _fail(self, error: UpstreamError) -> None:
        sink, self._sink = self._sink, None
        if self._transport is not None:
            self._transport.abort()
        if sink is not None:
            sink.on_failure(error)


class Pool:
    """Connections to one engine: as many as there are requests, and some kept for the next."""

    def __init__(self, url: str, connect_timeout_s: float, ca_certs: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, "checked by RouterConfig"
        self._host = parts.hostname
        https = parts.scheme == "https"
        self._ssl = ssl.create_default_context(cafile=ca_certs) if https else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._timeout_s = connect_timeout_s
        self._idle: deque[Upstream] = deque()
        #: The Host of what goes there.
        self.netloc = parts.netloc.encode()

    def idle(self) -> Upstream | None:
        """One that stands ready: the one used last, which is least likely to be closed."""
        now_s = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and now_s - connection.idle_since_s < _IDLE_S:
                return connection
            connection.abandon()
        return None

    async def connect(self) -> Upstream:
        """A new one. Raises `UpstreamError`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Upstream(self), self._host, self._port, ssl=self._ssl
                )
        except TimeoutError:
            raise UpstreamError(f"did not accept within {self._timeout_s:g} s") from None
        except (OSError, ValueError) as exc:  # ValueError: a name that cannot be one (UnicodeError)
            raise UpstreamError(
                f"cannot be reached ({getattr(exc, 'strerror', None) or exc})"
            ) from exc
        return connection

    def give_back(self, connection: Upstream) -> None:
        connection.idle_since_s = asyncio.get_running_loop().time()
        self._idle.append(connection)
        while len(self._idle) > _MAX_IDLE:
            self._idle.popleft().abandon()

    def tidy(self) -> None:
        """Close what has been idle for too long to be used again."""
        now_s = asyncio.get_running_loop().time()
        while self._idle and now_s - self._idle[0].idle_since_s >= _IDLE_S:
            self._idle.popleft().abandon()

    def lost(self, connection: Upstream) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        while self._idle:
            self._idle.popleft().abandon()
