"""The bounds of `service.connection`, made short: a bare application behind a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from penstock.service.connection import Connection
from tests.helpers import raw_http


class Hasty(Connection):
    receive_timeout_s = 0.3
    linger_s = 0.3


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body, except where the path says not to, and answers after what it asks for."""
    if scope["path"] != "/unread":
        while (await receive()).get("more_body"):
            pass
    if scope["path"] == "/slow":
        await asyncio.sleep(1.0)
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"2")]})  # fmt: skip
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application, http=Hasty, lifespan="off", log_level="critical")
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def is_closed(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), 10.0) == b""
    return True


async def test_a_request_that_never_arrives() -> None:
    async with serving() as port:
        for start in (b"", b"\r\n", b"GET /", b"GET / HTTP/1.1\r\nHost", b"POST / HTTP/1.1\r\n"
                      b"Content-Length: 9\r\n\r\nabc"):  # fmt: skip
            async with raw_http.connection(port) as (reader, writer):
                writer.write(start)
                assert await is_closed(reader), start


async def test_a_head_in_small_pieces_has_one_deadline_and_a_body_one_for_each() -> None:
    async with serving() as port:
        async with raw_http.connection(port) as (reader, writer):
            writer.write(b"GET /")
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(0.05)
                    if reader.at_eof():
                        break
            assert reader.at_eof() or writer.is_closing()
        async with raw_http.connection(port) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nContent-Length: 12\r\n\r\n")
            for _ in range(12):
                await asyncio.sleep(0.05)
                writer.write(b"x")
            assert (await raw_http.read_answer(reader)).body == b"ok"


async def test_a_long_answer_and_a_second_request_are_nobodys_fault() -> None:
    async with serving() as port, raw_http.connection(port) as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /slow HTTP/1.1\r\n\r\n")
            assert (await raw_http.read_answer(reader)).body == b"ok"
        writer.write(b"GET / HTTP/1.1\r\n")
        assert await is_closed(reader)


async def test_an_upload_nobody_reads() -> None:
    async with serving() as port:
        async with raw_http.connection(port) as (reader, writer):
            writer.write(b"POST /unread HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000)
            assert (await raw_http.read_answer(reader)).body == b"ok"
            for _ in range(100):
                with contextlib.suppress(ConnectionError):
                    writer.write(b"x")
                    await writer.drain()
                if reader.at_eof() or writer.is_closing():
                    break
                await asyncio.sleep(0.05)
            assert reader.at_eof() or writer.is_closing()
        # One that ends in time keeps its connection.
        async with raw_http.connection(port) as (reader, writer):
            writer.write(b"POST /unread HTTP/1.1\r\nContent-Length: 10\r\n\r\n")
            assert (await raw_http.read_answer(reader)).body == b"ok"
            writer.write(b"0123456789" + b"GET / HTTP/1.1\r\n\r\n")
            assert (await raw_http.read_answer(reader)).body == b"ok"
