"""`penstock router --engines` beside another router, over the same mock engines, in one run.

    python -m benchmarks.router [--smg ~/.venv/bin/smg] [--streams 64] [--tokens 100]
                                [--requests 2000] [--api-workers 1 2] [--repeats 3]

All routers stand ready and are measured in turn, `--repeats` times; a figure is the median of its
rounds. Routers are pinned to the first core (to as many as they have workers); engines and the load
share the last one. Requests and streamed tokens a second are on the wall clock, where the load
generator may be the limit on few cores; CPU time of the router's processes is what one core of it
could do. `direct` is the load on an engine without a router. Linux only (clocks of processes).
"""

from __future__ import annotations

import benchmarks.dev_packages  # noqa: F401  says what is missing

# isort: split
import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httptools
import httpx
import psutil
import uvloop

from benchmarks.mock_engine import MODEL
from penstock.cli.process import stop_with_parent

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
_EVENT = b"data: {"
#: For a router to answer its first request, and for one round of load.
_START_S = 60.0
_ROUND_S = 60.0


class LoadFailed(Exception):
    """What was asked for did not come."""


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
        #: The end of what has come of a body: an event's beginning may be split between two reads.
        self._tail = b""
        self._error = b""
        self.events = 0

    @property
    def left(self) -> int:
        return len(self._requests) + (not self._done.done())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(self._requests.pop())

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        seen = self._tail + body
        self.events += seen.count(_EVENT)
        self._tail = seen[1 - len(_EVENT) :]
        if b'"error"' in body:
            self._error = body

    def on_message_complete(self) -> None:
        self._tail = b""
        if self._parser.get_status_code() != 200 or self._error:
            status = self._parser.get_status_code()
            self._fail(f"status {status}: {self._error[-500:].decode(errors='replace')}")
            self._transport.abort()
        elif self._requests:
            self._transport.write(self._requests.pop())
        elif not self._done.done():
            self._done.set_result(self.events)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"connection lost: {exc}")

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(LoadFailed(why))


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
    """Events that came. Raises `LoadFailed`, with what is missing."""
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    waits: list[asyncio.Future[int]] = []
    for requests in per_connection:
        done: asyncio.Future[int] = loop.create_future()
        client = Client(requests, done)
        clients.append(client)
        waits.append(done)
        await loop.create_connection(lambda c=client: c, "127.0.0.1", port)
    await asyncio.wait(waits, timeout=_ROUND_S, return_when=asyncio.FIRST_EXCEPTION)
    failed = [done for done in waits if done.done() and done.exception() is not None]
    late = [client for client in clients if client.left]
    if late and not failed:
        raise LoadFailed(
            f"after {_ROUND_S:g} s {len(late)} of {len(clients)} connections wait for "
            f"{sum(c.left for c in late)} answers; {sum(c.events for c in clients)} events came"
        )
    return sum(done.result() for done in (*failed, *waits))


def cpu_s(pids: list[int]) -> float:
    """All threads of them, by the kernel's clocks of processes (clock_getcpuclockid(3))."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


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
    if events != expected:
        raise LoadFailed(f"{events} events came of {expected}")
    result["tokens_per_s"] = events / (time.perf_counter() - started_s)
    result["cpu_us_per_token"] = 1e6 * (cpu_s(pids) - before_s) / events
    result["rss_mib"] = sum(psutil.Process(p).memory_info().rss for p in pids) / 2**20
    return result


def _family(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


# --- processes -----------------------------------------------------------------------------------


class Child:
    """A process in a group of its own, which ends with us. What it says is kept in a file."""

    def __init__(self, command: list[str], cores: list[int], folder: str) -> None:
        self._said = Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
        self._name = Path(command[0]).name if "-m" not in command else command[2]

        def prepare() -> None:
            os.sched_setaffinity(0, cores)
            stop_with_parent()

        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=prepare,
            )

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def require(self) -> None:
        """Raises `LoadFailed` if it has ended."""
        if self.process.poll() is not None:
            raise LoadFailed(f"{self._name} ended ({self.process.returncode}): {self.said[-2000:]}")

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
                break
        with contextlib.suppress(ProcessLookupError):  # whoever it left behind
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def started(command: list[str], cores: list[int], folder: str) -> Iterator[Child]:
    child = Child(command, cores, folder)
    try:
        yield child
    finally:
        child.stop()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def port_said_by(child: Child) -> int:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        child.require()
        if child.said.endswith("\n"):
            return int(child.said)
        time.sleep(0.05)
    raise LoadFailed(f"a mock engine does not listen after {_START_S:g} s")


def wait_for(child: Child, port: int) -> None:
    """Until an answer comes through."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    found = "nothing"
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        child.require()
        try:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            answer = httpx.post(url, json=body, timeout=2.0)
            if answer.status_code == 200:
                return
            found = f"{answer.status_code} {answer.text[:300]}"
        except httpx.HTTPError as exc:
            found = repr(exc)
        time.sleep(0.2)
    raise LoadFailed(f"port {port} gives no answer after {_START_S:g} s ({found}): {child.said}")


