"""Is the simulator right? The same requests in it and on real processes.

    python -m benchmarks.simulator_validation [--only CASE ...] [--seconds 60] [--json FILE]

`penstock.simulator.real_time` runs the production core behind the production driver, sockets and
router, with a cost model for a device that takes its time on a real clock. Whatever then differs
from the simulator is what that leaves out: HTTP, tokenizers, Python's own time, and how exactly a
loaded machine keeps time. The cases `cpu-engine...` go further: `penstock serve` computes, and
what it has fitted to itself (`penstock costs`) is what the simulator runs.

Beside each case stand probes of the machine while it ran: how late a sleeping thread wakes, and
what a request takes that needs no engine.
"""

from __future__ import annotations

import benchmarks.dev_packages  # noqa: F401  says what is missing

# isort: split
import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from tests.helpers.real_time import real_time_cluster
from tests.helpers.server import running

from penstock.checkpoint import TOY
from penstock.cli import costs
from penstock.loadgen.live import Outcome, Shot, play
from penstock.loadgen.prompts import prompt_ids
from penstock.loadgen.traces import TraceRequest, read_trace
from penstock.service.report import ClusterReport
from penstock.simulator import experiment
from penstock.simulator.spec import ClusterSpec, PoolSpec

DATA = Path(__file__).parent / "data"
TRACES = {name: DATA / f"azure2023_{name}_2min.csv" for name in ("conversation", "code")}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`speed`: the trace comes so many times as fast."""

    name: str
    trace: str
    speed: float
    hardware: str
    count: int
    policy: str = "least-load"
    pd: str = "off"
    #: Whether the model's steps are long beside what Python itself needs for them.
    bounded: bool = True

    @property
    def spec(self) -> ClusterSpec:
        pool = PoolSpec(count=self.count, hardware=self.hardware)
        return ClusterSpec(pools=(pool,), policy=self.policy, pd=self.pd)

    @property
    def router_flags(self) -> tuple[str, ...]:
        pd = self.pd if self.pd in ("off", "auto") else f"static={self.pd}"
        return ("--policy", self.policy, "--pd", pd)


SLOW, FAST = "a100:llama3.1-70b:bf16:tp4", "h100:llama3.1-8b:fp8:tp1"
CASES = (
    Case(name="conversation", trace="conversation", speed=0.5, hardware=SLOW, count=4),
    Case(name="code", trace="code", speed=1.0, hardware=SLOW, count=4),
    Case(name="code-slo-aware", trace="code", speed=1.0, hardware=SLOW, count=4,
         policy="slo-aware", pd="auto"),
    Case(name="code-split", trace="code", speed=1.0, hardware=SLOW, count=4, policy="split",
         pd="3:1"),
    Case(name="short-steps", trace="conversation", speed=0.5, hardware=FAST, count=2,
         bounded=False),
)  # fmt: skip
#: Simulations of each case; the first is the one that is compared.
SEEDS = 5


def main() -> int:
    names = [case.name for case in (*CASES, *CPU_CASES)]
    parser = argparse.ArgumentParser(prog="benchmarks.simulator_validation", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals in each case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.name in options.only:
                found.append(validate(case, options.seconds, Path(folder)))
                print(words(found[-1]), flush=True)
        for cpu_case in CPU_CASES:
            if cpu_case.name in options.only:
                found.append(validate_cpu_engine(cpu_case, options.seconds, Path(folder)))
                print(words(found[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"cases": found}, indent=1) + "\n")
    return 0


def slice_of(trace: str, speed: float, seconds: float) -> list[TraceRequest]:
    """What arrives within so many seconds of our time."""
    faster = [replace(r, arrival_s=r.arrival_s / speed) for r in read_trace(TRACES[trace])]
    return [r for r in faster if r.arrival_s < seconds]


# --- cost models in real time --------------------------------------------------------------------


def validate(case: Case, seconds: float, folder: Path) -> dict[str, Any]:
    requests = slice_of(case.trace, case.speed, seconds)
    simulations = [experiment.run(case.spec, requests, seed=seed) for seed in range(SEEDS)]
    simulated = simulations[0]
    own = folder / case.name
    own.mkdir()
    with real_time_cluster(own, case.hardware, case.count, router=case.router_flags) as router:
        before = busy_s(report_of(router.url))
        with Probes(router.url) as probes:
            outcomes = replay(router.url, requests)
        report = report_of(router.url)
    busy = {name: s - before[name] for name, s in busy_s(report).items()}
    return {
        "case": case.name,
        "hardware": f"{case.count} x {case.hardware}",
        "policy": f"{case.policy}, pd {case.pd}",
        "steps_are_long": case.bounded,
        "requests": len(requests),
        "seconds": seconds,
        **compare(outcomes, simulated),
        "spread_of_simulations": spread(simulations),
        "busy_s_by_instance": {
            name: [round(busy[name], 2), round(float(s), 2)]
            for name, s in zip(simulated.instances, simulated.busy_s)
        },
        "handovers": [report.totals.handovers, simulated.handovers],
        "probes": probes.result(),
    }


def replay(url: str, requests: Sequence[TraceRequest], model: str = "toy") -> list[Outcome]:
    """By the clock of the client. Raises `RuntimeError` for one that fails."""
    shots = [
        Shot(
            r.arrival_s,
            {
                "model": model,
                "prompt": prompt_ids(r, number),
                "max_tokens": r.output_tokens,
                "ignore_eos": True,
                "seed": number,
            },
        )
        for number, r in enumerate(requests)
    ]

    async def all_of_them() -> list[Outcome]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as http:
            return (await play(http, shots))[0]

    outcomes = asyncio.run(all_of_them())
    if failed := [o.error for o in outcomes if o.error]:
        raise RuntimeError(f"{len(failed)} requests failed, the first with: {failed[0]}")
    return outcomes


def report_of(url: str) -> ClusterReport:
    response = httpx.get(f"{url}/admin/cluster", timeout=30.0)
    return msgspec.json.decode(response.content, type=ClusterReport)


def busy_s(report: ClusterReport) -> dict[str, float]:
    """Seconds that each instance has computed since its start."""
    return {
        i.name: (i.steps.mean_s or 0.0) * i.steps.count
        for i in report.instances
        if i.steps is not None
    }


def compare(outcomes: Sequence[Outcome], simulated: experiment.Outcome) -> dict[str, Any]:
    """Times in ms, of real processes and of the simulator; differences relative to the former."""
    several = np.array([o.output_tokens > 1 for o in outcomes])
    pairs = {
        "ttft": (np.array([o.ttft_s for o in outcomes]), simulated.ttft_s),
        "tpot": (
            np.array([o.tpot_s for o in outcomes if o.tpot_s is not None]),
            simulated.tpot_s[several],
        ),
    }
    found: dict[str, Any] = {
        "completed": [
            len(outcomes),
            sum(f in ("length", "stop") for f in simulated.finish),
        ],
        "output_tokens": [
            sum(o.output_tokens for o in outcomes),
            int(simulated.output_tokens.sum()),
        ],
        "sent_late_p99_ms": _ms(np.quantile([o.late_s for o in outcomes], 0.99)),
    }
    for name, (real_s, simulated_s) in pairs.items():
        for percent in (50, 90):
            real, ours = (float(np.percentile(v, percent)) for v in (real_s, simulated_s))
            found[f"{name}_p{percent}_ms"] = [_ms(real), _ms(ours)]
            found[f"{name}_p{percent}_difference"] = round(ours / real - 1, 4)
        # Two tokens that came in one piece have no time between them.
        told = real_s > 0
        each = np.abs(simulated_s[told] / real_s[told] - 1)
        found[f"{name}_of_each_request_median"] = round(float(np.median(each)), 4)
    return found


def spread(simulations: Sequence[experiment.Outcome]) -> dict[str, list[float]]:
    """Least and most of the percentiles over seeds, which only decide by how many microseconds
    messages are late: how far off two equally right answers may be."""
    found = {}
    for name in ("ttft", "tpot"):
        for percent in (50, 90):
            values = [
                float(np.nanpercentile(getattr(s, f"{name}_s"), percent)) for s in simulations
            ]
            found[f"{name}_p{percent}_ms"] = [_ms(min(values)), _ms(max(values))]
    return found


def _ms(seconds: float) -> float:
    return round(1e3 * float(seconds), 3)


# --- the CPU engine ------------------------------------------------------------------------------

CPU_FLAGS = ("--max-num-seqs", "16", "--num-threads", "1", "--max-num-batched-tokens", "256")


@dataclass(frozen=True, kw_only=True)
class CpuCase:
    """Lengths of the conversation trace are divided, to suit a CPU."""

    name: str
    #: Of config.json, in place of the toy's, with random weights; none: the toy itself.
    dimensions: dict[str, int] = field(default_factory=dict)
    speed: float
    shorter: int


CPU_CASES = (
    CpuCase(
        name="cpu-engine",
        dimensions={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "num_key_value_heads": 4,
        },
        speed=0.1,
        shorter=8,
    ),
    CpuCase(name="cpu-engine-toy", speed=0.3, shorter=4),
)  # fmt: skip


def validate_cpu_engine(case: CpuCase, seconds: float, folder: Path) -> dict[str, Any]:
    """One instance that computes. It is fitted while it does a first stretch of the trace; the
    comparison is about another one."""
    first, second = _two_stretches(case, seconds)
    model = _checkpoint(case, folder / case.name)
    dummy = ("--load-format", "dummy") if case.dimensions else ()
    with running(model, *CPU_FLAGS, *dummy, "--served-model-name", "toy") as server:
        replay(server.url, first)
        fitted = costs.as_file(costs.choose(report_of(server.url).instances, None))
        before = busy_s(report_of(server.url))
        with Probes(server.url) as probes:
            outcomes = replay(server.url, second)
        busy = busy_s(report_of(server.url))
    path = folder / f"{case.name}.json"
    path.write_text(json.dumps(fitted))
    pool = PoolSpec(
        count=1, hardware=str(path), max_num_seqs=16, max_num_batched_tokens=256,
        max_model_len=2048,
    )  # fmt: skip
    spec = ClusterSpec(pools=(pool,), policy="least-load", pd="off")
    simulations = [experiment.run(spec, second, seed=seed) for seed in range(SEEDS)]
    simulated = simulations[0]
    return {
        "case": case.name,
        "hardware": f"{case.dimensions or 'the toy'} on this CPU, one thread",
        "policy": "least-load, pd off",
        "steps_are_long": bool(case.dimensions),
        "requests": len(second),
        "seconds": seconds,
        "fitted": fitted,
        **compare(outcomes, simulated),
        "spread_of_simulations": spread(simulations),
        "busy_s_by_instance": {
            name: [round(s - before[name], 2), round(float(simulated.busy_s[0]), 2)]
            for name, s in busy.items()
        },
        "probes": probes.result(),
    }


def _two_stretches(case: CpuCase, seconds: float) -> tuple[list[TraceRequest], list[TraceRequest]]:
    whole = [
        replace(
            r,
            input_tokens=min(r.input_tokens // case.shorter + 1, 1024),
            output_tokens=min(r.output_tokens // case.shorter + 1, 256),
        )
        for r in slice_of("conversation", case.speed, 2 * seconds)
    ]
    first = [r for r in whole if r.arrival_s < seconds]
    rest = whole[len(first) :]
    return first, [replace(r, arrival_s=r.arrival_s - seconds) for r in rest]


def _checkpoint(case: CpuCase, folder: Path) -> str:
    """The toy, or its tokenizer with a larger network."""
    if not case.dimensions:
        return "toy"
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text()) | case.dimensions
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# --- probes --------------------------------------------------------------------------------------


@dataclass
class Probes:
    """While it is entered: how late a thread wakes that sleeps for 10 ms, and how long `/health`
    takes to answer on a connection that stands."""

    url: str
    woke_late_s: list[float] = field(default_factory=list)
    answered_in_s: list[float] = field(default_factory=list)

    def __enter__(self) -> Probes:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with (
            httpx.Client(base_url=self.url, timeout=30.0) as http,
            contextlib.suppress(httpx.TransportError),
        ):
            while not self._ended.is_set():
                for _ in range(50):
                    began_s = time.perf_counter()
                    time.sleep(0.01)
                    self.woke_late_s.append(time.perf_counter() - began_s - 0.01)
                began_s = time.perf_counter()
                http.get("/health")
                self.answered_in_s.append(time.perf_counter() - began_s)

    def result(self) -> dict[str, Any]:
        def both(values_s: list[float]) -> list[float]:
            return [_ms(v) for v in np.percentile(values_s, (50, 90))]

        return {
            "woke_late_p50_p90_ms": both(self.woke_late_s),
            "health_p50_p90_ms": both(self.answered_in_s),
            "load_average_1min": round(os.getloadavg()[0], 2),
            "cpus": os.cpu_count(),
        }


def words(found: dict[str, Any]) -> str:
    lines = [
        f"{found['case']}: {found['requests']} requests in {found['seconds']:g} s, "
        f"{found['hardware']}, {found['policy']}",
        f"{'':<12}{'real':>12}{'simulated':>12}{'difference':>12}   by seed",
    ]
    for name in ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90"):
        real, ours = found[f"{name}_ms"]
        difference = f"{100 * found[f'{name}_difference']:+.1f}%"
        least, most = found["spread_of_simulations"][f"{name}_ms"]
        seeds = f"{least:.1f} to {most:.1f} ms"
        lines.append(f"{name:<12}{real:>9.1f} ms{ours:>9.1f} ms{difference:>12}   {seeds}")
    lines += [
        f"each request: TTFT {100 * found['ttft_of_each_request_median']:.1f}%, "
        f"TPOT {100 * found['tpot_of_each_request_median']:.1f}% off in the median",
        f"completed {found['completed']}, tokens {found['output_tokens']}, busy seconds "
        f"{found['busy_s_by_instance']}",
        f"probes: {found['probes']}; sent late (p99) {found['sent_late_p99_ms']} ms",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
