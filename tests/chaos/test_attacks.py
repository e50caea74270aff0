"""Clients that misbehave, on the HTTP port and on the engine's socket: others must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.helpers import raw_http
from tests.helpers.server import Server, running

MIB = 1 << 20
FLAGS = ("--dtype", "float32", "--served-model-name", "m", "--kv-cache-memory-bytes", "32M",
         "--max-body-bytes", "1M")  # fmt: skip


@pytest.fixture(scope="module")
def server(checkpoint: str) -> Iterator[Server]:
    with running(checkpoint, *FLAGS) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from look_after(request)


def look_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that used the shared server, it works, is idle, and is the same process."""
    if "server" not in request.fixturenames:
        yield
        return
    server: Server = request.getfixturevalue("server")
    engine = server.engine().pid
    yield
    assert server.engine().pid == engine, server.log[-2000:]
    assert asyncio.run(complete(server.port)) == "length"
    settle(server)
    assert "Traceback" not in server.log, server.log[-2000:]


def settle(server: Server) -> None:
    deadline_s = time.monotonic() + 20.0
    names = ("num_requests_running", "num_requests_waiting", "instance_requests_running",
             "instance_requests_waiting", "kv_cache_usage_perc")  # fmt: skip
    while any(server.metric(f"penstock:{name}") for name in names):
        assert time.monotonic() < deadline_s, f"requests are still running\n{server.log[-2000:]}"
        time.sleep(0.1)


def body(**more: Any) -> dict[str, Any]:
    return {
        "model": "m", "prompt": [9, 8, 7, 6], "max_tokens": 8, "temperature": 0, "ignore_eos": True,
    } | more  # fmt: skip


async def complete(port: int, **more: Any) -> str:
    """The finish reason of a short request, or the code of its error."""
    answer = await asyncio.wait_for(raw_http.request(port, "/v1/completions", body(**more)), 30.0)
    found = answer.json
    return str(found["error"]["code"] if "error" in found else found["choices"][0]["finish_reason"])


# --- connections ----------------------------------------------------------------------------------


async def test_thousands_of_idle_connections(server: Server) -> None:
    service = psutil.Process(server.process.pid)
    before_bytes = service.memory_info().rss
    # Our own limit, and theirs, less what both need otherwise.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(10_000, hard - 500)
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sockets.append(socket.create_connection(("127.0.0.1", server.port)))
        assert await complete(server.port) == "length"
        assert service.memory_info().rss - before_bytes < count * 16_384
    finally:
        for each in sockets:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_slow_heads_do_not_hold_up_others(server: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        slow = [
            await stack.enter_async_context(raw_http.connection(server.port)) for _ in range(50)
        ]
        for _, writer in slow:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A")
        for i in range(5):
            for _, writer in slow:
                writer.write(b"bc: %d\r\nX-" % i)
            assert await complete(server.port) == "length"


ENDLESS = {
    "url": (b"GET /", b"a" * 65_536),
    "header": (b"GET /health HTTP/1.1\r\nX-Long: ", b"a" * 65_536),
    "headers": (b"GET /health HTTP/1.1\r\n", b"a: b\r\n" * 11_000),
    "empty lines": (b"", b"\r\n" * 32_768),
    "trailers": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"a: b\r\n" * 11_000,
    ),
    "chunk extension": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;",
        b"a" * 65_536,
    ),
}


@pytest.mark.parametrize("kind", ENDLESS)
async def test_what_surrounds_a_body_is_bounded(server: Server, kind: str) -> None:
    service = psutil.Process(server.process.pid)
    before_bytes = service.memory_info().rss
    start, piece = ENDLESS[kind]
    async with raw_http.connection(server.port) as (reader, writer):
        writer.write(start)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                writer.write(piece)
                await asyncio.wait_for(writer.drain(), 20.0)
        cut_off = reader.at_eof() or writer.is_closing()
        assert cut_off, "12 MiB went in without a word"
    assert service.memory_info().rss - before_bytes < 4 * MIB


async def test_a_large_head_within_reason_is_fine(server: Server) -> None:
    answer = await raw_http.request(server.port, "/v1/completions", body(), X_Large="a" * 30_000)
    assert answer.status == 200


GARBAGE = (
    b"\x00" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # a TLS hello
    b"\r\n\r\n\r\n\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"
    b"12345",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n1",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"ffffffffffffffff\r\nabc",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n\xff\xfe\xfd\xfc",
)


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_is_an_error_or_a_closed_connection(server: Server, data: bytes) -> None:
    async with raw_http.connection(server.port) as (reader, writer):
        writer.write(data)
        # Some of it is merely incomplete, and then waits.
        with contextlib.suppress(ConnectionError, TimeoutError):
            answer = await asyncio.wait_for(reader.read(4096), 0.3)
            status = int(answer.split(b" ")[1]) if answer else 400
            assert 400 <= status < 500, answer


