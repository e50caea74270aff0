"""An SLO that is not kept: what was held instead, and whether anybody could keep it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msgspec.structs import replace as with_terms

from penstock.loadgen.costs import InstanceModel, hardware_or_file
from penstock.loadgen.traces import TraceRequest
from penstock.simulator.outcome import Outcome
from penstock.simulator.planning import Reach, reach
from penstock.simulator.quantities import ms
from penstock.simulator.spec import ClusterSpec, PoolSpec


def held(outcome: Outcome, wanted: float) -> dict[str, float | None]:
    """The TTFT, and the TPOT, that the share `wanted` of the requests had at most; None where so
    many had none."""
    ttft_s, tpot_s = outcome.held_s(wanted)
    return {"share": wanted, "ttft_s": _finite(ttft_s), "tpot_s": _finite(tpot_s)}


def held_line(run: dict[str, Any]) -> str:
    """Of a run that keeps too few; else nothing."""
    found = run["held"]
    if run["attainment"] is None or run["attainment"] >= found["share"]:
        return ""
    wanted = f"{100 * found['share']:g}%"
    ttft, tpot = (
        "never came to one" if found[key] is None else f"had a {name} of up to {ms(found[key])}"
        for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"))
    )
    return f"{wanted} of the requests {ttft}, and {wanted} {tpot}"


def floor(spec: ClusterSpec, requests: Sequence[TraceRequest], wanted: float) -> Reach:
    """What any number of such instances could do at best, with each request alone on one."""
    models = [_slowed(pool) for pool in spec.pools]
    return reach(models, requests, *_slos(spec), wanted)


def unmet_lines(
    spec: ClusterSpec, least: Reach, attained: Sequence[float | None], wanted: float
) -> list[str]:
    """Nothing where some run keeps the SLO, or there is none."""
    if any(share is None or share >= wanted for share in attained):
        return []
    so_many = f"{100 * wanted:g}% of the requests"
    if least.share < wanted:
        slos = zip(("TTFT", "TPOT"), _slos(spec))
        asked = " and ".join(f"{name} {ms(s)}" for name, s in slos if math.isfinite(s))
        return [
            f"no number of these instances holds {asked} for {so_many}: with each alone on an "
            f"instance they have at best {least}. It takes other hardware, or an SLO that "
            "is no shorter than this"
        ]
    return [
        f"nothing here keeps {so_many} within the SLO: it takes more or faster instances, fewer "
        "requests a second, or an SLO nearer to what they had (said of each run)"
    ]


def _slos(spec: ClusterSpec) -> tuple[float, float]:
    ttft_s, tpot_s = spec.ttft_slo_s, spec.tpot_slo_s
    return math.inf if ttft_s is None else ttft_s, math.inf if tpot_s is None else tpot_s


def _slowed(pool: PoolSpec) -> InstanceModel:
    model = hardware_or_file(pool.hardware, pool.max_num_batched_tokens, pool.max_num_seqs)
    c, times = model.cost, pool.slowdown
    cost = with_terms(
        c,
        base_s=c.base_s * times,
        per_token_s=c.per_token_s * times,
        per_row_s=c.per_row_s * times,
        per_context_token_s=c.per_context_token_s * times,
        per_attention_s=c.per_attention_s * times,
    )
    return replace(model, cost=cost)


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
