"""Dynamic against static prefill-decode disaggregation: request rate at 90% SLO attainment.

    python -m benchmarks.pd_sweep [--traces DIR] [--trace azure_code] [--groups dynamic,static]
        [--only "6:2, least"] [--seeds 3] [--check] [--mode scale] [--best] [--jobs 2]
        [--json FILE] [--plot FILE]

Everything that is compared stands in experiments/pd_azure.yaml: model, hardware, SLOs, windows of
the traces, setups. For each setup the trace is sped up until the wanted share of requests no longer
keeps both SLOs; the rate there is interpolated between two steps of speed. The production cores run
on a virtual clock (`penstock.simulator`): one seed, one history. Near the limit histories of
seeds (and of speeds that are almost the same) differ by some percent of the requests, so that with
`--seeds` it is the mean over several that counts.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import needs
from penstock.loadgen.traces import TraceRequest, read_trace
from penstock.simulator.experiment import MODES, run
from penstock.simulator.outcome import Outcome
from penstock.simulator.spec import ClusterSpec, LinkSpec, PoolSpec

EXPERIMENT = Path(__file__).parent / "experiments" / "pd_azure.yaml"
TRACES = Path("traces")
#: Where the search for the limit begins, and its first stride, in steps of speed.
_FIRST_SPEED, _STRIDE = 4.0, 8


@dataclass(frozen=True)
class Setup:
    group: str
    policy: str
    pd: str
    max_num_batched_tokens: int

    @property
    def name(self) -> str:
        pd = {"off": "aggregated", "auto": "dynamic"}.get(self.pd, f"static {self.pd}")
        return f"{pd}, {self.policy}, steps of {self.max_num_batched_tokens}"


def setups(experiment: dict[str, Any]) -> Iterator[Setup]:
    cluster = experiment["cluster"]
    count = cluster["instances"]
    splits = [f"{p}:{count - p}" for p in range(1, count)]
    for group, members in experiment["setups"].items():
        for member in members:
            tokens = member.get("max_num_batched_tokens", cluster["max_num_batched_tokens"])
            every = splits if member["pd"] == f"1:{count - 1}..{count - 1}:1" else [member["pd"]]
            for pd in every:
                yield Setup(group, member["policy"], pd, tokens)


def spec_of(experiment: dict[str, Any], setup: Setup) -> ClusterSpec:
    cluster, slo = experiment["cluster"], experiment["slo"]
    pool = PoolSpec(
        count=cluster["instances"],
        hardware=cluster["hardware"],
        max_num_batched_tokens=setup.max_num_batched_tokens,
        max_num_seqs=cluster["max_num_seqs"],
    )
    return ClusterSpec(
        name=setup.name,
        pools=(pool,),
        policy=setup.policy,
        pd=setup.pd,
        ttft_slo_s=slo["ttft_s"],
        tpot_slo_s=slo["tpot_s"],
        link=LinkSpec(kv_gbit=cluster["kv_gbit"]),
    )


def stretch(path: Path, window_s: list[float]) -> list[TraceRequest]:
    """The requests of a window, the first second of it at 0."""
    start_s, end_s = window_s
    requests = [r for r in read_trace(path) if start_s <= r.arrival_s < end_s]
    return [replace(r, arrival_s=r.arrival_s - start_s) for r in requests]


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One run, in numbers; `roles` is [second, instance, role] for each change. Of several seeds
    shares within the SLOs are means, with those of each seed beside; all else is of the first."""

    speed: float
    requests_per_s: float
    attained: float
    ttft_attained: float
    tpot_attained: float
    attained_by_seed: list[float]
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    handovers: int
    roles: list[tuple[float, str, str]]
    wall_s: float


