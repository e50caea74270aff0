"""What lies between two steps, and what placing threads changes.

    python -m benchmarks.overlap [--models toy 0.6b] [--batches 1 16] [--tokens 128]
    python -m benchmarks.overlap --map-at-start ...            # nothing is mapped ahead
    python -m benchmarks.overlap --http [--binds none auto 0-1] [--streams 4] [--repeats 3]

The first form runs an engine in a process of its own, as `penstock serve` does, and drives it over
the protocol: medians of step and gap while there was work, and their ratio (the targets: gap below
3 % of the step at 0.6B, below 15 % with the toy), beside what mapping took. The second starts
whole servers, one for each `--cpu-bind`, all resident, and loads them in turn with streams over
HTTP: time per output token as a client sees it, and the engine's own share of gaps. "0.6b" is
Qwen3-0.6B's dimensions with random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from penstock.checkpoint import resolve

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
    "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
    "eos_token_id": 2,
}  # fmt: skip
PROMPT_TOKENS = 128
MAP_AT_START = "OVERLAP_MAP_AT_START"


def flags_of(model: str, scratch: Path) -> list[str]:
    """The words of the command line that name the model."""
    if model != "0.6b":
        return [model]
    folder = scratch / "qwen3-0.6b-dimensions"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(QWEN3_06B))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(resolve("toy").path / name, folder / name)
    return [str(folder), "--load-format=dummy", "--dtype=bfloat16"]


# --- the engine's process -------------------------------------------------------------------------


def engine(arguments: list[str]) -> int:
    """`penstock worker`, writing down each step: [step_s, gap_s, whether there was work]."""
    from penstock.cli.worker import worker_config
    from penstock.engine import step_counts
    from penstock.engine.instance import run_worker
    from penstock.engine.memory.premap import Premapper

    out, *rest = arguments
    if os.environ.get(MAP_AT_START):
        Premapper.untouched = lambda *_: []  # type: ignore[method-assign]
    steps: list[tuple[float, float, bool, int, float]] = []
    observe = step_counts.StepCounts.observe

    def observed(self: Any, result: Any, follows: bool) -> None:
        maps = result.maps
        steps.append((result.compute_s, result.gap_s, follows, maps.ahead, maps.at_start_s))
        observe(self, result, follows)

    step_counts.StepCounts.observe = observed  # type: ignore[method-assign]
    try:
        return run_worker(worker_config(rest))
    finally:
        Path(out).write_text(json.dumps(steps))


async def drive(address: str, num_streams: int, num_tokens: int) -> None:
    """Decode `num_streams` sequences together, then let go."""
    from penstock.protocol.errors import EngineUnavailable
    from penstock.protocol.request import SamplingParams
    from penstock.service.core import ServiceCore, ServiceCoreConfig
    from penstock.service.driver import ServiceDriver
    from penstock.service.generation import GenerationSpec

    attached = asyncio.Event()
    core = ServiceCore(ServiceCoreConfig(name="bench", incarnation=time.time_ns()))
    driver = ServiceDriver(core, on_active=lambda _: attached.set())
    driver.connect("engine-0", address)
    await attached.wait()

    async def one(number: int) -> None:
        prompt = [5 + (number * 31 + i) % 1000 for i in range(PROMPT_TOKENS)]
        sampling = SamplingParams(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True, seed=number
        )
        stream = driver.submit(GenerationSpec(f"r{number}", prompt, sampling))
        while await stream.next():
            pass

    await asyncio.gather(*(one(number) for number in range(num_streams)))
    driver.close(EngineUnavailable("done"))


def measure(model: str, num_streams: int, options: argparse.Namespace, scratch: Path) -> None:
    address, out = f"ipc://{scratch}/overlap.sock", scratch / "steps.json"
    command = [
        *(sys.executable, "-m", "benchmarks.overlap", "--engine", str(out)),
        *flags_of(model, scratch), f"--address={address}", "--no-enable-prefix-caching",
        "--max-model-len=1024", "--kv-cache-memory-bytes=512M", *options.flags,
    ]  # fmt: skip
    environment = os.environ | ({MAP_AT_START: "1"} if options.map_at_start else {})
    with ended(subprocess.Popen(command, env=environment)):
        asyncio.run(drive(address, num_streams, options.tokens))
    steps = json.loads(out.read_text())
    # Skip warm-up and the prompts: what is left are decode steps one after the other.
    steps = [step for step in steps[len(steps) // 4 :] if step[2]]
    step_ms = [1e3 * step for step, *_ in steps]
    gap_ms = [1e3 * gap for _, gap, *_ in steps]
    median, gap = statistics.median(step_ms), statistics.median(gap_ms)
    at_start_ms = 1e3 * (steps[-1][4] - steps[0][4])
    print(
        f"{model:5} x{num_streams:<3} step {median:7.2f} ms   gap {gap:7.3f} ms "
        f"(p90 {sorted(gap_ms)[len(gap_ms) * 9 // 10]:.3f})   "
        f"gap/step {gap / median:6.2%} (of the sums {sum(gap_ms) / sum(step_ms):6.2%})   "
        f"maps ahead {steps[-1][3] - steps[0][3]}, at the start {at_start_ms:.2f} ms in all",
        flush=True,
    )


# --- servers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def stream(http: httpx.AsyncClient, number: int, num_tokens: int) -> float:
    """Seconds per output token after the first, as the client sees them come."""
    prompt = [5 + (number * 31 + i) % 1000 for i in range(PROMPT_TOKENS)]
    body = {"model": "m", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True,
            "temperature": 0, "stream": True}  # fmt: skip
    times = []
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return (times[-1] - times[0]) / (num_tokens - 1)


async def load(url: str, num_streams: int, num_tokens: int) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        found = await asyncio.gather(*(stream(http, n, num_tokens) for n in range(num_streams)))
    return statistics.median(found)


def counters(url: str) -> dict[str, float]:
    """The engine's totals: step and gap seconds."""
    found = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("penstock:engine_step_"):
            found[line.partition("{")[0].removeprefix("penstock:")] = float(line.rsplit(" ", 1)[1])
    return found


