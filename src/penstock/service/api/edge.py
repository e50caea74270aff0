"""What happens to every HTTP request before a route sees it: the key, and the request's id."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.protocol.errors import AuthenticationFailed
from penstock.service.api.auth import Keys
from penstock.service.api.body import header
from penstock.service.api.errors import error_response

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Edge:
    """Plain ASGI. X-Request-Id goes back as it came, if it is printable; ids of ours are unique
    beside it."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = header(scope, b"x-request-id")
        if request_id is not None and _REQUEST_ID.fullmatch(request_id):
            send = _with_header(send, (b"x-request-id", request_id))
        try:
            self._keys.check(scope["path"], header(scope, b"authorization"))
        except AuthenticationFailed as exc:
            await error_response(exc)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _with_header(send: Send, added: tuple[bytes, bytes]) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], added]}
        await send(message)

    return sender
