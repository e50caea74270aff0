"""One ASGI request by hand: the test decides what the client sends, and when it reads or leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message


class AsgiCall:
    """Starts at once. `sent` is what the application has sent and the client has read."""

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        body: object = None,
        *,
        chunks: list[bytes] | None = None,
        headers: dict[str, str] | None = None,
        client: str = "127.0.0.1",
    ) -> None:
        if chunks is None:
            chunks = [body if isinstance(body, bytes) else json.dumps(body).encode()]
        self.sent: list[Message] = []
        self.num_received = 0
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        for i, chunk in enumerate(chunks):
            more = i + 1 < len(chunks)
            self._incoming.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        #: Clear it, and the client has stopped reading.
        self.reads = asyncio.Event()
        self.reads.set()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
            "scheme": "http", "server": ("test", 80), "client": (client, 1), "state": {},
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        }  # fmt: skip
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        message = await self._incoming.get()
        self.num_received += 1
        return message

    async def _send(self, message: Message) -> None:
        await self.reads.wait()
        self.sent.append(message)

    def disconnect(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def finished(self) -> AsgiCall:
        await asyncio.wait_for(self.task, 10)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        return [e.removeprefix("data: ") for e in self.body.decode().split("\n\n") if e]
