"""What the simulator costs: real seconds, memory, and where they go; and what the leader costs.

    python -m benchmarks.simulator exact  [--instances 100  --rate 100  --minutes 10]
    python -m benchmarks.simulator scale  [--instances 1000 --rate 1000 --minutes 60]
    python -m benchmarks.simulator memory [--instances 1000 --rate 1000 --minutes 0.5]

Requests as long as those of Azure's conversation trace of 2023 (drawn from its lengths), Poisson
arrivals, on instances of one kind. `exact` simulates every step, `scale` runs of steps. The service
is timed at its entry points (messages by kind, timers, requests), with what the policies take; that
is what the leader of a real cluster of this size spends, without sockets and codecs. `memory` asks
tracemalloc what of the process was allocated by the service's code.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from penstock.loadgen.traces import TraceRequest
from penstock.simulator import experiment
from penstock.simulator.build import SERVICE, Deployment
from penstock.simulator.outcome import Outcome
from penstock.simulator.spec import ClusterSpec, PoolSpec

LENGTHS = Path(__file__).parent / "data" / "azure2023_conversation_lengths.csv"
SIZES = {"exact": (100, 100.0, 10.0), "scale": (1000, 1000.0, 60.0), "memory": (1000, 1000.0, 0.5)}
_CHUNK = 4096


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.simulator", description=__doc__)
    parser.add_argument("part", choices=list(SIZES))
    parser.add_argument("--instances", type=int)
    parser.add_argument("--rate", type=float, help="requests a second, of all instances together")
    parser.add_argument("--minutes", type=float, help="of traffic")
    parser.add_argument("--mode", choices=list(experiment.MODES))
    parser.add_argument("--hardware", default="h100:llama3.1-8b:bf16:tp1")
    parser.add_argument("--policy", default="slo-aware")
    parser.add_argument("--pd", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write what is printed, as JSON")
    args = parser.parse_args(arguments)
    instances, rate, minutes = SIZES[args.part]
    instances, rate = args.instances or instances, args.rate or rate
    minutes = args.minutes or minutes
    spec = ClusterSpec(
        pools=(PoolSpec(count=instances, hardware=args.hardware),), policy=args.policy, pd=args.pd
    )
    found = _memory if args.part == "memory" else _time
    mode = args.mode or ("exact" if args.part == "exact" else "scale")
    result = {
        "part": args.part, "instances": instances, "requests_per_s": rate, "minutes": minutes,
        "policy": args.policy, "pd": args.pd, "hardware": args.hardware, "seed": args.seed,
        "python": platform.python_version(), "machine": platform.processor(),
    } | found(spec, _requests(rate, 60.0 * minutes, args.seed), args.seed, mode)  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


def _requests(rate: float, duration_s: float, seed: int) -> Iterator[TraceRequest]:
    """Made as they are asked for."""
    lengths = np.loadtxt(LENGTHS, delimiter=",", skiprows=2, dtype=np.int64)
    draw = np.random.default_rng(seed)
    now = 0.0
    while True:
        gaps = draw.exponential(1.0 / rate, _CHUNK).tolist()
        rows = lengths[draw.integers(len(lengths), size=_CHUNK)].tolist()
        for gap_s, (input_tokens, output_tokens) in zip(gaps, rows):
            if now >= duration_s:
                return
            yield TraceRequest(now, input_tokens, output_tokens)
            now += gap_s


# --- time ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Timer:
    calls: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Timers:
    """CPU seconds in the service's entry points, by what came in; `policy` is a part of others."""

    by_part: dict[str, _Timer] = field(default_factory=dict)

    def around(self, call: Callable[..., Any], part: Callable[..., str]) -> Callable[..., Any]:
        clock = time.thread_time

        def timed(*args: Any, **named: Any) -> Any:
            began_s = clock()
            try:
                return call(*args, **named)
            finally:
                timer = self.by_part.setdefault(part(*args, **named), _Timer())
                timer.calls += 1
                timer.seconds += clock() - began_s

        return timed

    def attach(self, deployment: Deployment) -> None:
        core: Any = deployment.world.core(SERVICE)
        core.on_message = self.around(core.on_message, lambda peer, m, now: type(m).__name__)
        core.on_timer = self.around(core.on_timer, lambda now: "timer")
        core.submit = self.around(core.submit, lambda spec, now: "request")
        placement = core.placement
        placement._policy = self.around(placement._policy, lambda view, request: "policy")


def _time(
    spec: ClusterSpec, requests: Iterator[TraceRequest], seed: int, mode: str
) -> dict[str, Any]:
    timers = _Timers()
    outcome = experiment.run(spec, requests, seed=seed, mode=mode, prepare=timers.attach)
    num_requests = len(outcome.finish)
    parts = timers.by_part
    service_s = sum(t.seconds for part, t in parts.items() if part != "policy")
    return _of(outcome) | {
        "service_cpu_s": service_s,
        "service_us_per_request": 1e6 * service_s / num_requests,
        "service_parts": {
            part: {
                "calls": t.calls,
                "us_per_call": 1e6 * t.seconds / t.calls,
                "us_per_request": 1e6 * t.seconds / num_requests,
            }
            for part, t in sorted(parts.items(), key=lambda item: -item[1].seconds)
        },
    }


def _of(outcome: Outcome) -> dict[str, Any]:
    num_requests = len(outcome.finish)
    return {
        "requests": num_requests,
        "wall_s": outcome.wall_s,
        "cpu_s": outcome.cpu_s,
        "peak_rss_bytes": _peak_rss_bytes(),
        "events": outcome.events,
        "us_per_event": 1e6 * outcome.cpu_s / outcome.events,
        "us_per_request": 1e6 * outcome.cpu_s / num_requests,
        "simulated_s": outcome.end_of_run_s,
        "utilisation": float(outcome.utilisation.mean()),
        "output_tokens": int(outcome.output_tokens.sum()),
        "ttft_p50_s": float(np.nanmedian(outcome.ttft_s)),
        "tpot_p50_s": float(np.nanmedian(outcome.tpot_s)),
        "role_changes": len(outcome.role_changes),
        "handovers": outcome.handovers,
        "digest": outcome.digest,
    }


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# --- memory --------------------------------------------------------------------------------------


def _memory(
    spec: ClusterSpec, requests: Iterator[TraceRequest], seed: int, mode: str
) -> dict[str, Any]:
    """What the service had allocated at the last arrival, and what was for it (prompts)."""
    shots: list[tracemalloc.Snapshot] = []

    def to_the_end() -> Iterator[TraceRequest]:
        yield from requests
        shots.append(tracemalloc.take_snapshot())

    tracemalloc.start()
    outcome = experiment.run(spec, to_the_end(), seed=seed, mode=mode)
    tracemalloc.stop()
    by_file: dict[str, int] = {}
    for statistic in shots[0].statistics("filename"):
        name = statistic.traceback[0].filename
        if "penstock/service/" in name or name.endswith("loadgen/prompts.py"):
            by_file[name.rpartition("penstock/")[2]] = statistic.size
    largest = sorted(by_file.items(), key=lambda item: -item[1])[:12]
    return _of(outcome) | {"service_bytes": sum(by_file.values()), "by_file": dict(largest)}


if __name__ == "__main__":
    main()
