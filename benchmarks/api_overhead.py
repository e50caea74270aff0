"""What the HTTP API costs per streamed token: our application against a bare FastAPI SSE stub.

    python -m benchmarks.api_overhead [--streams 64] [--tokens 256] [--profile]

The API alone, without core and transport (`service_overhead` has those too). The server runs in a
process of its own, on one core, with an instance behind it that has its next token at once; a
client in this process reads raw bytes and counts events. Tokens per second of the server's own CPU
time are what one core could deliver; the stub sends the same number of events from a constant.
Ratios of one run count; the absolute figures are the machine's.
"""

from __future__ import annotations

import benchmarks.dev_packages  # noqa: F401  says what is missing

# isort: split
import argparse
import asyncio
import contextlib
import cProfile
import json
import multiprocessing
import os
import pstats
import resource
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from tests.helpers.fake_generator import FakeGenerator
from tests.helpers.live_fake import small_texts

from penstock.protocol.errors import PenstockError
from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.generation import GenerationSpec, TokenDelta

EVENT = b'data: {"id":"chatcmpl-0","choices":[{"index":0,"delta":{"content":" dog"}}]}\n\n'


class InstantGenerator(FakeGenerator):
    """Every stream has one token a turn of the loop, as from an engine that is never waited for."""

    def submit(self, spec: GenerationSpec) -> InstantStream:  # type: ignore[override]
        return InstantStream(spec.sampling.max_tokens, self.tokenizer.encode("dog", False)[-1])


class InstantStream:
    def __init__(self, num_tokens: int, token_id: int) -> None:
        self._left = num_tokens
        self._ids = [token_id]

    async def next(self) -> list[TokenDelta]:
        if not self._left:
            return []
        woken = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(woken.set_result, None)
        await woken  # what waiting for an engine's message costs at least
        self._left -= 1
        return [TokenDelta(0, self._ids, None if self._left else "length")]

    def cancel(self, choice: int | None = None) -> None:
        self._left = 0


def ours() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        texts = small_texts(Path(folder) / "m")
    generator = InstantGenerator(texts.tokenizer, max_model_len=1 << 20)
    return create_app(generator, texts, ApiConfig(("m",)))


def stub() -> Any:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        async def events() -> AsyncIterator[bytes]:
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(0)
                yield EVENT
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


APPS: dict[str, Callable[[], Any]] = {"ours": ours, "stub": stub}


def serve(name: str, listener: socket.socket, pipe: Any, profile: bool) -> None:
    """In the server's process: serve until told; "cpu" asks for its CPU seconds so far."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    config = uvicorn.Config(
        APPS[name](), loop="uvloop", http="httptools", log_level="error", access_log=False
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def asked() -> None:
            if pipe.recv() == "stop":
                server.should_exit = True
            else:
                used = resource.getrusage(resource.RUSAGE_SELF)
                pipe.send(used.ru_utime + used.ru_stime)

        loop.add_reader(pipe.fileno(), asked)
        await server.serve(sockets=[listener])

    profiler = cProfile.Profile() if profile else None
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        if profiler is not None:
            profiler.runcall(runner.run, run())
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        else:
            runner.run(run())


async def one_stream(port: int, num_tokens: int) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": True,
            "max_tokens": num_tokens,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    events = 0
    tail = b""
    while data := await reader.read(1 << 16):
        data = tail + data
        events += data.count(b"data: {")
        tail = data[-6:]
        events -= tail.count(b"data: {")
    writer.close()
    if b"HTTP" in tail:
        raise PenstockError("the server did not stream")
    return events


async def measure(port: int, streams: int, num_tokens: int) -> int:
    counts = await asyncio.gather(*(one_stream(port, num_tokens) for _ in range(streams)))
    if min(counts) < num_tokens:
        raise PenstockError(f"a stream of {num_tokens} tokens had {min(counts)} events")
    return streams * num_tokens


def bench(name: str, streams: int, num_tokens: int, profile: bool) -> float:
    """Tokens per CPU second of the server."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(name, listener, there, profile))
    process.start()
    try:
        port = listener.getsockname()[1]
        asyncio.run(measure(port, 8, 64))  # warm

        def cpu_s() -> float:
            here.send("cpu")
            return float(here.recv())

        before_s, started_s = cpu_s(), time.perf_counter()
        tokens = asyncio.run(measure(port, streams, num_tokens))
        wall_s, used_s = time.perf_counter() - started_s, cpu_s() - before_s
    finally:
        here.send("stop")
        process.join(10)
        process.kill()
        listener.close()
    per_core = tokens / used_s
    print(
        f"{name:>5}: {per_core:9,.0f} tokens/s of one core "
        f"({used_s / tokens * 1e6:5.1f} us each), {tokens / wall_s:9,.0f} tokens/s of wall time"
    )
    return per_core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--profile", action="store_true", help="of our server, by cProfile")
    args = parser.parse_args()
    found = {name: bench(name, args.streams, args.tokens, False) for name in ("stub", "ours")}
    print(f"ours / stub: {found['ours'] / found['stub']:.2f}")
    if args.profile:
        bench("ours", args.streams, args.tokens, True)


if __name__ == "__main__":
    main()
