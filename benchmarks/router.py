"""`penstock router --engines` beside another router, over the same mock engines, in one run.

    python -m benchmarks.router [--smg ~/.venv/bin/smg] [--streams 64] [--tokens 100]
                                [--requests 2000] [--api-workers 1 2] [--repeats 3]

Routers run one at a time, pinned to the first core (to as many as they have workers); engines and
the load share the last one. Requests a second and streamed tokens a second are on the wall clock,
where the load generator may be the limit on few cores; CPU time of the router's processes (psutil)
is what one core of it could do. `direct` is the load on an engine without a router.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httptools
import httpx
import psutil
import uvloop

from benchmarks.mock_engine import MODEL

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


@dataclass(frozen=True)
class Load:
    streams: int
    tokens: int
    requests: int
    prompt_bytes: int


class Client(asyncio.Protocol):
    """One connection that sends its requests one after the other."""

    def __init__(self, requests: list[bytes], done: asyncio.Future[int]) -> None:
        self._requests = requests
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self._events = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(self._requests.pop())

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._events += body.count(b"data: {")

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() != 200:
            self._fail(f"status {self._parser.get_status_code()}")
        elif self._requests:
            self._transport.write(self._requests.pop())
        elif not self._done.done():
            self._done.set_result(self._events)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"connection lost: {exc}")

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(RuntimeError(why))


def request(number: int, load: Load, stream: bool) -> bytes:
    """Sixteen conversations, each with a prefix of its own and a different last turn."""
    prefix = f"Conversation {number % 16}. " + TEXT * (load.prompt_bytes // len(TEXT))
    body = json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{prefix} Turn {number}."}],
            "max_tokens": load.tokens if stream else 16,
            "stream": stream,
        }
    ).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )


async def drive(port: int, per_connection: list[list[bytes]]) -> int:
    loop = asyncio.get_running_loop()
    waits = []
    for requests in per_connection:
        done: asyncio.Future[int] = loop.create_future()
        await loop.create_connection(lambda r=requests, d=done: Client(r, d), "127.0.0.1", port)
        waits.append(done)
    return sum(await asyncio.gather(*waits))


def cpu_s(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(t.user + t.system for t in times)


def measure(port: int, pid: int | None, load: Load) -> dict[str, float]:
    pids = [] if pid is None else _family(pid)
    result: dict[str, float] = {}
    whole = [
        [request(c + i * load.streams, load, False) for i in range(load.requests // load.streams)]
        for c in range(load.streams)
    ]
    num_requests = sum(map(len, whole))
    before_s, started_s = cpu_s(pids), time.perf_counter()
    uvloop.run(drive(port, whole))
    result["requests_per_s"] = num_requests / (time.perf_counter() - started_s)
    result["cpu_us_per_request"] = 1e6 * (cpu_s(pids) - before_s) / num_requests
    streams = [[request(c, load, True), request(c + 1, load, True)] for c in range(load.streams)]
    before_s, started_s = cpu_s(pids), time.perf_counter()
    events = uvloop.run(drive(port, streams))
    expected = 2 * load.streams * load.tokens
    assert events == expected, f"{events} events came of {expected}"
    result["tokens_per_s"] = events / (time.perf_counter() - started_s)
    result["cpu_us_per_token"] = 1e6 * (cpu_s(pids) - before_s) / events
    result["rss_mib"] = sum(psutil.Process(p).memory_info().rss for p in pids) / 2**20
    return result


def _family(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


@contextlib.contextmanager
def process(command: list[str], cores: list[int]) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_for(port: int, timeout_s: float = 60.0) -> None:
    """Until an answer comes through."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.HTTPError):
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            if httpx.post(url, json=body, timeout=2.0).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"nothing answers on port {port}")


def routers(options: argparse.Namespace, engines: list[str]) -> dict[str, tuple[list[str], int]]:
    """Command and number of cores, by name."""
    port = str(options.port)
    found: dict[str, tuple[list[str], int]] = {}
    for workers in options.api_workers:
        command = [sys.executable, "-m", "penstock.cli.main", "router", "--port", port]
        command += ["--engines", ",".join(engines), "--policy", options.policy, "--no-banner"]
        found[f"penstock x{workers}"] = ([*command, "--api-workers", str(workers)], workers)
    if options.smg is not None:
        command = [str(options.smg), "launch", "--host", "127.0.0.1", "--port", port]
        command += ["--worker-urls", *engines, "--policy", options.smg_policy]
        command += ["--prometheus-port", str(options.port + 1), "--log-level", "error"]
        found["smg"] = (command, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smg", type=Path, help="the smg command (pip install smg)")
    parser.add_argument("--smg-policy", default="cache_aware")
    parser.add_argument("--policy", default="kv-aware")
    parser.add_argument("--api-workers", type=int, nargs="+", default=[1])
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--prompt-bytes", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=18500)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    load = Load(options.streams, options.tokens, options.requests, options.prompt_bytes)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    ports = [options.port + 10 + n for n in range(options.engines)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    results: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        for port in ports:
            engine = [sys.executable, "-m", "benchmarks.mock_engine", "--port", str(port)]
            stack.enter_context(process([*engine, "--step-ms", str(options.step_ms)], cores[-1:]))
        for port in ports:
            wait_for(port)
        for _ in range(options.repeats):
            results.setdefault("direct", []).append(measure(ports[0], None, load))
            for name, (command, num_cores) in routers(options, urls).items():
                with process(command, cores[:num_cores]) as router:
                    wait_for(options.port)
                    measure(options.port, router.pid, Load(8, 10, 80, options.prompt_bytes))
                    results.setdefault(name, []).append(measure(options.port, router.pid, load))
    table = {
        name: {key: round(statistics.median(r[key] for r in rounds), 1) for key in rounds[0]}
        for name, rounds in results.items()
    }
    if options.json:
        print(json.dumps({"load": vars(load), "routers": table}, indent=2))
        return
    for name, row in table.items():
        print(f"{name:14}" + "".join(f"  {key} {value:>9,.1f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
