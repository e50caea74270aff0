"""What every HTTP request meets before a route does: its key, its id, its line in the log."""

from __future__ import annotations

import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.protocol.errors import AuthenticationFailed
from penstock.service.api.auth import AdminDoor, Keys, is_admin
from penstock.service.api.body import header
from penstock.service.api.errors import error_response

log = logging.getLogger("penstock.requests")

#: Asked every few seconds by probes and scrapers: not worth a line each.
_QUIET = ("/health", "/metrics")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Edge:
    """Plain ASGI. X-Request-Id goes back as it came, if it is printable; ids of ours are unique
    beside it. With `log_requests`, each answer is logged once it is complete: method, path, status,
    time, and that id; never a header or a body.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, admin: AdminDoor, log_requests: bool = False
    ) -> None:
        self._app = app
        self._keys = keys
        self._admin = admin
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = header(scope, b"x-request-id")
        if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
            request_id = None
        logs = self._log_requests and not scope["path"].startswith(_QUIET)
        if request_id is not None or logs:
            send = answer = _Answer(send, request_id)
        try:
            await self._dispatch(scope, receive, send)
        finally:
            if logs:
                answer.log(scope)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if is_admin(scope["path"]):
                self._admin.check(scope)
            else:
                self._keys.check(scope["path"], header(scope, b"authorization"))
        except AuthenticationFailed as exc:
            await error_response(exc)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _Answer:
    """Stands in for `send`: adds the request's id, and remembers the status."""

    def __init__(self, send: Send, request_id: bytes | None) -> None:
        self._send = send
        self._request_id = request_id
        self._status: int | None = None
        self._started_s = time.perf_counter()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if self._request_id is not None:
                added = (b"x-request-id", self._request_id)
                message = {**message, "headers": [*message["headers"], added]}
        await self._send(message)

    def log(self, scope: Scope) -> None:
        log.info(
            "%s %s %s %.3f s%s",
            scope["method"],
            # The path is the client's: no line of it may look like one of ours.
            scope["path"].encode("unicode_escape").decode()[:200],
            self._status if self._status is not None else "-",
            time.perf_counter() - self._started_s,
            f" [{self._request_id.decode()}]" if self._request_id is not None else "",
        )
