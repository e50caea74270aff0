"""A server that speaks OpenAI's API and does as a test says: answers, dies, hangs, lies.

async with MockEngine() as engine:
    engine.behave = dies_after(2)
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Behaviour = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request as the engine sees it."""

    engine: MockEngine
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, document: Any, status: int = 200, **headers: str) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        head = [f"HTTP/1.1 {status} Whatever", f"content-length: {len(body)}"]
        head += ["content-type: application/json"]
        head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join([*head, "", ""]).encode() + body)

    async def begin_stream(self) -> None:
        await self.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def event(self, number: int) -> None:
        await self.chunk(self.event_bytes(number))

    def event_bytes(self, number: int) -> bytes:
        text = f"{self.engine.name}:{number}"
        delta = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": text}}]}
        return b"data: " + json.dumps(delta).encode() + b"\n\n"

    def die(self) -> None:
        """A reset, as of a process that was killed."""
        self.writer.transport.abort()


async def answers(exchange: Exchange) -> None:
    """As it should be."""
    body = exchange.json if exchange.body else {}
    if not body.get("stream"):
        message = {"role": "assistant", "content": exchange.engine.name}
        usage = {"prompt_tokens": 40, "completion_tokens": 2}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        await exchange.answer({"id": "chatcmpl-1", "choices": choices, "usage": usage})
        return
    await exchange.begin_stream()
    for number in range(body.get("max_tokens", 4)):
        await exchange.event(number)
    await exchange.chunk(b"data: [DONE]\n\n")
    await exchange.send(b"0\r\n\r\n")


def dies_after(num_events: int, partial: bool = False) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.begin_stream()
        for number in range(num_events):
            await exchange.event(number)
        if partial:
            await exchange.chunk(exchange.event_bytes(num_events)[:20])
        await asyncio.sleep(0.05)  # so that what was written is not lost in the reset
        exchange.die()

    return behave


def refuses(status: int, **headers: str) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        error = {"error": {"message": f"{exchange.engine.name} says {status}", "code": "x"}}
        await exchange.answer(error, status, **headers)

    return behave


def says(data: bytes) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.send(data)
        await asyncio.sleep(0.02)
        exchange.die()

    return behave


async def hangs(exchange: Exchange) -> None:
    await asyncio.Event().wait()


async def dies(exchange: Exchange) -> None:
    exchange.die()


class MockEngine:
    def __init__(
        self,
        name: str = "a",
        models: tuple[str, ...] = ("m",),
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.name = name
        self.models = models
        self.port = port
        self.tls = tls
        self.behave: Behaviour = answers
        self.healthy = True
        self.metrics = b""
        #: All but the watch's own questions.
        self.exchanges: list[Exchange] = []
        #: Requests whose client left before their end.
        self.num_left = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> MockEngine:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, limit=1 << 26, backlog=2048, ssl=self.tls
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Its process is gone, and its connections with it."""
        self._server.close()
        while self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(list(self._tasks), timeout=0.5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while not writer.is_closing():
                await self._answer_one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, v in (x.split(": ", 1) for x in head[1:] if ": " in x)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        exchange = Exchange(self, method, path, headers, body, writer)
        if method == "GET" and path in ("/health", "/v1/models", "/metrics"):
            await self._about_itself(exchange)
            return
        self.exchanges.append(exchange)
        work = asyncio.ensure_future(self.behave(exchange))
        leaves = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({work, leaves}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self.num_left += 1
            work.cancel()
        if leaves.done():
            writer.transport.abort()
        leaves.cancel()
        await asyncio.wait({work, leaves})  # raises nothing of theirs, and our own cancel goes on
        for task in (work, leaves):
            if not task.cancelled() and isinstance(task.exception(), Exception):
                writer.transport.abort()

    async def _about_itself(self, exchange: Exchange) -> None:
        if exchange.path == "/health":
            if not self.healthy:
                await hangs(exchange)
            await exchange.answer({})
        elif exchange.path == "/v1/models":
            cards = [{"id": m, "object": "model", "owned_by": self.name} for m in self.models]
            await exchange.answer({"object": "list", "data": cards})
        else:
            await exchange.answer(self.metrics)
