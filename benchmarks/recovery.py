"""What a crash costs those whose answers were under way, on the simulator: ours against cancel and
retry.

    python -m benchmarks.recovery [--seeds 8] [--every 4] [--speed 10] [--loops 2] [--json FILE]

Eight instances (h100:llama3.1-8b:bf16), two minutes of Azure's conversation trace of 2023, sped up
and repeated; every few seconds the process of an instance dies, and is back after `--restart`
seconds. A figure is the median over the seeds, with the least and the greatest of them:

* *resume*: the service goes on from its journal, wherever and however that is predicted to be
  fastest;
* *retry*: what other routers do. The service gives up what ran on a lost instance with an error,
  and the client sends its whole request again; the detection is the same. A token is *new* once
  the answer is longer than what the client had before the crash (the trace's answers do not depend
  on their text).

Detection is *at once* (a supervisor sees the process end) or by *silence* (heartbeats stay away).
`kv` says what may come back otherwise than by computing: `none` (no index of who holds what),
`peers`, or `peers+host` (and a tier in host memory on each instance).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from penstock.loadgen.prompts import prompt_ids
from penstock.loadgen.traces import TraceRequest, read_trace
from penstock.protocol.errors import PenstockError
from penstock.protocol.request import SamplingParams
from penstock.service.explain import PlacementRecord
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.service.journal import Entry
from penstock.simulator.build import SERVICE, Deployment, build
from penstock.simulator.experiment import MODES, WARM_UP_S
from penstock.simulator.spec import ClusterSpec, PoolSpec

TRACE = Path(__file__).parent / "data" / "azure2023_conversation_2min.csv"
HARDWARE, COUNT = "h100:llama3.1-8b:bf16", 8
HOST_KV_TOKENS = 400_000
#: From a client that is told of the error to its new request at the service.
CLIENT_S = 0.001
WAYS = ("recompute", "restore", "fetch")


@dataclass(frozen=True)
class Setup:
    pd: str
    kv: str
    detection: str
    how: str


@dataclass(frozen=True)
class Row:
    """What came of one setup under one seed."""

    pd: str
    kv: str
    detection: str
    how: str
    seed: int
    requests: int
    failed: int
    crashes: int
    interrupted: int
    #: To the next token of any kind, which for a retry is the first one over again.
    token_p50_s: float
    token_p99_s: float
    #: To the next new token: from the crash, and from where the service knew.
    next_p50_s: float
    next_p99_s: float
    known_p50_s: float
    known_p99_s: float
    #: Of all interrupted ones: tokens computed again, of prompts and of answers.
    recomputed_tokens: int
    recomputed_tokens_each: float
    #: How they went on (resume only), and actual over predicted time to the next token, summed.
    ways: dict[str, int]
    actual_over_predicted: float | None


@dataclass(slots=True)
class Hit:
    """One answer that a crash has interrupted."""

    entry: Entry
    crashed_s: float
    known_s: float = np.nan
    token_s: float = np.nan
    next_s: float = np.nan

    def placement(self) -> PlacementRecord | None:
        """The one that followed, with which it came to a token."""
        since_s = self.crashed_s - self.entry.accepted_s
        for placement in self.entry.record.placements:
            late = placement.at_s >= since_s and placement.because.startswith("moved")
            if late and placement.actual_ttft_s is not None:
                return placement
        return None


class Caller:
    """Sends one request, again if it comes to an error, and notes when its answer grows."""

    def __init__(self, run: Run, number: int, request: TraceRequest) -> None:
        self._run, self._number, self._request = run, number, request
        self._attempt = 0
        self._tokens = 0
        #: As many as it has ever had.
        self._most = 0
        self.hits: list[Hit] = []
        self.finish = ""

    @property
    def name(self) -> str:
        return f"{self._number}.{self._attempt}"

    def send(self) -> None:
        sampling = SamplingParams(max_tokens=self._request.output_tokens, ignore_eos=True)
        spec = GenerationSpec(self.name, prompt_ids(self._request, self._number), sampling)
        self._run.callers[self.name] = self
        self._run.deployment.world.submit_now(SERVICE, spec, self)

    def take(self, delta: TokenDelta) -> None:
        now = self._run.deployment.world.now
        if delta.ids:
            if self._attempt and not self._tokens:
                again = self._request.input_tokens - (delta.cached_tokens or 0)
                self._run.recomputed_tokens += again + self._most
            for hit in self.hits:
                if np.isnan(hit.token_s) and not np.isnan(hit.known_s):
                    hit.token_s = now
            self._tokens += len(delta.ids)
            if self._tokens > self._most:
                self._most = self._tokens
                for hit in self.hits:
                    if np.isnan(hit.next_s):
                        hit.next_s = now
        if delta.finish == "error" and self._run.setup.how == "retry":
            self._attempt += 1
            self._tokens = 0
            for hit in self.hits:
                if np.isnan(hit.known_s):
                    hit.known_s = now
            self._run.deployment.world.at(now + CLIENT_S, self.send)
        elif delta.finish is not None:
            assert not self.finish, "a second end"
            self.finish = delta.finish

    def refused(self, error: PenstockError) -> None:
        self.finish = error.info().code


class Run:
    def __init__(
        self, setup: Setup, trace: Sequence[TraceRequest], seed: int, every_s: float, back_s: float
    ) -> None:
        self.setup, self._back_s = setup, back_s
        self.deployment: Deployment = build(_spec(setup), seed, MODES["exact"])
        if setup.how == "retry":
            # A placement that is lost ends the request with an error, which its client sees.
            placement = self.deployment.service.placement
            placement._config = replace(placement._config, max_moves=0)
        self.callers: dict[str, Caller] = {}
        self.recomputed_tokens = 0
        self.num_crashes = 0
        self._unknown: list[tuple[str, list[Hit]]] = []
        self._draw = random.Random(seed)
        world = self.deployment.world
        world.watch(self._look)
        for number, request in enumerate(trace):
            caller = Caller(self, number, request)
            world.at(WARM_UP_S + request.arrival_s, caller.send)
        last_s = WARM_UP_S + trace[-1].arrival_s
        for at_s in np.arange(WARM_UP_S + every_s, last_s, every_s):
            world.at(float(at_s) + self._draw.random() * 0.5, self._crash)
        world.run(last_s)
        while len(self.deployment.service.journal):
            world.run(world.now + 1.0)
        world.run(world.now + 1.0)

    @property
    def hits(self) -> Iterator[Hit]:
        for caller in dict.fromkeys(self.callers.values()):
            yield from caller.hits

    def _crash(self) -> None:
        world, service = self.deployment.world, self.deployment.service
        living = [n for n in self.deployment.instances if world.lives(n)]
        busy = [n for n in living if service.instances[n].entries]
        if len(living) < 3 or not busy:
            return
        name = self._draw.choice(busy)
        hits = []
        for entry in service.instances[name].entries.values():
            hits.append(Hit(entry, world.now))
            self.callers[entry.request_id].hits.append(hits[-1])
        self.num_crashes += 1
        self._unknown.append((name, hits))
        world.at(world.now + self._back_s, lambda: self.deployment.start_again(name))
        world.kill(name, noticed_by=SERVICE if self.setup.detection == "at once" else None)
        self._look(SERVICE)

    def _look(self, name: str) -> None:
        """Has the service noticed by now?"""
        if not self._unknown or name != SERVICE:
            return
        service, still = self.deployment.service, []
        for lost, hits in self._unknown:
            if service.instances[lost].state in ("active", "suspect"):
                still.append((lost, hits))
                continue
            for hit in hits:
                if np.isnan(hit.known_s):
                    hit.known_s = self.deployment.world.now
        self._unknown = still


def _spec(setup: Setup) -> ClusterSpec:
    pool = PoolSpec(
        count=COUNT,
        hardware=HARDWARE,
        host_kv_tokens=HOST_KV_TOKENS if "host" in setup.kv else 0,
    )
    # Apart always, or the prompts of what decodes would be where it decodes.
    policy = "slo-aware" if setup.pd == "off" else "split"
    return ClusterSpec(pools=(pool,), pd=setup.pd, policy=policy, kv_index=setup.kv != "none")


def measure(
    setup: Setup, trace: Sequence[TraceRequest], seed: int, every_s: float, back_s: float
) -> Row:
    began_s = time.process_time()
    run = Run(setup, trace, seed, every_s, back_s)
    hits = list(run.hits)
    ends = [c.finish for c in dict.fromkeys(run.callers.values())]
    assert all(ends), "a request without an end"
    # Who was on a dead instance and had all of its answer on the way needs no further token.
    waited = [hit for hit in hits if not np.isnan(hit.next_s)]
    crash_s = np.array([hit.next_s - hit.crashed_s for hit in waited])
    known_s = np.array([max(0.0, hit.next_s - hit.known_s) for hit in waited])
    token_s = np.array([hit.token_s - hit.crashed_s for hit in waited])
    recomputed = run.recomputed_tokens
    ways, predicted_s, actual_s = dict.fromkeys(WAYS, 0), 0.0, 0.0
    placements = [hit.placement() for hit in hits]
    for placement in [p for p in placements if p is not None and p.way is not None]:
        assert placement.way is not None
        ways[placement.way] += 1
        recomputed += placement.num_tokens - (placement.cached_tokens or 0)
        if placement.predicted_ttft_s and placement.actual_ttft_s:
            predicted_s += placement.predicted_ttft_s
            actual_s += placement.actual_ttft_s
    took_s = time.process_time() - began_s
    told = f"{setup}, seed {seed}: {len(hits)} interrupted, {took_s:.1f} s of CPU"
    print(told, file=sys.stderr, flush=True)
    return Row(
        **asdict(setup),
        seed=seed,
        requests=len(ends),
        failed=sum(end not in ("length", "stop") for end in ends),
        crashes=run.num_crashes,
        interrupted=len(hits),
        token_p50_s=_quantile(token_s, 0.5),
        token_p99_s=_quantile(token_s, 0.99),
        next_p50_s=_quantile(crash_s, 0.5),
        next_p99_s=_quantile(crash_s, 0.99),
        known_p50_s=_quantile(known_s, 0.5),
        known_p99_s=_quantile(known_s, 0.99),
        recomputed_tokens=recomputed,
        recomputed_tokens_each=round(recomputed / max(1, len(hits)), 1),
        ways=ways,
        actual_over_predicted=round(actual_s / predicted_s, 3) if predicted_s else None,
    )


def _quantile(values: np.ndarray, q: float) -> float:
    return round(float(np.quantile(values, q)), 4) if len(values) else float("nan")


def the_trace(speed: float, loops: int) -> list[TraceRequest]:
    """The slice `loops` times, one after the other, at `speed` times its rate."""
    slice_ = read_trace(TRACE)
    length_s = slice_[-1].arrival_s + 0.1
    return [
        replace(request, arrival_s=(loop * length_s + request.arrival_s) / speed)
        for loop in range(loops)
        for request in slice_
    ]


def print_table(rows: list[Row]) -> None:
    """One line for each setup: medians over its seeds, with their spread."""
    print(
        "| pd | kv | detection | | interrupted | any token after the crash, p50 "
        "| a new token after the crash, p50 | p99 | after its detection, p50 "
        "| computed again, each | recompute / restore / fetch | actual / predicted |\n"
        + "|---" * 12
        + "|"
    )
    setups = dict.fromkeys(Setup(r.pd, r.kv, r.detection, r.how) for r in rows)
    for setup in setups:
        mine = [r for r in rows if Setup(r.pd, r.kv, r.detection, r.how) == setup]
        counts = (sum(r.ways[way] for r in mine) for way in WAYS)
        ways = " / ".join(map(str, counts)) if setup.how == "resume" else "-"
        ratios = [r.actual_over_predicted for r in mine if r.actual_over_predicted is not None]
        print(
            f"| {setup.pd} | {setup.kv} | {setup.detection} | {setup.how} "
            f"| {sum(r.interrupted for r in mine)} "
            f"| {_spread([r.token_p50_s for r in mine])} s "
            f"| {_spread([r.next_p50_s for r in mine])} s "
            f"| {_spread([r.next_p99_s for r in mine])} s "
            f"| {_spread([r.known_p50_s for r in mine])} s "
            f"| {_spread([r.recomputed_tokens_each for r in mine], 0)} tokens | {ways} "
            f"| {_spread(ratios, 2) if ratios else '-'} |"
        )


def _spread(values: Sequence[float], digits: int = 3) -> str:
    """The median of the seeds, the least and the greatest."""
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(prog="benchmarks.recovery", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--every", type=float, default=4.0, metavar="S", help="between crashes")
    parser.add_argument("--restart", type=float, default=3.0, metavar="S")
    parser.add_argument("--speed", type=float, default=10.0)
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--pd", nargs="*", default=["off", "2:6"])
    parser.add_argument("--kv", nargs="*", default=["none", "peers", "peers+host"])
    parser.add_argument("--detection", nargs="*", default=["at once", "silence"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    trace = the_trace(options.speed, options.loops)
    rows = []
    for pd, kv, detection, how in product(
        options.pd, options.kv, options.detection, ("resume", "retry")
    ):
        setup = Setup(pd, kv, detection, how)
        rows += [
            measure(setup, trace, seed, options.every, options.restart)
            for seed in range(options.seeds)
        ]
    print_table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
