"""A client's connection: uvicorn's, with the bounds that uvicorn leaves to a proxy in front of it.

A head, or what surrounds a body, that never ends · a request that never arrives · an upload that
goes on after its answer · pipelined requests whose client has gone. Each would hold memory, a file
or the engine for as long as somebody likes.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class Connection(HttpToolsProtocol):
    #: Bytes that may come in a row without completing a head or adding to a body.
    max_head_bytes = 64 * 1024
    #: From the connection, or the end of the last request, until a head is complete; and the
    #: longest pause within a body. nginx has the same.
    receive_timeout_s = 60.0
    #: A client that is still sending when it has been answered gets this long to notice.
    linger_s = 3.0

    _head_bytes = 0
    _between_requests = True  # or within a head
    _deadline: asyncio.TimerHandle | None = None

    # A stream's transport; asyncio's stubs have one signature for datagrams, too.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unanswered: list[RequestResponseCycle] = []
        self._close_in(self.receive_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_deadline()
        # uvicorn tells the last one only; the one that is being answered stands before it.
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > self.max_head_bytes and not self.transport.is_closing():
            if not self._unanswered:
                self.transport.write(_TOO_LARGE)
            self.transport.close()
        elif self._between_requests and self._deadline is None and not self._unanswered:
            self._close_in(self.receive_timeout_s)

    # --- the parser's callbacks ----------------------------------------------------------------

    def on_headers_complete(self) -> None:
        self._head_bytes, self._between_requests = 0, False
        self._close_in(self.receive_timeout_s)
        super().on_headers_complete()
        self._unanswered.append(self.cycle)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._between_requests:  # else a trailer, which nobody here looks at
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        if not self.cycle.response_complete:
            self._close_in(self.receive_timeout_s)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes, self._between_requests = 0, True
        self._no_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._unanswered = [c for c in self._unanswered if not c.response_complete]
        super().on_response_complete()
        if not self._between_requests and not self._unanswered:
            self._close_in(self.linger_s)

    # --- one timer -----------------------------------------------------------------------------

    def _close_in(self, seconds: float) -> None:
        self._no_deadline()
        self._deadline = self.loop.call_later(seconds, self.transport.close)

    def _no_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
