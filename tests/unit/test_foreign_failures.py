"""A router over engines that refuse, hang, lie and die: what its clients see."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.helpers import raw_http
from tests.helpers.live_router import live_router
from tests.helpers.mock_openai import (
    Behaviour,
    Exchange,
    MockEngine,
    answers,
    dies,
    dies_after,
    hangs,
    refuses,
    says,
)
from tests.helpers.routed import CHAT, chat, idle, only, texts

from penstock.service.foreign.attempt import Attempt
from penstock.service.foreign.upstream import UpstreamError

# --- engines that fail ---------------------------------------------------------------------------

GARBAGE = [
    b"\x00\x01\x02 this is no HTTP\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: nonsense\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000,
    b"",
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "behave",
    [dies, dies_after(0), dies_after(0, partial=True), *(says(g) for g in GARBAGE),
     *(refuses(s) for s in (429, 500, 502, 503, 504))],
)  # fmt: skip
async def test_before_the_first_byte_another_engine_is_tried(behave: Any, stream: bool) -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        a.behave = behave
        for _ in range(4):
            answer = await raw_http.request(live.port, CHAT, chat(stream))
            assert answer.status == 200
            names = {t.split(":")[0] for t in texts(answer)} if stream else {only(answer)}
            assert names == {"b"}
        assert a.exchanges, "it was tried"
        idle(live)


async def test_when_all_refuse_the_engines_own_words_arrive() -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        a.behave = b.behave = refuses(503, retry_after="7")
        answer = await raw_http.request(live.port, CHAT, chat())
        assert answer.status == 503 and "says 503" in answer.json["error"]["message"]
        assert b"retry-after: 7" in answer.head
        assert len(a.exchanges) == len(b.exchanges) == 1
        # Both have asked for a pause, and get it.
        answer = await raw_http.request(live.port, CHAT, chat())
        assert answer.status == 429 and answer.json["error"]["type"] == "rate_limit_error"
        assert b"retry-after: " in answer.head
        assert len(a.exchanges) == len(b.exchanges) == 1
        idle(live)


async def test_errors_of_the_request_are_not_retried() -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        a.behave = b.behave = refuses(400)
        answer = await raw_http.request(live.port, CHAT, chat())
        assert answer.status == 400 and len(a.exchanges) + len(b.exchanges) == 1


@pytest.mark.parametrize("num_events", [1, 3])
@pytest.mark.parametrize("partial", [False, True])
async def test_after_the_first_byte_a_stream_ends_with_an_error_event(
    num_events: int, partial: bool
) -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        a.behave = b.behave = dies_after(num_events, partial)
        answer = await raw_http.request(live.port, CHAT, chat(True))
        *tokens, last = answer.events  # every event is JSON, and [DONE] is the last
        assert len(tokens) == num_events, "nothing twice, nothing of another engine"
        assert len({t["choices"][0]["delta"]["content"].split(":")[0] for t in tokens}) == 1
        assert last["error"]["code"] == "engine_unavailable"
        assert "closed the connection" in last["error"]["message"]
        assert answer.body.count(b"[DONE]") == 1
        assert len(a.exchanges) + len(b.exchanges) == 1
        idle(live)


async def test_a_stream_without_framing_that_breaks_off_is_no_end() -> None:
    """An engine that sends no chunks ends its streams by closing; so does one that is killed."""
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
        event = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'

        def closes_after(data: bytes) -> Behaviour:
            async def behave(exchange: Exchange) -> None:
                await exchange.send(head + data)
                exchange.writer.close()

            return behave

        a.behave = b.behave = closes_after(event + b"data: [DONE]\n\n")
        assert len((await raw_http.request(live.port, CHAT, chat(True))).events) == 1
        a.behave = b.behave = closes_after(event)
        answer = await raw_http.request(live.port, CHAT, chat(True))
        assert len(answer.events) == 2 and "closed" in answer.events[1]["error"]["message"]
        a.behave = closes_after(b"")  # nothing has gone out: the other one is asked
        b.behave = answers
        for _ in range(3):
            streamed = await raw_http.request(live.port, CHAT, chat(True, max_tokens=2))
            assert texts(streamed) == ["b:0", "b:1"]
        idle(live)


async def test_a_long_answer_that_breaks_off_is_seen_to_be_broken() -> None:
    async with MockEngine() as engine, live_router(engine, hold_bytes=1000) as live:
        head = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"
        engine.behave = says(head + b"x" * 5000)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await raw_http.request(live.port, "/v1/embeddings", {"input": "x"})
        idle(live)


async def test_silence_ends_by_its_deadline() -> None:
    settings = {"first_byte_timeout_s": 0.2, "stall_timeout_s": 0.2}
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b, **settings) as live:
        a.behave = hangs
        for _ in range(3):
            assert only(await raw_http.request(live.port, CHAT, chat())) == "b"
        b.behave = hangs
        answer = await raw_http.request(live.port, CHAT, chat())
        assert answer.status == 503 and "said nothing" in answer.json["error"]["message"]

        async def stalls(exchange: Exchange) -> None:
            await exchange.begin_stream()
            await exchange.event(0)
            await hangs(exchange)

        a.behave = b.behave = stalls
        answer = await raw_http.request(live.port, CHAT, chat(True))
        assert len(answer.events) == 2 and "said nothing" in answer.events[1]["error"]["message"]
        idle(live)


async def test_a_slow_trickle_is_no_silence() -> None:
    async with MockEngine() as engine, live_router(engine, stall_timeout_s=0.5) as live:

        async def trickles(exchange: Exchange) -> None:
            await exchange.begin_stream()
            data = exchange.event_bytes(0)
            for start in range(0, len(data), 10):
                await exchange.chunk(data[start : start + 10])
                await asyncio.sleep(0.1)
            await exchange.chunk(b"data: [DONE]\n\n")
            await exchange.send(b"0\r\n\r\n")

        engine.behave = trickles
        assert texts(await raw_http.request(live.port, CHAT, chat(True))) == ["a:0"]


async def test_an_engine_that_stops_answering_its_checks_loses_its_requests() -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        a.behave = b.behave = hangs
        waiting = asyncio.create_task(raw_http.request(live.port, CHAT, chat()))
        while not (a.exchanges or b.exchanges):
            await asyncio.sleep(0.01)
        stuck, other = (a, b) if a.exchanges else (b, a)
        stuck.healthy, other.behave = False, answers
        assert only(await waiting) == other.name
        states = {e.name: e.state for e in live.router.fleet.engines}
        assert states[f"127.0.0.1:{stuck.port}"] == "lost"
        stuck.healthy, stuck.behave = True, answers
        while "lost" in {e.state for e in live.router.fleet.engines}:
            await asyncio.sleep(0.01)
        idle(live)


async def test_the_breaker_opens_and_closes() -> None:
    settings = {"breaker_failures": 2, "breaker_open_s": 0.3}
    async with MockEngine("a") as a, live_router(a, **settings) as live:
        a.behave = refuses(502)
        for _ in range(2):
            assert (await raw_http.request(live.port, CHAT, chat())).status == 502
        answer = await raw_http.request(live.port, CHAT, chat())
        assert answer.status == 503 and "breaker open" in answer.json["error"]["message"]
        assert len(a.exchanges) == 2
        await asyncio.sleep(0.35)
        assert (await raw_http.request(live.port, CHAT, chat())).status == 502  # the one that tries
        assert (await raw_http.request(live.port, CHAT, chat())).status == 503
        a.behave = answers
        await asyncio.sleep(0.7)
        for _ in range(3):
            assert only(await raw_http.request(live.port, CHAT, chat())) == "a"


async def test_a_bad_request_that_is_answered_with_500_closes_no_engine() -> None:
    """llama-cpp-python answers so to a temperature that is no number."""
    settings = {"breaker_failures": 2}
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b, **settings) as live:
        a.behave = b.behave = refuses(500)
        for _ in range(6):
            answer = await raw_http.request(live.port, CHAT, chat())
            assert answer.status == 500 and "says 500" in answer.json["error"]["message"]
        assert {e.breaker.state for e in live.router.fleet.engines} == {"closed"}
        # Where the other can answer, it was the engine's fault.
        b.behave = answers
        while live.router.fleet.by_name[f"127.0.0.1:{a.port}"].breaker.state == "closed":
            assert only(await raw_http.request(live.port, CHAT, chat())) == "b"
        idle(live)


async def test_an_engine_too_busy_for_health_checks_lives_while_it_streams() -> None:
    async with MockEngine() as engine, live_router(engine, lost_stall_s=0.1) as live:

        async def streams(exchange: Exchange) -> None:
            engine.healthy = False
            await exchange.begin_stream()
            for number in range(60):
                await exchange.event(number)
                await asyncio.sleep(0.02)
            await exchange.chunk(b"data: [DONE]\n\n")
            await exchange.send(b"0\r\n\r\n")

        engine.behave = streams
        answer = await raw_http.request(live.port, CHAT, chat(True))
        assert len(texts(answer)) == 60
        async with asyncio.timeout(10):
            while live.router.fleet.engines[0].state != "lost":  # silent again
                await asyncio.sleep(0.01)


async def test_an_engine_that_is_gone_comes_back() -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        port = a.port
        await a.stop()
        for _ in range(4):
            assert only(await raw_http.request(live.port, CHAT, chat())) == "b"
        await b.stop()
        answer = await raw_http.request(live.port, CHAT, chat())
        assert answer.status == 503 and answer.json["error"]["code"] == "engine_unavailable"
        async with MockEngine("again", port=port):
            async with asyncio.timeout(20):
                while (answer := await raw_http.request(live.port, CHAT, chat())).status != 200:
                    await asyncio.sleep(0.05)
            assert only(answer) == "again"
        idle(live)


async def test_what_is_not_repeatable_is_sent_once() -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        a.behave = b.behave = dies
        answer = await raw_http.request(live.port, "/v1/fine_tuning/jobs", {"model": "m"})
        assert answer.status == 503 and len(a.exchanges) + len(b.exchanges) == 1


async def test_a_kept_connection_that_the_engine_closed_costs_nothing() -> None:
    async with MockEngine() as engine, live_router(engine) as live:

        async def closes_after(exchange: Exchange) -> None:
            await answers(exchange)
            asyncio.get_running_loop().call_later(0.0, exchange.writer.transport.abort)

        engine.behave = closes_after
        for _ in range(20):
            assert only(await raw_http.request(live.port, CHAT, chat())) == "a"
        assert live.router.fleet.engines[0].counts.failures == 0


async def test_a_connection_for_a_health_check_is_no_requests() -> None:
    """Even where the engine does not close it, as it was asked to."""
    async with MockEngine() as engine, live_router(engine, health_every_s=60.0) as live:
        for _ in range(5):
            await live.look()
            assert live.router.fleet.engines[0].pool.idle() is None


async def test_a_finished_answer_lets_go_of_its_connection() -> None:
    """A client that leaves, or pauses, at that moment must not do so to the next request."""
    async with MockEngine() as engine, live_router(engine) as live:
        finished: list[Attempt] = []

        class Seen(set[Attempt]):
            def add(self, attempt: Attempt) -> None:
                finished.append(attempt)
                super().add(attempt)

        live.router.live = Seen()
        assert only(await raw_http.request(live.port, CHAT, chat())) == "a"
        release = asyncio.Event()

        async def waits(exchange: Exchange) -> None:
            await release.wait()
            await answers(exchange)

        engine.behave = waits
        following = asyncio.create_task(raw_http.request(live.port, CHAT, chat()))
        while len(finished) < 2:
            await asyncio.sleep(0.01)
        finished[0].abandon(UpstreamError("its client went away"))
        release.set()
        assert only(await following) == "a"
        assert engine.num_left == 0 and len(engine.exchanges) == 2


async def test_what_an_operator_drains_stays_away_until_it_is_started() -> None:
    settings = {"admin_keys": ("root",)}
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b, **settings) as live:

        async def ask(name: str, what: str) -> raw_http.Answer:
            path = f"/admin/instances/{name}/{what}"
            return await raw_http.request(live.port, path, {}, Authorization="Bearer root")

        engine = live.router.fleet.by_name[f"127.0.0.1:{a.port}"]
        early = await ask(engine.name, "start")
        assert early.status == 409 and "only what has been drained" in early.body.decode()
        answer = await ask(engine.name, "drain")
        assert answer.status == 202 and answer.json["asked"] == "drain"
        for _ in range(4):
            assert only(await raw_http.request(live.port, CHAT, chat())) == "b"
        a.healthy = False  # what is lost while it drains comes back draining
        while engine.state != "lost":
            await asyncio.sleep(0.01)
        a.healthy = True
        while engine.state == "lost":
            await asyncio.sleep(0.01)
        assert engine.state == "draining"
        answer = await ask(engine.name, "start")
        assert answer.json == {"instance": engine.name, "asked": "start", "role": None}
        b.behave = refuses(503)
        async with asyncio.timeout(10):
            while (answer := await raw_http.request(live.port, CHAT, chat())).status != 200:
                await asyncio.sleep(0.02)
        assert only(answer) == "a"
        assert (await ask("nobody", "start")).status == 404
