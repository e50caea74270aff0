"""Servers under Poisson arrivals: streamed over HTTP, judged by what clients see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.compare.engines import Bench, Variant
from benchmarks.compare.process import START_TIMEOUT_S, EngineFailed, stop
from benchmarks.compare.summary import Objective, Outcome, summarise_online
from benchmarks.compare.traces import AZURE_CONVERSATION, Arrival, poisson_arrivals, read_lengths

Say = Callable[[str], None]


@dataclass(frozen=True)
class OnlineConfig:
    rates_per_s: tuple[float, ...] = (1.0, 1.5, 2.0)
    window_s: float = 45.0
    #: How long after the window answers may still come in; what is not finished then has failed.
    drain_s: float = 15.0
    #: The lengths of the trace are divided by this (mean 1155 + 212 tokens before).
    divisor: int = 4
    objective: Objective = field(default_factory=Objective)


class Server:
    """An OpenAI-compatible server on a free port. Blocks until it answers."""

    def __init__(self, bench: Bench, variant: Variant) -> None:
        self.name = variant.name
        port = _free_port()
        command = bench.server_command(variant, port)
        if command is None:
            raise EngineFailed("has no server that batches")
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until close)
        started_s = time.monotonic()
        self._process = subprocess.Popen(
            command,
            env=bench.environment(variant.kind),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self.model = self._wait()
        except BaseException:
            self.close()
            raise
        self.ready_s = time.monotonic() - started_s

    def _wait(self) -> str:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    models = httpx.get(f"{self.url}/v1/models").json()
                    return str(models["data"][0]["id"])
            time.sleep(0.1)
        self._log.seek(0)
        last = [line.strip() for line in self._log.read().splitlines() if line.strip()][-1:]
        raise EngineFailed(f"the server does not answer: {' '.join(last)}")

    def close(self) -> None:
        stop(self._process, gently=True)
        self._log.close()


def run_online(
    bench: Bench, variants: Sequence[Variant], config: OnlineConfig, say: Say
) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, str]]:
    """Rows of (engine, rate), seconds until each server was ready, and who is missing and why. The
    servers are up together and asked in turn: the one that is not asked waits."""
    lengths = [x.scaled(config.divisor) for x in read_lengths(AZURE_CONVERSATION)]
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []
        for variant in variants:
            try:
                server = stack.enter_context(contextlib.closing(Server(bench, variant)))
                asyncio.run(_warm_up(server, bench.sizes.vocab_size))
            except (EngineFailed, httpx.HTTPError) as exc:
                say(f"{variant.name} is not in the online run: {exc}")
                missing[f"{variant.name} (online)"] = str(exc).partition(":")[0]
                continue
            servers.append(server)
            say(f"{variant.name}: server ready after {server.ready_s:.1f} s")
        for number, rate in enumerate(config.rates_per_s):
            arrivals = list(
                poisson_arrivals(lengths, rate, config.window_s, number, bench.sizes.vocab_size)
            )
            for server in servers if number % 2 == 0 else reversed(servers):
                outcomes = asyncio.run(_replay(server, arrivals, config))
                row = summarise_online(outcomes, config.window_s, config.objective)
                rows.append({"engine": server.name, "rate_per_s": rate, **row})
                say(
                    f"  {rate:.2f}/s {server.name:14} goodput {row['goodput_per_s']:.2f}/s, "
                    f"TTFT p50 {row['ttft_p50_s']:.2f} s, TPOT p50 {row['tpot_p50_ms']:.0f} ms"
                )
        ready_s = {server.name: server.ready_s for server in servers}
    return rows, ready_s, missing


async def _warm_up(server: Server, vocab_size: int) -> None:
    arrivals = [Arrival(0.0, [101 + i, *range(100, 228)], 8) for i in range(4)]
    assert vocab_size > 228
    outcomes = await _replay(server, arrivals, OnlineConfig(window_s=1.0, drain_s=120.0))
    if any(outcome.finished_s is None for outcome in outcomes):
        raise EngineFailed("the server does not finish its first requests")


async def _replay(
    server: Server, arrivals: Sequence[Arrival], config: OnlineConfig
) -> list[Outcome]:
    """Each request is sent when it is due, whatever became of those before it."""
    if not arrivals:
        return []
    timeout = httpx.Timeout(None)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=timeout, limits=limits) as client:
        started_s = time.monotonic()
        clients = [_Client(client, server.model, a, started_s + a.at_s) for a in arrivals]
        tasks = [asyncio.create_task(c.run()) for c in clients]
        _, late = await asyncio.wait(tasks, timeout=config.window_s + config.drain_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if errors := {c.error for c in clients if c.error}:
        print(f"  {server.name}: {len(errors)} kinds of errors, such as {errors.pop()}")
    return [c.outcome() for c in clients]


class _Client:
    """One request, timed from when it was due rather than from when it could be sent."""

    def __init__(
        self, client: httpx.AsyncClient, model: str, arrival: Arrival, due_s: float
    ) -> None:
        self._client, self._due_s = client, due_s
        self._body = {
            "model": model,
            "prompt": arrival.prompt_ids,
            "max_tokens": arrival.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._num_tokens = 0
        self._done = False
        self.error: str | None = None

    async def run(self) -> None:
        await asyncio.sleep(max(0.0, self._due_s - time.monotonic()))
        try:
            async with self._client.stream("POST", "/v1/completions", json=self._body) as response:
                if response.status_code != 200:
                    self.error = f"status {response.status_code}"
                    return
                async for line in response.aiter_lines():
                    self._take(line)
        except httpx.HTTPError as exc:
            self.error = type(exc).__name__

    def _take(self, line: str) -> None:
        if not line.startswith("data:"):
            return
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self._done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self.error = "error in the stream"
        if chunk.get("choices"):
            self._last_s = time.monotonic() - self._due_s
            self._first_s = self._first_s or self._last_s
        if usage := chunk.get("usage"):
            self._num_tokens = usage["completion_tokens"]

    def outcome(self) -> Outcome:
        whole = self._done and self.error is None and self._num_tokens > 0
        return Outcome(self._num_tokens, self._first_s, self._last_s if whole else None)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
