"""HTTP over bare sockets: cheap enough for thousands of requests, rude enough for attacks.

answer = await request(server.port, "/v1/completions", {"prompt": "a", ...})
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    head: bytes
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream: its JSON events; [DONE], which must be the last, is left out."""
        lines = [x[6:] for x in self.body.split(b"\n\n") if x.startswith(b"data: ")]
        assert lines and lines[-1] == b"[DONE]", self.body[-300:]
        return [json.loads(line) for line in lines[:-1]]


def encoded(path: str, data: Any = None, *, close: bool = True, **headers: str) -> bytes:
    """A request as bytes: POST with JSON, or GET where there is no `data`."""
    body = b"" if data is None else json.dumps(data).encode()
    head = [f"{'GET' if data is None else 'POST'} {path} HTTP/1.1", "Host: test"]
    head += [f"Content-Length: {len(body)}"] if data is not None else []
    head += ["Connection: close"] if close else []
    head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*head, "", ""]).encode() + body


@contextlib.asynccontextmanager
async def connection(
    port: int,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Gone at the end of the block, whatever was still on its way."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        yield reader, writer
    finally:
        # Anything unread makes this a reset, as of a client that died.
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next answer on a connection, chunked or with a length."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if fields.get(b"transfer-encoding") == b"chunked":
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    else:
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
    return Answer(status, head, body)


async def request(port: int, path: str, data: Any = None, **headers: str) -> Answer:
    async with connection(port) as (reader, writer):
        writer.write(encoded(path, data, **headers))
        return await read_answer(reader)
