"""A router and its clients: those that leave, do not read, send nonsense, or bring keys."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers import raw_http
from tests.helpers.live_router import live_router
from tests.helpers.mock_openai import (
    Exchange,
    MockEngine,
    answers,
    hangs,
)
from tests.helpers.routed import CHAT, chat, idle, only, texts

# --- clients that leave, or do not read ----------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_told_to_the_engine(stream: bool) -> None:
    async with MockEngine() as engine, live_router(engine) as live:

        async def goes_on(exchange: Exchange) -> None:
            if stream:
                await exchange.begin_stream()
                await exchange.event(0)
            await hangs(exchange)

        engine.behave = goes_on
        async with raw_http.connection(live.port) as (reader, writer):
            writer.write(raw_http.encoded(CHAT, chat(stream)))
            if stream:
                await reader.readuntil(b"a:0")
            while not engine.exchanges:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            while not engine.num_left or live.router.exchanges:
                await asyncio.sleep(0.01)
        assert live.router.fleet.engines[0].counts.failures == 0
        idle(live)


async def test_a_client_that_does_not_read_holds_back_its_engine_and_is_dropped() -> None:
    async with MockEngine() as engine:
        settings = {"client_buffer_bytes": 10_000, "client_stall_s": 0.5}
        async with live_router(engine, **settings) as live:
            written = most = 0

            async def floods(exchange: Exchange) -> None:
                nonlocal written
                await exchange.begin_stream()
                event = b"data: " + b"x" * 50_000 + b"\n\n"
                while True:
                    await exchange.chunk(event)
                    written += len(event)

            engine.behave = floods
            async with raw_http.connection(live.port) as (_, writer):
                writer.write(raw_http.encoded(CHAT, chat(True)))
                async with asyncio.timeout(20):
                    while not engine.exchanges or live.router.exchanges:
                        await asyncio.sleep(0.01)
                        for client in live.router.clients:
                            assert client.transport is not None
                            most = max(most, client.transport.get_write_buffer_size())
            assert 10_000 < most < 400_000, "its buffer, and one read more"
            assert written > most
            idle(live)


@pytest.mark.parametrize(
    "request_bytes",
    [b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 100_000 + b"\r\n\r\n",
     b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
     b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
     b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: +5\r\n\r\n",
     b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n",
     b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, gzip\r\n\r\n",
     b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding : chunked\r\n\r\n",
     b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding:\r\n chunked\r\n\r\n",
     b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\nhello\n0\n\n",
     b"GET / HTTP/1.1\nhost: x\n\n", b"GET / HTTP/1.1\r\nhost: x\r\nx: a\r\n b\r\n\r\n",
     b"GET / HTTP/1.1\r\nhost: x\r\nx: a\x00b\r\n\r\n",
     b"GET / HTTP/1.1\r\nhost: x\r\nx: a\rb: c\r\n\r\n"],
)  # fmt: skip
async def test_bad_requests_are_refused_and_closed(request_bytes: bytes) -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        async with raw_http.connection(live.port) as (reader, writer):
            writer.write(request_bytes)
            answer = await reader.read()
        assert answer.split(b" ")[1] in (b"400", b"431") and b"invalid_request" in answer
        assert not engine.exchanges


async def test_too_many_requests_are_refused_at_once() -> None:
    async with MockEngine() as engine, live_router(engine, max_queue=2) as live:
        engine.behave = hangs
        waiting = [asyncio.create_task(raw_http.request(live.port, CHAT, chat())) for _ in range(2)]
        while len(engine.exchanges) < 2:
            await asyncio.sleep(0.01)
        answer = await raw_http.request(live.port, CHAT, chat())
        assert answer.status == 429 and b"retry-after" in answer.head
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_thousand_streams_at_once_each_get_theirs() -> None:
    # Engines, router and clients are one process here, which is not to give up on itself.
    patience = {"connect_timeout_s": 60.0, "health_timeout_s": 30.0}
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b, **patience) as live:
        found = await asyncio.gather(
            *(raw_http.request(live.port, CHAT, chat(True, max_tokens=3)) for _ in range(1000))
        )
        for answer in found:
            names = [t.split(":") for t in texts(answer)]
            assert [n for _, n in names] == ["0", "1", "2"] and len({e for e, _ in names}) == 1
        assert len(a.exchanges) + len(b.exchanges) == 1000
        assert min(len(a.exchanges), len(b.exchanges)) > 200
        idle(live)


# --- keys ----------------------------------------------------------------------------------------


async def test_keys_of_clients_stay_here_and_engines_get_theirs() -> None:
    async with MockEngine() as engine:
        async with live_router(engine, api_keys=("sesame",), engine_api_key="theirs") as live:
            assert (await raw_http.request(live.port, CHAT, chat())).status == 401
            bearer = {"Authorization": "Bearer sesame"}
            assert only(await raw_http.request(live.port, CHAT, chat(), **bearer)) == "a"
            assert engine.exchanges[-1].headers["authorization"] == "Bearer theirs"
            assert (await raw_http.request(live.port, "/health")).status == 200
        async with live_router(engine, api_keys=("sesame",)) as live:
            assert only(await raw_http.request(live.port, CHAT, chat(), **bearer)) == "a"
            assert "authorization" not in engine.exchanges[-1].headers
        async with live_router(engine) as live:
            assert only(await raw_http.request(live.port, CHAT, chat(), **bearer)) == "a"
            assert engine.exchanges[-1].headers["authorization"] == "Bearer sesame"
        async with live_router(engine, admin_keys=("root",)) as live:
            assert (await raw_http.request(live.port, "/admin/cluster")).status == 401


async def test_a_stopping_router_finishes_what_runs_and_refuses_what_is_new() -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        release = asyncio.Event()

        async def waits(exchange: Exchange) -> None:
            await release.wait()
            await answers(exchange)

        engine.behave = waits
        running = asyncio.create_task(raw_http.request(live.port, CHAT, chat(), close=False))
        while not engine.exchanges:
            await asyncio.sleep(0.01)
        live.router.drain()
        assert (await raw_http.request(live.port, "/health")).status == 503
        assert (await raw_http.request(live.port, CHAT, chat())).status == 503
        release.set()
        assert only(await running) == "a"


async def test_work_of_others_on_an_engine_is_seen() -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        a.metrics = b'vllm:num_requests_running{model_name="m"} 50.0\nvllm:num_requests_waiting 9\n'
        engine = live.router.fleet.by_name[f"127.0.0.1:{a.port}"]
        async with asyncio.timeout(10):
            while not engine.others_running:
                await asyncio.sleep(0.01)
        assert (engine.others_running, engine.others_queued) == (50.0, 9.0)