def measure(
    experiment: dict[str, Any],
    setup: Setup,
    requests: list[TraceRequest],
    span_s: float,
    mode: str,
    speed: float,
) -> Point:
    faster = [replace(r, arrival_s=r.arrival_s / speed) for r in requests]
    rate, first = len(requests) / span_s * speed, experiment["seed"]
    points = []
    for seed in range(first, first + experiment.get("seeds", 1)):
        outcome = run(spec_of(experiment, setup), faster, seed=seed, mode=mode)
        points.append(point(outcome, experiment["slo"], speed, rate))
    shares = ("attained", "ttft_attained", "tpot_attained")
    means = {share: float(np.mean([getattr(p, share) for p in points])) for share in shares}
    return replace(points[0], attained_by_seed=[round(p.attained, 4) for p in points], **means)


def point(outcome: Outcome, slo: dict[str, float], speed: float, rate: float) -> Point:
    ttft_s, tpot_s = outcome.ttft_s, outcome.tpot_s
    p50_s, p90_s, p99_s = np.nanquantile(ttft_s, [0.5, 0.9, 0.99])
    tpot_p50_s, tpot_p99_s = np.nanquantile(tpot_s, [0.5, 0.99])
    return Point(
        speed=speed,
        requests_per_s=rate,
        attained=float(outcome.attained(slo["ttft_s"], slo["tpot_s"]).mean()),
        ttft_attained=float((ttft_s <= slo["ttft_s"]).mean()),
        tpot_attained=float((np.isnan(tpot_s) | (tpot_s <= slo["tpot_s"])).mean()),
        attained_by_seed=[],
        ttft_p50_s=float(p50_s),
        ttft_p90_s=float(p90_s),
        ttft_p99_s=float(p99_s),
        tpot_p50_s=float(tpot_p50_s),
        tpot_p99_s=float(tpot_p99_s),
        handovers=outcome.handovers,
        roles=[(round(c.at_s, 2), c.instance, c.role) for c in outcome.role_changes],
        wall_s=round(outcome.wall_s, 1),
    )


# --- the limit ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """`requests_per_s` at the wanted attainment; `points` by speed, all that were looked at."""

    trace: str
    setup: Setup
    requests_per_s: float
    points: list[Point]
    #: False: it does not hold at `requests_per_s`, which is another's limit; it was not looked for.
    found: bool = True

    @property
    def at(self) -> Point:
        """The last one that was good enough, or the first one."""
        good = [p for p in self.points if p.requests_per_s <= self.requests_per_s]
        return good[-1] if good else self.points[0]


