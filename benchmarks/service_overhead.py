"""Streamed tokens a second through HTTP, with an engine that answers at once.

    python -m benchmarks.service_overhead [--streams 64] [--tokens 400] [--repeats 3]

The service is pinned to one core; engine and client share the other. Two figures: the rate on the
wall clock (the client may be the limit on two cores), and tokens per second of the service's own
CPU time, which is what one core of service can do. A bare FastAPI stub that streams the same number
of chunks is measured in the same run and is the ceiling for this HTTP stack.
"""

from __future__ import annotations

import benchmarks.dev_packages  # noqa: F401  says what is missing

# isort: split
import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

STUB = """
import json, sys, uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
app = FastAPI()
@app.get("/health")
def health(): return {}
@app.post("/v1/completions")
async def completions(body: dict):
    async def chunks():
        for i in range(body["max_tokens"]):
            yield "data: " + json.dumps({"choices": [{"index": 0, "text": " word"}]}) + "\\n\\n"
        yield "data: [DONE]\\n\\n"
    return StreamingResponse(chunks(), media_type="text/event-stream")
uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", log_level="warning")
"""


async def one_stream(port: int, body: bytes) -> int:
    """Chunks received; a raw client, so that it costs less than what it measures."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    writer.write(head + body)
    count, tail = 0, b""
    while data := await reader.read(1 << 18):
        data = tail + data
        count += data.count(b"data: {")
        tail = data[-6:] if not data.endswith(b"\n") else b""
    writer.close()
    return count


async def load(port: int, streams: int, tokens: int) -> int:
    def body(number: int) -> bytes:
        prompt = [(13 * number + i) % 1000 + 300 for i in range(64)]
        return json.dumps(
            {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
        ).encode()

    counts = await asyncio.gather(*(one_stream(port, body(i)) for i in range(streams)))
    return sum(counts)


def measure(port: int, pid: int, streams: int, tokens: int) -> tuple[float, float, float]:
    """Tokens a second of wall time, and of the server's CPU time; chunks for each token (tokens
    that wait together share one)."""
    process = psutil.Process(pid)
    before = process.cpu_times()
    started_s = time.perf_counter()
    chunks = asyncio.run(load(port, streams, tokens))
    wall_s = time.perf_counter() - started_s
    after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    assert chunks > streams, "the server did not stream"
    total = streams * tokens
    return total / wall_s, total / cpu_s, chunks / total


@contextlib.contextmanager
def process(command: list[str], core: int) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    os.sched_setaffinity(child.pid, {core})
    try:
        yield child
    finally:
        child.terminate()
        child.wait(15)


def wait_for(port: int, timeout_s: float = 60.0) -> None:
    import httpx

    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"nothing answers on port {port}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=18400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    mine, servers = cores[-1], cores[0]
    os.sched_setaffinity(0, {mine})
    port, stub_port = options.port, options.port + 1
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/instant.sock"
        engine = [sys.executable, "-m", "benchmarks.instant_engine", "--address", address]
        stub_file = Path(folder) / "stub.py"
        stub_file.write_text(STUB)
        serve = [
            *(sys.executable, "-m", "penstock.cli.main", "serve", "toy", "--port", str(port)),
            *("--engine-address", address, "--no-banner"),
        ]
        stub = [sys.executable, str(stub_file), str(stub_port)]
        with (
            process(engine, mine),
            process(serve, servers) as service,
            process(stub, servers) as bare,
        ):
            wait_for(port)
            wait_for(stub_port)
            measure(port, service.pid, 8, 50)
            measure(stub_port, bare.pid, 8, 50)
            ours, bares = [], []
            for _ in range(options.repeats):
                bares.append(measure(stub_port, bare.pid, options.streams, options.tokens))
                ours.append(measure(port, service.pid, options.streams, options.tokens))
    result = {
        "streams": options.streams,
        "tokens": options.tokens,
        "service_tokens_per_wall_s": statistics.median(o[0] for o in ours),
        "service_tokens_per_cpu_s": statistics.median(o[1] for o in ours),
        "service_chunks_per_token": statistics.median(o[2] for o in ours),
        "stub_tokens_per_wall_s": statistics.median(b[0] for b in bares),
        "stub_tokens_per_cpu_s": statistics.median(b[1] for b in bares),
    }
    result["ratio_to_stub_cpu"] = (
        result["service_tokens_per_cpu_s"] / result["stub_tokens_per_cpu_s"]
    )
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:28} {value:12,.2f}" if isinstance(value, float) else f"{name:28} {value:12,}")


if __name__ == "__main__":
    main()
