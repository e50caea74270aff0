"""Several setups on one trace: the runs, and the report that they add up to (a dict for JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from penstock import __version__
from penstock.loadgen.traces import TraceRequest
from penstock.simulator.cluster_file import write_cluster
from penstock.simulator.crew import Crew, Progress, Task
from penstock.simulator.outcome import Outcome
from penstock.simulator.report.metrics import WANTED, gpus_of, metrics, rate_at
from penstock.simulator.report.unmet import floor, unmet_lines
from penstock.simulator.spec import ClusterSpec
from penstock.simulator.stretch import busiest


def tasks(
    spec: ClusterSpec,
    *,
    policies: Sequence[str] = (),
    pds: Sequence[str] = (),
    speeds: Sequence[float] = (1.0,),
    seed: int = 0,
    mode: str = "exact",
    window_s: float | None = None,
) -> list[Task]:
    """Each with each; what is empty is as in `spec`. Raises `ConfigError` for a split or policy
    that there is none of."""
    found = []
    for policy in policies or (spec.policy,):
        for pd in pds or (spec.pd,):
            changed = replace(spec, policy=policy, pd=pd)
            _ = changed.static_split  # raises
            found += [
                Task(spec=changed, speed=speed, seed=seed, mode=mode, window_s=window_s)
                for speed in speeds
            ]
    return found


def compare(
    runs: Sequence[Task],
    requests: Sequence[TraceRequest],
    *,
    trace: str,
    jobs: int = 1,
    progress: Progress = lambda shares: None,
) -> dict[str, Any]:
    """`trace`: what to call it. `report/table.py` and `report/html.py` show what comes of it."""
    with Crew(requests, measured, jobs) as crew:
        found = crew.run(runs, progress)
    spec, window_s = runs[0].spec, runs[0].window_s
    chosen = busiest(requests, window_s)
    least = floor(spec, chosen, WANTED)
    return {
        "about": {
            "penstock": __version__,
            "trace": trace,
            "window_s": window_s,
            "requests": len(chosen),
            "trace_seconds": chosen[-1].arrival_s,
            "mean_input_tokens": float(np.mean([r.input_tokens for r in chosen])),
            "mean_output_tokens": float(np.mean([r.output_tokens for r in chosen])),
            "cluster_name": spec.name,
            "cluster": write_cluster(spec),
            "instances": spec.num_instances,
            "gpus": gpus_of(spec),
            "slo": {"ttft_s": spec.ttft_slo_s, "tpot_s": spec.tpot_slo_s},
        },
        "runs": found,
        "sweep": sweep(found),
        # With each request alone on an instance: no number of them does better.
        "floor": {"wanted": WANTED} | asdict(least),
        "unmet": unmet_lines(spec, least, [run["attainment"] for run in found], WANTED),
    }


def measured(outcome: Outcome, task: Task) -> dict[str, Any]:
    return metrics(outcome, task.speed)


def sweep(runs: Sequence[dict[str, Any]], wanted: float = WANTED) -> list[dict[str, Any]]:
    """Attainment against rate, of each setup that was run at several speeds with an SLO."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run["attainment"] is not None and run["rate_per_s"] is not None:
            lines.setdefault((run["policy"], run["pd"]), []).append(run)
    found = []
    for (policy, pd), members in lines.items():
        if len({run["speed"] for run in members}) < 2:
            continue
        members = sorted(members, key=lambda run: float(run["rate_per_s"]))
        points = [{k: r[k] for k in ("speed", "rate_per_s", "attainment")} for r in members]
        rate = rate_at([(p["rate_per_s"], p["attainment"]) for p in points], wanted)
        found.append(
            {"policy": policy, "pd": pd, "wanted": wanted, "rate_per_s": rate, "points": points}
        )
    return found