def search(
    measured: Callable[[float], Point], speeds: dict[str, float], wanted: float
) -> tuple[float, list[Point]]:
    """Requests a second at which `wanted` of them keep the SLOs, and the points on the way there:
    strides up or down to a step of speed that is good enough with one that is not above it, halved
    until they are neighbours. 0 where not even the least speed is good enough."""
    ratio = speeds["ratio"]
    least, most = (round(math.log(speeds[k]) / math.log(ratio)) for k in ("least", "most"))
    points: dict[int, Point] = {}

    def good(step: int) -> bool:
        if step not in points:
            points[step] = measured(ratio**step)
        return points[step].attained >= wanted

    low = round(math.log(_FIRST_SPEED) / math.log(ratio))
    while not good(low) and low > least:
        low = max(low - _STRIDE, least)
    high = low + _STRIDE
    while low < most and good(high):
        low, high = high, min(high + _STRIDE, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    below, above = points[low], points[high]
    in_order = [points[step] for step in sorted(points)]
    if below.attained < wanted:
        return 0.0, in_order
    share = (below.attained - wanted) / max(below.attained - above.attained, 1e-9)
    gap = above.requests_per_s - below.requests_per_s
    return below.requests_per_s + min(share, 1.0) * gap, in_order


def limit(
    experiment: dict[str, Any], trace: str, setup: Setup, traces: Path, window: str, mode: str
) -> Limit:
    known = experiment["traces"][trace]
    start_s, end_s = known[window]
    requests = stretch(traces / known["file"], known[window])
    measured = partial(measure, experiment, setup, requests, end_s - start_s, mode)
    rate, points = search(measured, experiment["speeds"], experiment["slo"]["attainment"])
    return Limit(trace, setup, rate, points)


def limits_of_group(
    experiment: dict[str, Any],
    trace: str,
    members: list[Setup],
    traces: Path,
    window: str,
    mode: str,
) -> list[Limit]:
    """Whoever does not hold at the highest limit so far is not the best, and is searched no
    further. Splits near 3 of 4 to prefill come first."""
    known = experiment["traces"][trace]
    start_s, end_s = known[window]
    requests = stretch(traces / known["file"], known[window])
    limits: list[Limit] = []
    for setup in sorted(members, key=lambda s: abs(int(s.pd[0]) - 6) if s.pd[0].isdigit() else 0):
        leader = max((x for x in limits if x.found), key=lambda x: x.requests_per_s, default=None)
        if leader is not None and leader.requests_per_s:
            measured = partial(measure, experiment, setup, requests, end_s - start_s, mode)
            there = measured(leader.at.speed)
            if there.attained < experiment["slo"]["attainment"]:
                limits.append(Limit(trace, setup, leader.requests_per_s, [there], found=False))
                print(f"{trace}: {setup.name}: less ({there.attained:.3f} there)", flush=True)
                continue
        limits.append(limit(experiment, trace, setup, traces, window, mode))
        print(f"{trace}: {setup.name}: {limits[-1].requests_per_s:.2f} requests/s", flush=True)
    return limits


# --- reports --------------------------------------------------------------------------------------


def best(limits: list[Limit], trace: str, group: str) -> Limit | None:
    members = [x for x in limits if x.trace == trace and x.setup.group == group and x.found]
    return max(members, key=lambda x: x.requests_per_s, default=None)


def report(limits: list[Limit], experiment: dict[str, Any]) -> dict[str, Any]:
    """Plain data: all limits, and by trace the best of each group and how dynamic compares."""
    found: dict[str, Any] = {"experiment": experiment, "traces": {}, "limits": []}
    for x in limits:
        found["limits"].append(
            {
                "trace": x.trace,
                "group": x.setup.group,
                "setup": x.setup.name,
                ("requests_per_s" if x.found else "requests_per_s_below"): round(
                    x.requests_per_s, 3
                ),
                "points": [vars(p) for p in x.points],
            }
        )
    for trace in dict.fromkeys(x.trace for x in limits):
        rows = {g: best(limits, trace, g) for g in experiment["setups"]}
        dynamic = rows.get("dynamic")
        found["traces"][trace] = {
            group: {
                "setup": x.setup.name,
                "requests_per_s": round(x.requests_per_s, 2),
                "dynamic_is": round(dynamic.requests_per_s / x.requests_per_s, 3)
                if dynamic and x.requests_per_s
                else None,
            }
            for group, x in rows.items()
            if x is not None
        }
    return found


def table(limits: list[Limit]) -> Iterator[str]:
    for trace in dict.fromkeys(x.trace for x in limits):
        mine = [x for x in limits if x.trace == trace]
        dynamic = best(limits, trace, "dynamic")
        yield f"\n{trace}: requests a second at the wanted attainment"
        yield f"{'':<48}{'req/s':>8}{'dynamic is':>12}{'TTFT p50':>10}{'p99':>9}{'TPOT p99':>11}"
        for x in sorted(mine, key=lambda x: -x.requests_per_s):
            times = (
                f"{x.at.ttft_p50_s:8.2f} s{x.at.ttft_p99_s:7.2f} s{1e3 * x.at.tpot_p99_s:8.1f} ms"
            )
            ratio = "" if dynamic is None or not x.requests_per_s else (
                f"{dynamic.requests_per_s / x.requests_per_s:.2f} x"
            )  # fmt: skip
            mark = " " if x.found else "<"
            yield f"{x.setup.name:<47}{mark}{x.requests_per_s:8.2f}{ratio:>12}{times}"


def plot(limits: list[Limit], path: Path, wanted: float) -> None:
    """Attainment over rate for the best of each group, and the roles of dynamic PD over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(x.trace for x in limits))
    figure, axes = plt.subplots(2, len(names), figsize=(7 * len(names), 7), squeeze=False)
    for column, trace in enumerate(names):
        top, bottom = axes[0][column], axes[1][column]
        for group in dict.fromkeys(x.setup.group for x in limits):
            x = best(limits, trace, group)
            if x is not None:
                rates = [p.requests_per_s for p in x.points]
                top.plot(rates, [100 * p.attained for p in x.points], ".-", label=x.setup.name)
        top.axhline(100 * wanted, color="grey", linewidth=0.8)
        top.set(title=trace, xlabel="requests/s", ylabel="requests within the SLOs, %")
        top.legend(fontsize=8)
        dynamic = best(limits, trace, "dynamic")
        if dynamic is not None:
            times, counts = roles_over_time(dynamic.at.roles)
            bottom.stackplot(times, list(counts.values()), labels=list(counts), step="post")
            bottom.set(xlabel="seconds", ylabel="instances", title=f"at {dynamic.at.speed:.1f} x")
            bottom.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def roles_over_time(
    changes: list[tuple[float, str, str]],
) -> tuple[list[float], dict[str, list[int]]]:
    """How many of the instances that ever changed had each role, from change to change."""
    role_of = {name: "any" for _, name, _ in changes}
    roles = ("any", "prefill", "decode_to_prefill", "prefill_to_decode", "decode")
    times, counts = [min([0.0, *(t for t, _, _ in changes)])], {r: [0] for r in roles}
    counts["any"][0] = len(role_of)
    for at_s, name, role in changes:
        role_of[name] = role
        times.append(at_s)
        for r in roles:
            counts[r].append(sum(1 for x in role_of.values() if x == r))
    return times, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of Azure's traces")
    parser.add_argument("--trace", action="append", help="one of the experiment's; default: all")
    parser.add_argument("--groups", help="comma-separated; default: all of the experiment's")
    parser.add_argument("--only", default="", help="setups with this in their names")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, whose mean counts")
    parser.add_argument("--check", action="store_true", help="the windows kept for checking")
    parser.add_argument("--mode", choices=MODES, default="exact", help="of the simulator")
    parser.add_argument(
        "--best", action="store_true", help="look only for the best setup of each group"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    flags = parser.parse_args()
    experiment = yaml.safe_load(EXPERIMENT.read_text())
    experiment["seeds"] = flags.seeds
    groups = flags.groups.split(",") if flags.groups else list(experiment["setups"])
    window = "check_s" if flags.check else "window_s"
    names = flags.trace or experiment["traces"]
    needs.traces(flags.traces / experiment["traces"][name]["file"] for name in names)
    needs.packages(*["matplotlib"] * (flags.plot is not None))
    work = [
        (trace, setup)
        for trace in names
        for setup in setups(experiment)
        if setup.group in groups and flags.only in setup.name
    ]
    limits: list[Limit] = []
    with ProcessPoolExecutor(flags.jobs) as pool:
        waiting = []
        for key in dict.fromkeys((trace, setup.group) for trace, setup in work):
            members = [setup for trace, setup in work if (trace, setup.group) == key]
            sets = [members] if flags.best else [[setup] for setup in members]
            waiting += [
                pool.submit(
                    limits_of_group, experiment, key[0], some, flags.traces, window, flags.mode
                )
                for some in sets
            ]
        for done in as_completed(waiting):
            limits += done.result()
    order = {pair: place for place, pair in enumerate(work)}
    limits.sort(key=lambda x: order[x.trace, x.setup])
    print("\n".join(table(limits)))
    if flags.json:
        flags.json.write_text(
            json.dumps({"mode": flags.mode, **report(limits, experiment)}, indent=1) + "\n"
        )
    if flags.plot:
        plot(limits, flags.plot, experiment["slo"]["attainment"])


if __name__ == "__main__":
    main()