async def test_random_bytes(server: Server) -> None:
    import random

    dice = random.Random(7)
    whole = raw_http.encoded("/v1/completions", body(stream=True))
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(dice.randrange(1, 6)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        async with raw_http.connection(server.port) as (reader, writer):
            writer.write(data[: dice.randrange(len(data) + 1)])
            with contextlib.suppress(ConnectionError, TimeoutError):
                answer = await asyncio.wait_for(reader.read(4096), 0.02)
                assert not answer or int(answer.split(b" ")[1]) < 500, (bytes(data), answer)


async def test_half_closed(server: Server) -> None:
    for stream in (False, True):
        async with raw_http.connection(server.port) as (reader, writer):
            writer.write(raw_http.encoded("/v1/completions", body(max_tokens=400, stream=stream)))
            writer.write_eof()
            # Answered in full or dropped, as servers differ here; but nothing hangs.
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 20.0)


async def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    async with raw_http.connection(server.port) as (reader, writer):
        for i in range(20):
            data = body(prompt=[10 + i], max_tokens=i % 5 + 1, stream=i % 3 == 0)
            writer.write(raw_http.encoded("/v1/completions", data, close=False))
        for i in range(20):
            answer = await asyncio.wait_for(raw_http.read_answer(reader), 20.0)
            assert answer.status == 200
            if i % 3:
                assert answer.json["usage"]["completion_tokens"] == i % 5 + 1


async def test_pipelined_requests_end_with_their_connection(server: Server) -> None:
    before = server.labelled("penstock:request_success_total", "finished_reason")
    async with raw_http.connection(server.port) as (reader, writer):
        for _ in range(3):
            # More than is ever through before its end is seen, on a busy machine too.
            data = body(max_tokens=500, n=64, stream=True)
            writer.write(raw_http.encoded("/v1/completions", data, close=False))
        await reader.readuntil(b"data: ")
    settle(server)
    after = server.labelled("penstock:request_success_total", "finished_reason")
    assert after["length"] == before.get("length", 0)
    assert after["abort"] > before.get("abort", 0)


# --- bodies ---------------------------------------------------------------------------------------


async def test_a_body_over_the_limit(server: Server) -> None:
    async with raw_http.connection(server.port) as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n")
        answer = await asyncio.wait_for(raw_http.read_answer(reader), 10.0)
        assert answer.status == 413 and answer.json["error"]["code"] == "payload_too_large"


async def test_a_chunked_body_that_never_ends(server: Server) -> None:
    service = psutil.Process(server.process.pid)
    before_bytes = service.memory_info().rss
    async with raw_http.connection(server.port) as (reader, writer):
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(64):
            writer.write(b"10000\r\n" + b" " * 65_536 + b"\r\n")
            await asyncio.wait_for(writer.drain(), 20.0)
        answer = await asyncio.wait_for(raw_http.read_answer(reader), 10.0)
        assert answer.status == 413
        # Whoever goes on after that is cut off before long.
        deadline_s = time.monotonic() + 30.0
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                assert time.monotonic() < deadline_s, "the server reads for as long as I send"
                writer.write(b"5\r\n     \r\n")
                await writer.drain()
                await asyncio.sleep(0.05)
    assert service.memory_info().rss - before_bytes < 24 * MIB


async def test_bodies_that_stop_in_the_middle(server: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            _, writer = await stack.enter_async_context(raw_http.connection(server.port))
            writer.write(raw_http.encoded("/v1/completions", body())[:-20])
        assert await complete(server.port) == "length"


async def test_numbers_beyond_64_bits(server: Server) -> None:
    for field in ("seed", "priority", "max_tokens", "n", "logprobs", "top_k", "min_tokens",
                  "prompt_logprobs"):  # fmt: skip
        for value in (2**63, 2**64, 2**70, -(2**63) - 1, -(2**70)):
            answer = await raw_http.request(server.port, "/v1/completions", body(**{field: value}))
            assert answer.status in (200, 400), (field, value, answer)
            assert await complete(server.port) == "length"
    for prompt in ([2**70], [-1], [2**31]):
        answer = await raw_http.request(server.port, "/v1/completions", body(prompt=prompt))
        assert answer.status == 400


# --- readers --------------------------------------------------------------------------------------


async def test_a_slow_reader_costs_others_nothing(server: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(8):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.setblocking(False)
            stack.callback(sock.close)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
            data = body(n=4, max_tokens=490, stream=True, logprobs=5)
            await asyncio.get_running_loop().sock_sendall(
                sock, raw_http.encoded("/v1/completions", data)
            )
        # None of them has read a byte, and all are generated to the end meanwhile.
        deadline_s = time.monotonic() + 60.0
        while server.metric("penstock:instance_requests_running"):
            assert await complete(server.port) == "length"
            assert time.monotonic() < deadline_s
        assert await complete(server.port) == "length"
