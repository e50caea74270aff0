"""A router over engines that answer: what goes through, and which engine gets it."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.helpers import raw_http
from tests.helpers.live_router import live_router
from tests.helpers.mock_openai import (
    Exchange,
    MockEngine,
    answers,
    dies_after,
)
from tests.helpers.routed import CHAT, chat, idle, only, texts

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
async def test_whatever_computes_goes_the_same_way(path: str) -> None:
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
