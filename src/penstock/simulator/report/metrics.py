"""What came of a run, in numbers: `Outcome` to plain data that JSON can hold.

Formulas, for N requests of which the last one arrives at T seconds. Spans go from the first arrival
to the last answer: what is answered late, after the arrivals, takes time as well.

* attainment: requests that were answered with TTFT and TPOT within the SLO, over N. Whoever was
  refused or failed has missed it. TPOT is the mean over a request's tokens after the first.
* rate: N / T, what is offered; None where all come at once. Tokens a second: output tokens of
  answered requests, over the span. Goodput: requests (or their output tokens) within the SLO, over
  the span.
* held: the TTFT, and the TPOT, that 90% of all requests had at most.
* utilisation: seconds that instances computed in the span, over the span and their number; by pool,
  and by the role that they had at the time.
* KV hit rate: prompt tokens found in a cache, over prompt tokens, of answered requests.
* cost: price of all GPUs for the span, over the tokens of answered requests.

What does not exist (a percentile of nothing, an SLO that was not set) is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from penstock.loadgen.costs import hardware_or_file
from penstock.simulator.outcome import Floats, Outcome, Sample
from penstock.simulator.quantities import text_of
from penstock.simulator.report.unmet import held
from penstock.simulator.spec import ClusterSpec

PERCENTILES = (50, 90, 99)
#: Attainment at which rates are compared.
WANTED = 0.9
#: Points on a time line, and instances that have a line of their own.
_POINTS, _LINES = 300, 40
_ROLES = ("prefill", "decode", "any", "prefill_to_decode", "decode_to_prefill", "encode")


def metrics(outcome: Outcome, speed: float = 1.0) -> dict[str, Any]:
    """`speed`: how many times as fast as recorded the trace came."""
    spec = outcome.spec
    answered = np.array([f in ("stop", "length") for f in outcome.finish], dtype=bool)
    refused = sum(f == "refused" for f in outcome.finish)
    seconds = float(outcome.arrival_s[-1])
    span_s = outcome.span_s
    tokens = float(outcome.output_tokens[answered].sum())
    within = _within(outcome)
    return {
        "policy": spec.policy,
        "pd": spec.pd,
        "speed": speed,
        "seed": outcome.seed,
        "mode": outcome.mode,
        "requests": len(answered),
        "answered": int(answered.sum()),
        "refused": int(refused),
        "failed": int(len(answered) - answered.sum() - refused),
        "seconds": seconds,
        "span_s": span_s,
        "rate_per_s": len(answered) / seconds if seconds else None,
        "output_tokens_per_s": tokens / span_s,
        "attainment": None if within is None else float(within.mean()),
        "goodput_per_s": None if within is None else float(within.sum()) / span_s,
        "goodput_tokens_per_s": None
        if within is None
        else float(outcome.output_tokens[within].sum()) / span_s,
        "held": held(outcome, WANTED),
        "ttft_s": _percentiles(outcome.ttft_s[answered]),
        "tpot_s": _percentiles(outcome.tpot_s[answered]),
        "e2e_s": _percentiles((outcome.end_s - outcome.arrival_s)[answered]),
        "gap_p99_s": outcome.gaps.quantile(0.99),
        "utilisation": _utilisation(outcome, span_s),
        "kv_hit_rate": _hit_rate(outcome, answered),
        "handovers": outcome.handovers,
        "resumed": outcome.resumed,
        "preemptions": outcome.preemptions,
        "recomputed_tokens": outcome.recomputed_tokens,
        "idle_faults": [
            f"{fault.kind} of {fault.instance} at {text_of(fault.at_s)} did not happen: {why}"
            for fault, why in outcome.idle_faults.items()
        ],
        "role_changes": [
            {"at_s": round(c.at_s, 3), "instance": c.instance, "role": c.role}
            for c in outcome.role_changes
            if c.at_s >= 0  # before the first arrival roles are only set up
        ],
        "cost": _cost(spec, span_s, outcome, answered),
        "simulated": {
            "events": outcome.events,
            "wall_s": outcome.wall_s,
            "cpu_s": outcome.cpu_s,
            "seconds_per_wall_s": _end_s(outcome) / max(outcome.wall_s, 1e-9),
            "digest": outcome.digest,
        },
        "ttft_cdf_s": _cdf(outcome.ttft_s[answered]),
        "tpot_cdf_s": _cdf(outcome.tpot_s[answered]),
        "timeline": timeline(outcome),
    }


def gpus_of(spec: ClusterSpec) -> int:
    return sum(p.count * hardware_or_file(p.hardware).gpus for p in spec.pools)


def usd_per_hour(spec: ClusterSpec) -> float | None:
    """None unless every pool has a price."""
    total = 0.0
    for pool in spec.pools:
        if pool.gpu_hour_usd is None:
            return None
        total += pool.count * hardware_or_file(pool.hardware).gpus * pool.gpu_hour_usd
    return total


def rate_at(points: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """The rate at which attainment falls below `wanted`, between the two measured ones where it
    first does, on a straight line; `points`: (rate, attainment). None: it does not lie between."""
    ordered = sorted(points)
    for (rate, share), (next_rate, next_share) in pairwise(ordered):
        if share >= wanted > next_share:
            return rate + (next_rate - rate) * (share - wanted) / (share - next_share)
    return None


def _within(outcome: Outcome) -> np.ndarray | None:
    """Requests within the SLO; None: there is none."""
    spec = outcome.spec
    if spec.ttft_slo_s is None and spec.tpot_slo_s is None:
        return None
    ttft_s = math.inf if spec.ttft_slo_s is None else spec.ttft_slo_s
    tpot_s = math.inf if spec.tpot_slo_s is None else spec.tpot_slo_s
    return outcome.attained(ttft_s, tpot_s)


def _percentiles(seconds: Floats) -> dict[str, float | None]:
    found = seconds[~np.isnan(seconds)]
    times: dict[str, float | None] = {"mean": float(found.mean()) if len(found) else None}
    for p in PERCENTILES:
        times[f"p{p}"] = float(np.percentile(found, p)) if len(found) else None
    return times


def _cdf(seconds: Floats) -> list[float]:
    """Percentiles 0 to 100."""
    found = seconds[~np.isnan(seconds)]
    return [round(float(s), 6) for s in np.percentile(found, np.arange(101))] if len(found) else []


def _hit_rate(outcome: Outcome, answered: np.ndarray) -> float | None:
    prompts = outcome.input_tokens[answered].sum()
    return float(outcome.cached_tokens[answered].sum() / prompts) if prompts else None


def _end_s(outcome: Outcome) -> float:
    return outcome.samples[-1].at_s if outcome.samples else float(outcome.arrival_s[-1])


def _steps(outcome: Outcome, until_s: float) -> list[tuple[Sample, float]]:
    """Samples with traffic, each with the seconds that it stands for."""
    found = []
    before_s = 0.0
    for sample in outcome.samples:
        if sample.at_s <= 0:
            continue
        if before_s >= until_s:
            break
        found.append((sample, sample.at_s - before_s))
        before_s = sample.at_s
    return found


def _utilisation(outcome: Outcome, until_s: float) -> dict[str, Any]:
    steps = _steps(outcome, until_s)
    busy = np.array([s.busy for s, _ in steps])
    used = np.array([s.kv_used for s, _ in steps])
    weights = np.array([w for _, w in steps])
    if not steps:
        return {"mean": None, "pools": [], "roles": []}
    pools, first = [], 0
    for pool in outcome.spec.pools:
        of = slice(first, first + pool.count)
        first += pool.count
        pools.append(
            {
                "name": pool.name,
                "hardware": pool.hardware,
                "instances": pool.count,
                "busy": float(np.average(busy[:, of].mean(axis=1), weights=weights)),
                "kv_used_mean": float(np.average(used[:, of].mean(axis=1), weights=weights)),
                "kv_used_max": float(used[:, of].max()),
            }
        )
    codes = {role: code for code, role in enumerate(_ROLES)}
    roles = np.array([[codes[r] for r in s.roles] for s, _ in steps], dtype=np.int8)
    by_role = []
    for role in _ROLES:
        shares = (roles == codes[role]) * weights[:, None]
        if total := shares.sum():
            by_role.append(
                {
                    "role": role,
                    "instances_mean": float(total / weights.sum()),
                    # A step counts when it ends, which may be more than a short while has.
                    "busy": min(float((busy * shares).sum() / total), 1.0),
                }
            )
    mean = float(np.average(busy.mean(axis=1), weights=weights))
    return {"mean": mean, "pools": pools, "roles": by_role}


def _cost(
    spec: ClusterSpec, span_s: float, outcome: Outcome, answered: np.ndarray
) -> dict[str, float | None] | None:
    hourly = usd_per_hour(spec)
    if hourly is None:
        return None
    total = hourly * span_s / 3600
    output = float(outcome.output_tokens[answered].sum())
    prompts = float(outcome.input_tokens[answered].sum())

    def per_million(tokens: float) -> float | None:
        return total / tokens * 1e6 if tokens else None

    return {
        "usd_per_hour": hourly,
        "usd_per_million_output_tokens": per_million(output),
        "usd_per_million_tokens": per_million(output + prompts),
    }


def timeline(outcome: Outcome) -> dict[str, Any]:
    """The cluster over time in at most 300 points: what is counted is averaged between two, roles
    are the last. Instances have lines of their own up to 40 of them."""
    samples = [s for s in outcome.samples if s.at_s > 0]
    if not samples:
        return {"at_s": []}
    stride = -(-len(samples) // _POINTS)
    groups = [samples[i : i + stride] for i in range(0, len(samples), stride)]

    def mean(of: str) -> list[float]:
        return [round(float(np.mean([getattr(s, of) for s in g])), 4) for g in groups]

    def total(of: str) -> list[float]:
        return [round(float(np.mean([np.sum(getattr(s, of)) for s in g])), 2) for g in groups]

    found: dict[str, Any] = {
        "at_s": [round(g[-1].at_s, 3) for g in groups],
        "busy": mean("busy"),
        "kv_used": mean("kv_used"),
        "running": total("running"),
        "waiting": total("waiting"),
        "roles": {
            role: counts
            for role in _ROLES
            if any(counts := [g[-1].roles.count(role) for g in groups])
        },
    }
    if len(outcome.instances) <= _LINES:
        found["instances"] = [
            {
                "name": name,
                "roles": [g[-1].roles[i] for g in groups],
                "busy": [round(float(np.mean([s.busy[i] for s in g])), 3) for g in groups],
            }
            for i, name in enumerate(outcome.instances)
        ]
    return found
