"""KV-aware routing against routing by load: mean TTFT and hit rate.

On Mooncake's conversation trace, and with one hot prefix in most requests, where affinity must not
hurt.

    python -m benchmarks.mooncake_routing [--traces DIR] [--case mooncake] [--jobs 2] [--json FILE]

What is compared stands in experiments/mooncake_routing.yaml. The production cores run on a virtual
clock, with the real block pools, prefix caches and KV index.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import needs
from penstock.loadgen.traces import (
    HASH_BLOCK_TOKENS,
    TraceRequest,
    read_trace,
    spread_ticks,
    tick_of,
)
from penstock.simulator.build import limits
from penstock.simulator.experiment import run
from penstock.simulator.spec import ClusterSpec, LinkSpec, PoolSpec

EXPERIMENT = Path(__file__).parent / "experiments" / "mooncake_routing.yaml"
TRACES = Path("traces")


@dataclass(frozen=True)
class Case:
    name: str
    #: Speed of the trace, or requests a second.
    pace: float
    policy: str


@dataclass(frozen=True)
class Result:
    case: str
    pace: float
    policy: str
    requests: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    #: Of the answered: TTFT within the SLO.
    in_time: float
    tpot_mean_s: float
    #: Cached tokens over prompt tokens; and what there is to be had: with a cache that forgets
    #: nothing, and with one cache as large as all instances have together (LRU).
    hit_rate: float
    hit_rate_infinite: float
    hit_rate_pooled: float
    #: Of the instances: the time that the busiest one computed, over their mean.
    busiest_over_mean: float
    unanswered: int
    wall_s: float


def cases(experiment: dict[str, Any]) -> Iterator[Case]:
    paces = (
        ("mooncake", experiment["mooncake"]["speeds"]),
        ("hot_prefix", experiment["hot_prefix"]["requests_per_s"]),
    )
    for name, values in paces:
        for pace in values:
            for policy in experiment["policies"]:
                yield Case(name, pace, policy)


def requests_of(experiment: dict[str, Any], case: Case, traces: Path) -> list[TraceRequest]:
    if case.name == "hot_prefix":
        return hot_prefix(experiment["hot_prefix"], case.pace, experiment["seed"])
    known = experiment["mooncake"]
    start_s, end_s = known["window_s"]
    requests = read_trace(traces / known["file"])
    spread = spread_ticks(requests, tick_of(traces / known["file"], requests) or 0.0)
    window = [r for r in spread if start_s <= r.arrival_s < end_s]
    return [replace(r, arrival_s=(r.arrival_s - start_s) / case.pace) for r in window]


def hot_prefix(hot: dict[str, Any], requests_per_s: float, seed: int) -> list[TraceRequest]:
    """Ids from 1 on stand for the hot prefix; each request's own blocks have ids of their own."""
    draw = random.Random(seed)
    prefix = tuple(range(1, hot["prefix_tokens"] // HASH_BLOCK_TOKENS + 1))
    own_blocks = hot["own_tokens"] // HASH_BLOCK_TOKENS
    fresh, now = 1_000_000, 0.0
    found = []
    for _ in range(hot["requests"]):
        is_hot = draw.random() < hot["share"]
        count = own_blocks + (0 if is_hot else len(prefix))
        ids = (prefix if is_hot else ()) + tuple(range(fresh, fresh + count))
        fresh += count
        found.append(TraceRequest(now, len(ids) * HASH_BLOCK_TOKENS, hot["output_tokens"], ids))
        now += draw.expovariate(requests_per_s)
    return found


def ideal_hit_rate(requests: list[TraceRequest], kv_tokens: float) -> float:
    """Of one cache of `kv_tokens` in front of everybody, whole blocks of the trace, LRU."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests:
        ids = request.hash_ids
        leading = next((i for i, block in enumerate(ids) if block not in cache), len(ids))
        hits += min(leading * HASH_BLOCK_TOKENS, request.input_tokens)
        for block in reversed(ids):  # of a chain, the end goes first
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) * HASH_BLOCK_TOKENS > kv_tokens:
            cache.popitem(last=False)
    return hits / sum(request.input_tokens for request in requests)


def measure(experiment: dict[str, Any], case: Case, traces: Path) -> Result:
    cluster = experiment["cluster"]
    pool = PoolSpec(
        count=cluster["instances"],
        hardware=cluster["hardware"],
        max_num_batched_tokens=cluster["max_num_batched_tokens"],
        max_num_seqs=cluster["max_num_seqs"],
    )
    spec = ClusterSpec(
        pools=(pool,),
        policy=case.policy,
        pd="off",
        ttft_slo_s=cluster["ttft_slo_s"],
        tpot_slo_s=cluster["tpot_slo_s"],
        link=LinkSpec(kv_gbit=cluster["kv_gbit"]),
    )
    requests = requests_of(experiment, case, traces)
    outcome = run(spec, requests, seed=experiment["seed"], mode=experiment["mode"])
    answered = ~np.isnan(outcome.ttft_s)
    ttft_s = outcome.ttft_s[answered]
    gaps = outcome.output_tokens - 1
    tpot_s = ((outcome.end_s - outcome.first_s) / np.maximum(gaps, 1))[answered & (gaps > 0)]
    kv_tokens = sum(bound.kv_tokens * bound.pool.count for bound in limits(spec))
    return Result(
        case=case.name,
        pace=case.pace,
        policy=case.policy,
        requests=len(requests),
        ttft_mean_s=float(ttft_s.mean()),
        ttft_p50_s=float(np.quantile(ttft_s, 0.5)),
        ttft_p99_s=float(np.quantile(ttft_s, 0.99)),
        in_time=float((ttft_s <= cluster["ttft_slo_s"]).mean()),
        tpot_mean_s=float(tpot_s.mean()),
        hit_rate=float(
            outcome.cached_tokens[answered].sum() / outcome.input_tokens[answered].sum()
        ),
        hit_rate_infinite=ideal_hit_rate(requests, np.inf),
        hit_rate_pooled=ideal_hit_rate(requests, kv_tokens),
        busiest_over_mean=float(outcome.busy_s.max() / outcome.busy_s.mean()),
        unanswered=int((~answered).sum()),
        wall_s=round(outcome.wall_s, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of Mooncake's trace")
    parser.add_argument("--case", choices=["mooncake", "hot_prefix"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    experiment = yaml.safe_load(EXPERIMENT.read_text())
    work = [c for c in cases(experiment) if flags.case in (None, c.name)]
    if any(c.name == "mooncake" for c in work):
        needs.traces([flags.traces / experiment["mooncake"]["file"]])
    results = []
    print(
        f"{'':<12}{'pace':>6}  {'policy':<12}{'requests':>9}{'TTFT mean':>11}{'p50':>11}{'p99':>11}"
        f"{'in time':>9}{'TPOT':>9}{'hits':>8}{'pooled':>8}{'infinite':>9}{'busiest':>9}"
    )
    with ProcessPoolExecutor(flags.jobs) as pool:
        for done in [pool.submit(measure, experiment, c, flags.traces) for c in work]:
            r = done.result()
            results.append(r)
            times = "".join(
                f"{1e3 * t:8.0f} ms" for t in (r.ttft_mean_s, r.ttft_p50_s, r.ttft_p99_s)
            )
            print(
                f"{r.case:<12}{r.pace:>6g}  {r.policy:<12}{r.requests:>9}{times}"
                f"{100 * r.in_time:8.1f}%{1e3 * r.tpot_mean_s:6.1f} ms{100 * r.hit_rate:7.1f}%"
                f"{100 * r.hit_rate_pooled:7.1f}%{100 * r.hit_rate_infinite:8.1f}%"
                f"{r.busiest_over_mean:9.2f}",
                flush=True,
            )
    if flags.json:
        rows = [vars(r) for r in results]
        flags.json.write_text(
            json.dumps({"experiment": experiment, "results": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
