"""Real processes that are killed, stopped, drained and shared."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers.server import Server, environment, penstock, running

NUM_STREAMS = 32


@pytest.fixture(scope="module")
def server(slower_checkpoint: str) -> Iterator[Server]:
    with running(
        slower_checkpoint, "--dtype", "float32", "--served-model-name", "m",
        "--kv-cache-memory-bytes", "64M",
    ) as server:  # fmt: skip
        yield server


def body(number: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": [(7 * number + i) % 300 + 5 for i in range(number % 40 + 3)],
        "max_tokens": 120,
        "ignore_eos": True,
        # Half of them greedy, half of them drawn: both must come out the same again.
        "temperature": float(number % 2),
        "seed": number,
        "logprobs": 0,
    } | more


async def stream(client: httpx.AsyncClient, url: str, data: dict[str, Any]) -> AsyncIterator[Any]:
    async with client.stream("POST", f"{url}/v1/completions", json=data | {"stream": True}) as r:
        assert r.status_code == 200, await r.aread()
        async for line in r.aiter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                yield json.loads(line[6:])


@contextlib.asynccontextmanager
async def http() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=110.0, limits=limits) as client:
        yield client


async def collect(
    client: httpx.AsyncClient, url: str, data: dict[str, Any], started: asyncio.Event | None = None
) -> tuple[str, list[str]]:
    """The text, and every finish reason or error that came."""
    text, ends = "", []
    async for chunk in stream(client, url, data):
        if "error" in chunk:
            ends.append(chunk["error"]["code"])
            continue
        for choice in chunk["choices"]:
            text += choice["text"]
            if choice["finish_reason"]:
                ends.append(choice["finish_reason"])
        if started is not None and len(text) > 5:
            started.set()
    return text, ends


async def test_kill_9_under_32_streams_loses_nothing(server: Server) -> None:
    # Long enough that the engine is still at work when the first client has read its first words.
    bodies = [body(i, max_tokens=440) for i in range(NUM_STREAMS)]
    async with http() as client:
        calm = await asyncio.gather(*(collect(client, server.url, data) for data in bodies))
        started = [asyncio.Event() for _ in range(NUM_STREAMS)]
        tasks = [
            asyncio.create_task(collect(client, server.url, data, event))
            for data, event in zip(bodies, started)
        ]
        await asyncio.gather(*(event.wait() for event in started[:4]))
        killed = server.kill_engine()
        stormy = await asyncio.gather(*tasks)
    assert server.engine().pid != killed
    assert all(ends == ["length"] for _, ends in stormy)
    assert stormy == calm
    assert server.metric("penstock:sequences_resumed_total") > 0
    settle(server)


async def test_a_disconnect_frees_the_engine(server: Server) -> None:
    async with http() as client:
        async for _ in stream(client, server.url, body(1, max_tokens=400, n=4)):
            break  # leaving the block closes the connection
    settle(server)


async def test_a_stopped_engine_is_replaced_and_its_requests_go_on(server: Server) -> None:
    """SIGSTOP: it lives, holds its connections, and says nothing."""
    engine = server.engine()
    resumed = server.metric("penstock:sequences_resumed_total")
    # So many that the engine is still at work when a client has read its first words.
    bodies = [body(i, max_tokens=440) for i in range(NUM_STREAMS)]
    async with http() as client:
        calm = await asyncio.gather(*(collect(client, server.url, data) for data in bodies))
        started = asyncio.Event()
        tasks = [asyncio.create_task(collect(client, server.url, data, started)) for data in bodies]
        await started.wait()
        engine.send_signal(signal.SIGSTOP)
        assert await asyncio.gather(*tasks) == calm
    assert server.engine().pid != engine.pid
    assert server.metric("penstock:sequences_resumed_total") > resumed
    settle(server)


def settle(server: Server) -> None:
    """Nothing runs any more, by the service's count and by the engine's own."""
    deadline_s = time.monotonic() + 90.0
    names = ("penstock:num_requests_running", "penstock:num_requests_waiting")
    while any(server.metric(name) for name in names):
        assert time.monotonic() < deadline_s, "requests are still running"
        time.sleep(0.1)


async def test_sigterm_finishes_what_runs(slower_checkpoint: str) -> None:
    with running(slower_checkpoint, "--dtype", "float32", "--served-model-name", "m") as server:
        engine = server.engine()
        async with http() as client:
            started = asyncio.Event()
            task = asyncio.create_task(collect(client, server.url, body(2), started))
            await started.wait()
            server.process.send_signal(signal.SIGTERM)
            text, ends = await task
        assert ends == ["length"] and text
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        assert not engine.is_running()


async def test_a_dead_service_takes_its_engine_with_it(slower_checkpoint: str) -> None:
    with running(slower_checkpoint, "--dtype", "float32", "--served-model-name", "m") as server:
        engine = server.engine()
        server.process.kill()
        server.process.wait()
        await asyncio.to_thread(psutil.wait_procs, [engine], 10)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


async def test_two_services_share_one_engine_and_one_dies(
    slower_checkpoint: str, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/engine.sock"
    worker = subprocess.Popen(
        penstock("worker", slower_checkpoint, "--address", address, "--dtype", "float32"),
        env=environment(),
        stdin=subprocess.DEVNULL,
    )
    flags = ("--engine-address", address, "--served-model-name", "m")
    try:
        with running(slower_checkpoint, *flags) as one, running(slower_checkpoint, *flags) as two:
            async with http() as client:
                calm = await collect(client, one.url, body(5))
                started = asyncio.Event()
                doomed = asyncio.create_task(
                    collect(client, one.url, body(6, max_tokens=450), started)
                )
                other = asyncio.create_task(collect(client, two.url, body(5)))
                await started.wait()
                one.process.kill()
                with pytest.raises(httpx.TransportError):
                    await doomed
                assert await other == calm  # same prompt and seed, the other service
            two_only = Server(two.url, two.process, two.log_file)
            settle(two_only)
        assert worker.poll() is None
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0


def test_an_engine_that_cannot_start_is_one_line_and_a_failure(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    done = subprocess.run(
        penstock("serve", str(tmp_path), "--port", "0"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    assert os.linesep.join(done.stderr.splitlines()).count("Error") <= 1
