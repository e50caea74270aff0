"""A cluster of processes with split requests, and what its clients see when one of them fails.

Each client must see exactly the text of the undisturbed run, and one end (in float32, where that is
exact).
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.helpers.cluster import (
    Answer,
    body,
    cluster_report,
    instances,
    load,
    send_signal,
    settle,
    wait_for,
    with_role,
)
from tests.helpers.server import Server, running

NUM_STREAMS = 16
FLAGS = (
    "--dtype", "float32", "--served-model-name", "m", "--kv-cache-memory-bytes", "32M",
    "--num-threads", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def calm(slower_checkpoint: str) -> list[Answer]:
    """What a single instance says when nothing happens."""
    with running(slower_checkpoint, *FLAGS) as server:
        answers = asyncio.run(load(server.url, [body(i) for i in range(NUM_STREAMS)]))
    assert all(a.ends == ["length"] for a in answers)
    return answers


@pytest.fixture(scope="module")
def server(slower_checkpoint: str) -> Iterator[Server]:
    with running(slower_checkpoint, *FLAGS, "--instances", "3", "--pd", "static=1:2") as server:
        roles_are_given(server)
        yield server


def roles_are_given(server: Server) -> None:
    def given() -> bool:
        roles = sorted(i["role"] for i in instances(server.url).values() if i["state"] == "active")
        return roles == ["decode", "decode", "prefill"]

    wait_for(given, 60.0, "one instance for prefill and two for decode")


async def under_load(server: Server, disturb: object) -> list[Answer]:
    started = asyncio.Event()
    bodies = [body(i) for i in range(NUM_STREAMS)]
    task = asyncio.create_task(load(server.url, bodies, started))
    await started.wait()
    await asyncio.to_thread(disturb)  # type: ignore[arg-type]  # any callable without arguments
    return await task


def same(answers: list[Answer], calm: list[Answer]) -> None:
    assert [a.outcome for a in answers] == [a.outcome for a in calm]


async def test_split_requests_say_what_one_instance_says(
    server: Server, calm: list[Answer]
) -> None:
    answers = await load(server.url, [body(i) for i in range(NUM_STREAMS)])
    same(answers, calm)
    settle(server)
    assert cluster_report(server.url)["totals"]["handovers"] >= NUM_STREAMS


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_kill_9(server: Server, calm: list[Answer], role: str) -> None:
    victim = with_role(server.url, role)

    def kill() -> None:
        send_signal(with_role(server.url, role)["pid"], signal.SIGKILL)

    same(await under_load(server, kill), calm)
    assert victim["name"] in instances(server.url)
    settle(server)
    roles_are_given(server)  # its successor has its part again


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_stopped_for_ten_seconds_and_back(
    server: Server, calm: list[Answer], role: str
) -> None:
    """A zombie: what it says when it wakes up is of the past. An engine of the server's own is
    killed and replaced meanwhile."""
    pid = 0

    def stop() -> None:
        nonlocal pid
        pid = with_role(server.url, role)["pid"]
        send_signal(pid, signal.SIGSTOP)

    task = asyncio.create_task(under_load(server, stop))
    await asyncio.sleep(10.0)
    try:
        send_signal(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass
    same(await task, calm)
    settle(server)
    roles_are_given(server)


async def test_roles_change_under_load(server: Server, calm: list[Answer]) -> None:
    """By hand, and back: nobody notices."""
    name = with_role(server.url, "decode")["name"]
    changes = cluster_report(server.url)["totals"]["role_changes"]

    def change() -> None:
        # After the first change the fixed split turns another one to decode, which may be the last
        # that prefills just then: that is refused until a third one has turned.
        for role in ("prefill", "decode"):
            url, deadline_s = f"{server.url}/admin/instances/{name}/role", time.monotonic() + 20.0
            while (answer := httpx.post(url, json={"role": role})).status_code == 400:
                assert time.monotonic() < deadline_s, answer.text
                time.sleep(0.05)
            assert answer.status_code == 202, answer.text

    same(await under_load(server, change), calm)
    settle(server)
    assert cluster_report(server.url)["totals"]["role_changes"] >= changes + 2


async def test_draining_hands_over(server: Server, calm: list[Answer]) -> None:
    def drain() -> None:
        name = with_role(server.url, "decode")["name"]
        answer = httpx.post(f"{server.url}/admin/instances/{name}/drain")
        assert answer.status_code == 202, answer.text

    same(await under_load(server, drain), calm)