def over_http(model: str, options: argparse.Namespace, scratch: Path) -> None:
    urls = {}
    with contextlib.ExitStack() as stack:
        for number, bind in enumerate(options.binds):
            port = options.port + number
            command = [
                *(sys.executable, "-m", "penstock.cli.main", "serve", *flags_of(model, scratch)),
                *("--served-model-name", "m", f"--port={port}", "--no-banner", "--log-level=error"),
                *("--max-model-len=1024", "--kv-cache-memory-bytes=256M", f"--cpu-bind={bind}"),
                *options.flags,
            ]
            stack.enter_context(ended(subprocess.Popen(command, stdin=subprocess.DEVNULL)))
            urls[bind] = f"http://127.0.0.1:{port}"
        for url in urls.values():
            wait_for(url)
            asyncio.run(load(url, options.streams, 16))
        rounds: list[dict[str, tuple[float, float]]] = []
        for repeat in range(options.repeats):
            order = list(urls) if repeat % 2 == 0 else list(reversed(urls))
            rounds.append({bind: one_load(urls[bind], options) for bind in order})
    base = options.binds[0]
    for bind in urls:
        tpot_ms = statistics.median(r[bind][0] for r in rounds) * 1e3
        ratio = statistics.median(r[bind][0] / r[base][0] for r in rounds)
        share = statistics.median(r[bind][1] for r in rounds)
        print(
            f"{model:5} --cpu-bind {bind:6} {options.streams} streams: {tpot_ms:7.2f} ms a token, "
            f"x {ratio:.3f} of {base} in the same round; gaps {share:.2%} of the steps",
            flush=True,
        )


def one_load(url: str, options: argparse.Namespace) -> tuple[float, float]:
    before = counters(url)
    tpot_s = asyncio.run(load(url, options.streams, options.tokens))
    time.sleep(1.0)  # heartbeats carry the counters
    after = counters(url)
    gap_s, step_s = (
        after[f"engine_step_{name}_total"] - before[f"engine_step_{name}_total"]
        for name in ("gap_seconds", "seconds")
    )
    return tpot_s, gap_s / step_s


def wait_for(url: str, timeout_s: float = 180.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"nothing answers at {url}")


def main() -> int:
    if sys.argv[1:2] == ["--engine"]:
        return engine(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["toy", "0.6b"])
    add("--batches", nargs="+", type=int, default=[1, 16])
    add("--tokens", type=int, default=128)
    add("--map-at-start", action="store_true")
    add("--http", action="store_true")
    add("--binds", nargs="+", default=["none", "auto"])
    add("--streams", type=int, default=4)
    add("--repeats", type=int, default=5)
    add("--port", type=int, default=18500)
    add("flags", nargs="*", help="for the engine, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            if options.http:
                over_http(model, options, Path(folder))
            else:
                for num_streams in options.batches:
                    measure(model, num_streams, options, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
