"""Thousands of short requests of every kind, many broken off: nothing may be left behind."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.helpers import raw_http
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import Server, running

MIB = 1 << 20
CLIENTS = 24
#: What an idle server shows. Blocks kept for the prefix cache are not in use.
IDLE_AT_ZERO = (
    "penstock:num_requests_running",
    "penstock:num_requests_waiting",
    "penstock:instance_requests_running",
    "penstock:instance_requests_waiting",
    "penstock:instance_running_tokens",
    "penstock:instance_waiting_tokens",
    "penstock:kv_cache_usage_perc",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, "qwen3")
    # A pool that fills within the first few hundred requests, so that eviction and preemption are
    # part of the soak and the cache does not look like a leak.
    with running(
        str(folder), "--dtype", "float32", "--served-model-name", "m", "--num-gpu-blocks-override",
        "96", "--max-num-seqs", "16",
    ) as server:  # fmt: skip
        yield server


def test_soak(server: Server) -> None:
    asyncio.run(soak(server, num_requests=1500, warm_up=700))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_soak_10_000(server: Server) -> None:
    asyncio.run(soak(server, num_requests=10_000, warm_up=3000))


async def soak(server: Server, num_requests: int, warm_up: int) -> None:
    service, engine = psutil.Process(server.process.pid), server.engine()
    port = server.port
    steps_before = server.metric("penstock:engine_steps_total")
    outcomes: Counter[str] = Counter()

    async def clients(start: int, stop: int) -> None:
        numbers = iter(range(start, stop))

        async def client() -> None:
            for number in numbers:
                outcomes[await one_request(port, number)] += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        await idle(server)

    await clients(0, warm_up)
    service_bytes, engine_bytes = service.memory_info().rss, engine.memory_info().rss
    files = service.num_fds(), engine.num_fds()
    await clients(warm_up, num_requests)

    assert sum(outcomes.values()) == num_requests
    assert {"finished", "left", "refused"} == set(outcomes), outcomes
    assert outcomes["left"] > num_requests / 10 and outcomes["finished"] > num_requests / 3
    assert server.metric("penstock:engine_steps_total") > steps_before
    assert server.engine().pid == engine.pid, "the engine has been restarted"
    # A leak of one kilobyte for each of the 7,000 would be twice this.
    slack_bytes = 3 * MIB + 128 * (num_requests - warm_up)
    assert service.memory_info().rss - service_bytes < slack_bytes
    assert engine.memory_info().rss - engine_bytes < slack_bytes
    assert service.num_fds() <= files[0] + 2 and engine.num_fds() <= files[1] + 2
    for word in ("Traceback", "ERROR", "AssertionError", "never awaited"):
        assert word not in server.log, server.log


async def idle(server: Server) -> None:
    """Until both sides say so. The engine checks every block when it falls idle, and dies of one
    that is lost."""
    deadline_s = time.monotonic() + 30.0
    while any(found := {name: server.metric(name) for name in IDLE_AT_ZERO}.values()):
        assert time.monotonic() < deadline_s, f"not idle: {found}\n{server.log[-2000:]}"
        await asyncio.sleep(0.2)


async def one_request(port: int, number: int) -> str:
    """How it ended: `finished`, `left` (by us) or `refused` (as it should be)."""
    dice = random.Random(number)
    if dice.random() < 0.1:
        return await _refused(port, dice)
    path, data = _request(dice)
    leave = dice.random()
    async with raw_http.connection(port) as (reader, writer):
        writer.write(raw_http.encoded(path, data))
        if leave < 0.1:  # before it can have begun, or a moment later
            await asyncio.sleep(dice.choice((0.0, 0.001, 0.01)))
            return "left"
        if leave < 0.25 and data.get("stream"):
            await reader.readuntil(b"data: ")
            if dice.random() < 0.5:
                await reader.readuntil(b"data: ")
            return "left"
        answer = await raw_http.read_answer(reader)
    assert answer.status == 200, answer
    _check_whole(answer, data)
    return "finished"


def _request(dice: random.Random) -> tuple[str, dict[str, Any]]:
    data: dict[str, Any] = {
        "model": "m",
        "max_tokens": dice.choice((1, 2, 5, 9, 14)),
        "temperature": dice.choice((0.0, 1.0)),
        "seed": dice.randrange(1000),
        "n": dice.choice((1, 1, 1, 2, 3)),
        "stream": dice.random() < 0.6,
        "ignore_eos": dice.random() < 0.5,
    }
    if dice.random() < 0.3:
        data["stop"] = dice.choice(("e", " the", ["a", "o"]))
    if dice.random() < 0.1:
        data["presence_penalty"], data["logit_bias"] = 0.5, {"40": -2.0}
    if dice.random() < 0.3:
        text = "The river turns the wheel and " * dice.randrange(1, 4)
        return "/v1/chat/completions", data | {"messages": [{"role": "user", "content": text}]}
    if dice.random() < 0.2:
        data["logprobs"] = 2
    if dice.random() < 0.05:
        # Few, since the first of each is compiled.
        data |= {"structured_outputs": {"regex": "(yes|no) [0-9]{1,4}"}, "n": 1, "stop": []}
    common = [7] * dice.choice((0, 16, 40))  # whole blocks in common, for the prefix cache
    prompt = common + [dice.randrange(5, 380) for _ in range(dice.randrange(1, 60))]
    return "/v1/completions", data | {"prompt": prompt}


def _check_whole(answer: raw_http.Answer, data: dict[str, Any]) -> None:
    """Each choice has ended once, in a way that was asked for."""
    documents = answer.events if data["stream"] else [answer.json]
    assert not any("error" in document for document in documents), documents
    choices = [choice for document in documents for choice in document["choices"]]
    ends = Counter(c["index"] for c in choices if c["finish_reason"] in ("stop", "length"))
    assert ends == Counter(range(data["n"])), documents


async def _refused(port: int, dice: random.Random) -> str:
    bad: list[tuple[int, dict[str, Any]]] = [
        (400, {"model": "m", "prompt": [1], "n": 0}),
        (400, {"model": "m", "prompt": [10**6]}),
        (400, {"model": "m", "prompt": [5] * 600}),
        (400, {"model": "m", "prompt": "a", "max_tokens": -1}),
        (400, {"model": "m", "prompt": "a", "structured_outputs": {"regex": "("}}),
        (404, {"model": "another", "prompt": "a"}),
    ]
    status, data = dice.choice(bad)
    answer = await raw_http.request(port, "/v1/completions", data)
    assert answer.status == status, (data, answer)
    return "refused"