@dataclass(frozen=True)
class Rival:
    name: str
    command: list[str]
    port: int
    num_cores: int = 1


def rivals(options: argparse.Namespace, engines: list[str]) -> list[Rival]:
    found = []
    for workers in options.api_workers:
        port = free_port()
        command = [sys.executable, "-m", "penstock.cli.main", "router", "--port", str(port)]
        command += ["--engines", ",".join(engines), "--policy", options.policy, "--no-banner"]
        command += ["--api-workers", str(workers)]
        found.append(Rival(f"penstock x{workers}", command, port, workers))
    if options.smg is not None:
        port = free_port()
        command = [str(options.smg), "launch", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--worker-urls", *engines, "--policy", options.smg_policy]
        command += ["--prometheus-port", str(free_port()), "--log-level", "error"]
        found.append(Rival("smg", command, port))
    return found


# --- the comparison ------------------------------------------------------------------------------

Table = dict[str, dict[str, float]]


def compare(options: argparse.Namespace, load: Load) -> Table:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    rounds: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        engine = [sys.executable, "-m", "benchmarks.mock_engine", "--port", "0"]
        engine += ["--step-ms", str(options.step_ms)]
        engines = [
            stack.enter_context(started(engine, cores[-1:], folder)) for _ in range(options.engines)
        ]
        ports = [port_said_by(child) for child in engines]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        measured: list[tuple[str, int, Child | None]] = [("direct", ports[0], None)]
        for rival in rivals(options, urls):
            run = started(rival.command, cores[: rival.num_cores], folder)
            child = stack.enter_context(run)
            wait_for(child, rival.port)
            measure(rival.port, None, Load(8, 10, 80, options.prompt_bytes))  # to warm it up
            measured.append((rival.name, rival.port, child))
        for _ in range(options.repeats):
            for name, port, router in measured:
                pid = None if router is None else router.process.pid
                try:
                    rounds.setdefault(name, []).append(measure(port, pid, load))
                except LoadFailed as exc:
                    for process in (*engines, *([] if router is None else [router])):
                        process.require()
                    said = "" if router is None else router.said[-2000:]
                    raise LoadFailed(f"{name}: {exc}\n{said}") from exc
    return {
        name: {key: statistics.median(r[key] for r in of_it) for key in of_it[0]}
        for name, of_it in rounds.items()
    }


def ratios(table: Table) -> Table:
    """Of each router to smg (where it ran) and to the load without a router."""
    found: Table = {}
    for name, row in table.items():
        for other in ("smg", "direct"):
            if name in (other, "direct") or other not in table:
                continue
            keys = [k for k in row if table[other][k] > 0]
            found[f"{name} / {other}"] = {key: row[key] / table[other][key] for key in keys}
    return found


def show(table: Table) -> None:
    keys = list(next(iter(table.values())))
    print(f"{'':22}" + "".join(f"{key:>20}" for key in keys))
    for name, row in table.items():
        print(f"{name:22}" + "".join(f"{row[key]:20,.1f}" for key in keys))
    for name, row in ratios(table).items():
        cells = (f"{row[key]:20.2f}" if key in row else f"{'':20}" for key in keys)
        print(f"{name:22}" + "".join(cells))


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if options.requests < options.streams:
        parser.error("--requests: at least one for each of --streams")
    load = Load(options.streams, options.tokens, options.requests, options.prompt_bytes)
    try:
        table = compare(options, load)
    except LoadFailed as exc:
        raise SystemExit(f"no figures: {exc}") from exc
    show(table)
    report = {"load": vars(load), "routers": table, "ratios": ratios(table)}
    print(json.dumps(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
