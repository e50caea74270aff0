"""A router over engines that answer, refuse, hang, lie and die: what its clients see."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.helpers import raw_http
from tests.helpers.live_router import Live, live_router
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

from penstock.protocol.errors import ConfigError
from penstock.service.foreign.attempt import Attempt
from penstock.service.foreign.config import RouterConfig, engine_name
from penstock.service.foreign.upstream import UpstreamError

CHAT = "/v1/chat/completions"


def chat(stream: bool = False, text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "stream": stream,
        **fields,
    }


def texts(answer: raw_http.Answer) -> list[str]:
    events = answer.events
    return [e["choices"][0]["delta"]["content"] for e in events if "choices" in e]


def only(answer: raw_http.Answer) -> str:
    """The name of the engine that answered."""
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["message"]["content"])


def idle(live: Live) -> None:
    """Every count has been taken back."""
    assert not live.router.exchanges and not live.router.live
    for engine in live.router.fleet.engines:
        assert (engine.queued, engine.queued_tokens) == (0, 0)
        assert (engine.running, engine.running_tokens) == (0, 0)
    assert live.router.metrics.waiting == live.router.metrics.running == 0
    assert live.router._buffered_bytes == 0


# --- what goes through ---------------------------------------------------------------------------


async def test_requests_and_answers_go_through_as_they_are() -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        sent = chat(unknown_field=[1, {"x": None}])
        answer = await raw_http.request(live.port, f"{CHAT}?a=b", sent, x_request_id="my-id")
        assert only(answer) == "a"
        assert b"x-request-id: my-id" in answer.head
        seen = engine.exchanges[0]
        assert (seen.method, seen.path, seen.json) == ("POST", f"{CHAT}?a=b", sent)
        assert seen.headers["x-request-id"] == "my-id"
        assert seen.headers["host"] == f"127.0.0.1:{engine.port}"
        streamed = await raw_http.request(live.port, CHAT, chat(True, max_tokens=5))
        assert texts(streamed) == [f"a:{n}" for n in range(5)]
        idle(live)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/audio/speech", "/tokenize"]
)
async def test_any_path_goes_the_same_way(path: str) -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        assert (await raw_http.request(live.port, path, {"model": "m", "input": "x"})).status == 200
        assert engine.exchanges[0].path == path


async def test_bodies_of_any_framing_arrive_byte_for_byte() -> None:
    async with MockEngine() as engine, live_router(engine, hold_bytes=10_000) as live:
        big = bytes(range(256)) * 4000

        async def with_length(exchange: Exchange) -> None:
            await exchange.answer(big)

        async def chunked(exchange: Exchange) -> None:
            await exchange.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for start in range(0, len(big), 50_000):
                await exchange.chunk(big[start : start + 50_000])
            await exchange.send(b"0\r\nx-trailer: 1\r\n\r\n")

        async def until_closed(exchange: Exchange) -> None:
            await exchange.send(b"HTTP/1.1 200 OK\r\n\r\n" + big)
            exchange.writer.close()

        for behave in (with_length, chunked, until_closed, with_length):
            engine.behave = behave
            answer = await raw_http.request(live.port, "/v1/files/1", {"x": 1})
            assert answer.status == 200 and answer.body == big, behave.__name__
        engine.behave = answers
        request = raw_http.encoded(CHAT, chat()).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        async with raw_http.connection(live.port) as (reader, writer):
            writer.write(request)
            assert b"chunked" not in await reader.read()
        idle(live)


async def test_a_large_request_arrives_whole_and_a_larger_one_is_refused() -> None:
    async with MockEngine() as engine, live_router(engine, max_body_bytes=2_000_000) as live:
        text = "x" * 1_900_000
        assert only(await raw_http.request(live.port, CHAT, chat(text=text))) == "a"
        assert engine.exchanges[0].json["messages"][0]["content"] == text
        answer = await raw_http.request(live.port, CHAT, chat(text=text * 2))
        assert answer.status == 413 and answer.json["error"]["code"] == "payload_too_large"
        assert len(engine.exchanges) == 1
        idle(live)


async def test_one_connection_serves_many_requests_and_pipelined_ones_in_order() -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        async with raw_http.connection(live.port) as (reader, writer):
            for number in range(3):
                writer.write(raw_http.encoded(CHAT, chat(), close=False, x_request_id=f"r{number}"))
            for number in range(3):
                answer = await raw_http.read_answer(reader)
                assert answer.status == 200 and f"x-request-id: r{number}".encode() in answer.head
        await asyncio.sleep(0.05)
        idle(live)


async def test_upload_in_chunks_with_expect() -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        body = json.dumps(chat()).encode()
        async with raw_http.connection(live.port) as (reader, writer):
            writer.write(
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
                "Expect: 100-continue\r\n\r\n".encode()
            )
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            assert only(await raw_http.read_answer(reader)) == "a"
        assert engine.exchanges[0].headers["content-length"] == str(len(body))


# --- which engine --------------------------------------------------------------------------------


async def test_models_are_merged_and_requests_go_to_who_serves_them() -> None:
    one, two = MockEngine("a", ("m", "x")), MockEngine("b", ("m", "y"))
    async with one as a, two as b, live_router(a, b) as live:
        listed = await raw_http.request(live.port, "/v1/models")
        assert [card["id"] for card in listed.json["data"]] == ["m", "x", "y"]
        for model, name in (("x", "a"), ("y", "b")):
            assert only(await raw_http.request(live.port, CHAT, chat(model=model))) == name
        answer = await raw_http.request(live.port, CHAT, chat(model="z"))
        assert answer.status == 404 and answer.json["error"]["code"] == "model_not_found"
        assert (await raw_http.request(live.port, "/v1/models/y")).json["id"] == "y"
        idle(live)


async def test_a_prefix_draws_its_like_and_load_spreads() -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
        for engine in live.router.fleet.engines:  # as if both had been measured
            for tokens in range(100, 4000, 100):
                engine.cost.first_token(tokens, 0, 0.002 + 1e-4 * tokens)
        long = "Once upon a time. " * 300
        first = only(await raw_http.request(live.port, CHAT, chat(text=long + "1")))
        for turn in range(6):
            again = await raw_http.request(live.port, CHAT, chat(text=long + str(turn)))
            assert only(again) == first
        # While the favourite is busy with other work, the prefix is not worth its queue.
        busy, other = (a, b) if first == "a" else (b, a)
        engine = live.router.fleet.by_name[f"127.0.0.1:{busy.port}"]
        engine.placed(100_000)
        assert only(await raw_http.request(live.port, CHAT, chat(text=long + "x"))) == other.name
        engine.left(False, 100_000, 0)
        idle(live)


async def test_explanations_say_what_is_estimated_and_what_was_tried() -> None:
    key = {"Authorization": "Bearer root"}
    settings = {"admin_keys": ("root",)}
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b, **settings) as live:
        a.behave = b.behave = dies_after(0)
        await raw_http.request(live.port, CHAT, chat(True), x_request_id="both-die")
        a.behave = b.behave = answers
        await raw_http.request(live.port, CHAT, chat(True), x_request_id="fine")
        found = (await raw_http.request(live.port, "/admin/requests/fine/explain", **key)).json
        choice = found["prompts"][0]["choices"][0]
        assert choice["finish"] == "stop" and choice["output_tokens"] == 4
        assert "estimated" in choice["placements"][0]["decision"]["reason"]
        found = (await raw_http.request(live.port, "/admin/requests/both-die/explain", **key)).json
        placements = found["prompts"][0]["choices"][0]["placements"]
        assert {p["instance"] for p in placements} == {e.name for e in live.router.fleet.engines}
        assert all("closed the connection" in p["end"] for p in placements)
        assert (
            await raw_http.request(live.port, "/admin/requests/who/explain", **key)
        ).status == 404
        cluster = (await raw_http.request(live.port, "/admin/cluster", **key)).json
        assert [i["state"] for i in cluster["instances"]] == ["active", "active"]
        metrics = (await raw_http.request(live.port, "/metrics")).body.decode()
        types = [line for line in metrics.splitlines() if line.startswith("# TYPE")]
        assert len(types) == len(set(types)), "a family is described once"
        assert "penstock:engine_failures_total" in metrics


async def test_a_stored_response_is_asked_of_who_made_it() -> None:
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:

        async def stores(exchange: Exchange) -> None:
            await exchange.answer({"id": f"resp_{exchange.engine.name}", "usage": None})

        a.behave = b.behave = stores
        made = (await raw_http.request(live.port, "/v1/responses", {"input": "x"})).json["id"]
        for _ in range(4):
            found = await raw_http.request(live.port, f"/v1/responses/{made}")
            assert found.json["id"] == made
            body = {"input": "more", "previous_response_id": made}
            assert (await raw_http.request(live.port, "/v1/responses", body)).json["id"] == made


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
    async with MockEngine("a") as a, MockEngine("b") as b, live_router(a, b) as live:
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


@pytest.mark.parametrize(
    ("url", "name"),
    [("http://a:8000", "a:8000"), ("a:8000", "a:8000"), ("https://a/x/v1/", "a:443/x"),
     ("http://[::1]:1", "[::1]:1")],
)  # fmt: skip
def test_engines_are_called_by_host_and_port(url: str, name: str) -> None:
    assert engine_name(url) == name


@pytest.mark.parametrize("urls", [(), ("ftp://a",), ("http://a:99999",), ("http://a/?x=1",),
                                  ("http://a:1", "http://a:1/v1")])  # fmt: skip
def test_engines_that_cannot_be_are_refused(urls: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        RouterConfig(engines=urls)
