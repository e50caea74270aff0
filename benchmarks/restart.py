"""How soon an engine is back after kill -9, and what engines on one host take together.

    python -m benchmarks.restart [MODEL] [--repeats 5] [--instances 2] [--json FILE]

Two arrangements, each with private weights, shared ones (`--share-weights`), and these with a spare
process that has its imports behind it (`--spare-engine`):

* one instance, one stream: the engine is killed in the middle of the answer. What counts is the
  time from the signal to the next token of that stream, which its successor draws: the process
  starts, finds or reads the weights, makes room for KV, warms up, attaches, and computes the
  sequence again.
* several instances: what they take in memory, as the kernel divides it among who shares (PSS).

And the speed of a stream, since weights in shared memory may lie on smaller pages.
"""

from __future__ import annotations

import benchmarks.dev_packages  # noqa: F401  says what is missing

# isort: split
import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import httpx
import psutil
from tests.helpers.server import Server, running

from benchmarks.compare.checkpoint import make_model

FLAGS = ("--served-model-name", "m", "--kv-cache-memory-bytes", "256M", "--max-model-len", "2048")
MIB = 1 << 20
MODES = {
    "private": ("--share-weights=off",),
    "shared": (),
    "shared, spare": ("--spare-engine",),
}


@dataclass(frozen=True)
class Row:
    mode: str
    start_s: float
    #: From the signal to the next token of the stream that was interrupted.
    next_token_p50_s: float
    next_token_max_s: float
    #: Mean of one stream, undisturbed.
    tpot_ms: float
    #: Of all engines of `instances`: resident, and that divided among who shares.
    instances: int
    rss_mib: float
    pss_mib: float


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.restart", description=__doc__)
    default = Path(tempfile.gettempdir()) / "penstock-bench-0.6b"
    parser.add_argument("model", nargs="?", type=Path, default=default,
        help="random weights at Qwen3-0.6B dimensions by default, made once")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model = str(make_model(default) if options.model == default else options.model)
    rows = [measure(model, m, options.repeats, options.instances) for m in options.modes]
    for row in rows:
        print(json.dumps(asdict(row)))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measure(model: str, mode: str, repeats: int, instances: int) -> Row:
    flags = (*FLAGS, *MODES[mode])
    began_s = time.monotonic()
    with running(model, *flags) as server:
        start_s = time.monotonic() - began_s
        tpot_s = min(_tpot_s(server) for _ in range(3))
        gaps_s = [_interrupted_s(server) for _ in range(repeats)]
    with running(model, *flags, "--instances", str(instances)) as server:
        rss, pss = _memory(server, instances)
    return Row(
        mode,
        round(start_s, 3),
        round(statistics.median(gaps_s), 3),
        round(max(gaps_s), 3),
        round(1e3 * tpot_s, 2),
        instances,
        round(rss / MIB, 1),
        round(pss / MIB, 1),
    )


def _body(max_tokens: int) -> dict[str, Any]:
    return {
        "model": "m", "prompt": list(range(10, 74)), "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip


def _tpot_s(server: Server) -> float:
    times = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=_body(96), timeout=120) as r:
        times = [time.monotonic() for line in r.iter_lines() if line.startswith("data: {")]
    return (times[-1] - times[0]) / (len(times) - 1)


def _interrupted_s(server: Server) -> float:
    """Kill the engine after some tokens; how long the next one takes."""
    time.sleep(3.0)  # a spare, and huge pages, are made beside the serving
    struck_s = gap_s = 0.0
    (pid,) = _pids(server)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=_body(48), timeout=120) as r:
        chunks = 0
        for line in r.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunks += 1
            # What had left the engine before its death may still come.
            if struck_s and not gap_s and time.monotonic() - struck_s > 0.15:
                gap_s = time.monotonic() - struck_s
            if chunks == 24:
                os.kill(pid, SIGKILL)
                struck_s = time.monotonic()
        assert r.status_code == 200 and gap_s, "the stream was not interrupted"
    return gap_s


def _pids(server: Server) -> list[int]:
    instances = httpx.get(f"{server.url}/admin/cluster").json()["instances"]
    return [int(instance["pid"]) for instance in instances]


def _memory(server: Server, instances: int) -> tuple[int, int]:
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        states = [i["state"] for i in httpx.get(f"{server.url}/health").json()["instances"]]
        if states == ["active"] * instances:
            break
        time.sleep(0.1)
    time.sleep(5.0)
    found = [psutil.Process(pid).memory_full_info() for pid in _pids(server)]
    return sum(m.rss for m in found), sum(m.pss for m in found)


if __name__ == "__main__":
    main()
