"""Explanations of API workers: the one that is asked asks its siblings for what it does not know.

A request is explained by the process that served it, and a connection reaches a process by chance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Says that the asker wants only what this worker knows.
_OWN = b"x-penstock-own-requests"
_PATIENCE_S = 2.0


class SharedExplain:
    """ASGI middleware around a worker's application."""

    def __init__(self, app: ASGIApp, sockets: Path, own: Path) -> None:
        """Siblings listen on the sockets in `sockets`; `own` is ours among them."""
        self._app = app
        self._sockets = sockets
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        if not _explains(scope) or _OWN in headers:
            await self._app(scope, receive, send)
            return
        kept: list[Message] = []

        async def keep(message: Message) -> None:
            kept.append(message)

        await self._app(scope, receive, keep)
        # 404 comes after the key has been checked; siblings are shown the same key.
        body = await self._siblings(scope, headers) if kept[0]["status"] == 404 else None
        if body is not None:
            kind = (b"content-type", b"application/json")
            size = (b"content-length", str(len(body)).encode())
            kept = [
                {"type": "http.response.start", "status": 200, "headers": [kind, size]},
                {"type": "http.response.body", "body": body},
            ]
        for message in kept:
            await send(message)

    async def _siblings(self, scope: Scope, headers: dict[bytes, bytes]) -> bytes | None:
        others = [path for path in sorted(self._sockets.glob("api-*.sock")) if path != self._own]
        given = {_OWN: b"1"}
        if b"authorization" in headers:
            given[b"authorization"] = headers[b"authorization"]
        found: Sequence[bytes | None] = await asyncio.gather(
            *(self._ask(path, scope, given) for path in others)
        )
        return next((body for body in found if body is not None), None)

    @staticmethod
    async def _ask(socket: Path, scope: Scope, headers: dict[bytes, bytes]) -> bytes | None:
        raw: Any = scope.get("raw_path") or scope["path"].encode()
        url = httpx.URL("http://localhost").copy_with(raw_path=raw)
        way = httpx.AsyncHTTPTransport(uds=str(socket))
        try:
            async with httpx.AsyncClient(transport=way, timeout=_PATIENCE_S) as client:
                answer = await client.get(url, headers=list(headers.items()))
        except httpx.HTTPError:
            return None  # it is starting or ending: what it knew is not to be had
        return answer.content if answer.status_code == 200 else None


def _explains(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "GET"
        and scope["path"].startswith("/admin/requests/")
    )
