"""A load on a live server: what is counted where answers break off, come late, or never begin."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from penstock.cli.main import main
from penstock.loadgen.live import Outcome, Shot, distribution, play, request, summary

Answer = Callable[[dict[str, Any]], httpx.Response]


def client(answer: Answer) -> httpx.AsyncClient:
    transport = httpx.MockTransport(lambda asked: answer(json.loads(asked.content)))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def events(*bodies: object, broken: bool = False) -> httpx.Response:
    async def lines() -> AsyncIterator[bytes]:
        for body in bodies:
            yield f"data: {json.dumps(body)}\n\n".encode()
        if broken:
            raise httpx.ReadError("gone")
        yield b"data: [DONE]\n\n"

    return httpx.Response(200, content=lines())


def token(text: str = "x") -> dict[str, Any]:
    return {"choices": [{"text": text}]}


def usage(prompt_tokens: object, completion_tokens: object) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"choices": [], "usage": counts}


def cut(body: object) -> httpx.Response:
    """The connection ends in good order, but after this."""
    return httpx.Response(200, content=f"data: {json.dumps(body)}\n\n".encode())


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4},
    },
}  # fmt: skip


async def test_what_is_asked_and_what_is_seen() -> None:
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> httpx.Response:
        asked.append(body)
        return events(token(), token(), token(), USAGE)

    async with client(answer) as http:
        found = await request(http, {"prompt": [1, 2], "max_tokens": 3})
    assert asked[0]["stream"] and asked[0]["stream_options"] == {"include_usage": True}
    assert not found.error and (found.prompt_tokens, found.output_tokens) == (9, 3)
    assert found.cached_tokens == 4 and len(found.itl_s) == 2
    assert found.ttft_s + sum(found.itl_s) == pytest.approx(found.end_s)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda body: httpx.Response(429, json={"error": {"message": "full"}}), "full"),
        (lambda body: httpx.Response(502, text="bad gateway"), "answered 502"),
        (lambda body: events(token(), {"error": {"message": "lost"}}), "lost"),
        (lambda body: events(token(), broken=True), "ReadError: gone"),
        (lambda body: events(), "without a token"),
        (lambda body: events(token(), {"choices": [], "usage": {}, "x": 1}), None),
        (lambda body: events({"choices": [], "usage": {"prompt_tokens": 1}}), "KeyError"),
        (lambda body: events(token(), usage("x", 1)), "prompt_tokens 'x', no number"),
        (lambda body: events(token(), usage(1, -5)), "completion_tokens '-5', no number"),
        (lambda body: events(token(), {"usage": "many"}), "TypeError"),
        (lambda body: events(token(), {"choices": 5}), "no list of objects"),
        (lambda body: events({"choices": [None]}), "no list of objects"),
        (lambda body: events([1, 2]), "list where an object should be"),
        (lambda body: cut(token()), "broke off"),
        (lambda body: cut({"choices": [{"text": "x", "finish_reason": "length"}]}), None),
    ],
)
async def test_failures_are_outcomes(answer: Answer, error: str | None) -> None:
    async with client(answer) as http:
        found = await request(http, {})
    assert error in found.error if error else not found.error


async def test_a_server_that_is_not_there() -> None:
    async with httpx.AsyncClient(base_url="http://127.0.0.1:1") as http:
        (found,), _ = await play(http, [Shot(0.0, {})])
    assert found.error.startswith("ConnectError")


async def test_a_server_that_goes_silent_fails_its_requests() -> None:
    async def silence() -> AsyncIterator[bytes]:
        yield f"data: {json.dumps(token())}\n\n".encode()
        await asyncio.sleep(60)

    async with client(lambda body: httpx.Response(200, content=silence())) as http:
        (found,), _ = await play(http, [Shot(0.0, {})], timeout_s=0.05)
    assert found.error == "no whole answer within 0.05 s"


async def test_an_open_loop_waits_for_nobody_and_a_closed_one_does() -> None:
    under_way = [0, 0]  # now, and at most

    async def slowly() -> AsyncIterator[bytes]:
        under_way[0] += 1
        under_way[1] = max(under_way)
        await asyncio.sleep(0.05)
        yield f"data: {json.dumps(token())}\n\ndata: [DONE]\n\n".encode()
        under_way[0] -= 1

    shots = [Shot(0.005 * n, {}) for n in range(8)]
    ended: list[int] = []
    async with client(lambda body: httpx.Response(200, content=slowly())) as http:
        outcomes, _ = await play(http, shots, ended=ended.append)
        assert under_way[1] > 2 and all(not o.error for o in outcomes)
        assert ended == list(range(1, 9))
        under_way[1] = 0
        outcomes, _ = await play(http, shots, concurrency=2)
    assert under_way[1] == 2
    assert max(o.late_s for o in outcomes) > 0.05  # and that is said


async def test_what_is_not_answered_when_it_stops_is_left_out() -> None:
    stop, asked = asyncio.Event(), 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked > 2:
            stop.set()
            await asyncio.sleep(60)
        return events(token(), USAGE)

    async with httpx.AsyncClient(
        transport=httpx.MockTransport(answer), base_url="http://server"
    ) as http:
        shots = [Shot(0.0, {}), Shot(0.0, {}), Shot(0.0, {}), Shot(60.0, {})]
        outcomes, duration_s = await play(http, shots, concurrency=1, stop=stop)
    assert [outcome.error for outcome in outcomes] == ["", ""] and asked == 3
    assert 0 < duration_s < 30


def test_goodput_counts_failures_as_missed() -> None:
    outcomes = [
        Outcome("", ttft_s=0.1, end_s=1.0, output_tokens=10),
        Outcome("", ttft_s=0.9, end_s=1.0, output_tokens=10),
        Outcome("", ttft_s=0.1, end_s=9.1, output_tokens=10),
        Outcome("", ttft_s=0.1, end_s=0.1, output_tokens=1),  # no token after the first: no TPOT
        Outcome("broken"),
        Outcome("broken"),
    ]
    found = summary(outcomes, 2.0, slos_s={"ttft": 0.5, "tpot": 0.2})
    assert found["slo_attainment"] == pytest.approx(2 / 6)
    assert found["request_goodput_per_s"] == 1.0
    assert found["slo_ms"] == {"ttft": 500.0, "tpot": 200.0}
    assert found["errors"] == ["broken (2 times)"] and found["failed"] == 2


def test_percentiles_are_measured_values() -> None:
    found = distribution([i / 1000 for i in range(1, 201)], (50.0, 99.5, 100.0))
    assert found == {"mean": pytest.approx(100.5), "p50": 100.0, "p99.5": 199.0, "p100": 200.0}
    assert distribution([]) is None


def test_a_server_that_hangs_up_before_the_first_request_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class HangsUp(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        code = main(["bench", "--url", url, "--model", "m", "--num-prompts", "1"])
        server.shutdown()
    assert code == 1
    assert f"penstock: {url} does not answer /tokenize" in capsys.readouterr().err
