"""Policies that know nothing of caches: in turn, and by what waits.

Where instances have roles both place each stage in its pool: the prompt among those that prefill,
what follows among those that decode ("minimal load" and "round robin" over a fixed split, as the
xLLM report has them).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from penstock.service.policies import pools
from penstock.service.policies.outlook import Outlook, look
from penstock.service.policies.view import (
    Bools,
    ClusterView,
    Decision,
    Floats,
    RouteRequest,
    best_few,
)


def round_robin(view: ClusterView, request: RouteRequest) -> Decision:
    """Each instance in turn (of each pool, where there are pools), by the number of the request."""
    assert view.names, "a decision needs at least one candidate"
    members = _first_stage(view, request)
    i = pools.least(_until_turn(members, request), members)
    name, count = view.names[i], int(members.sum())
    decode = _second_stage(view, request, i, _until_turn)
    return Decision(
        policy="round-robin",
        instance=name,
        candidates=look(view, request).candidates([i]),  # who has an SLO asks for the time
        reason=f"{name} is next: request {request.number} of {count} instances in turn",
        decode=decode,
    )


def least_load(view: ClusterView, request: RouteRequest) -> Decision:
    """The instance with the least predicted time to first token if nothing were cached: what waits
    there, plus this request, at the speed that the instance itself has measured. Ties go to the
    fewest tokens, then to the first name. Where there are pools, that one of those that prefill,
    and of those that decode the one with the fewest tokens running."""
    assert view.names, "a decision needs at least one candidate"
    blind = RouteRequest(
        num_tokens=request.num_tokens, expected_output_tokens=request.expected_output_tokens
    )
    # What was interrupted goes on where that is fastest, with all that is left of it.
    o = look(view, request if request.interrupted else blind)
    members = _first_stage(view, request)
    prompt_is_there = request.prefilled_on is not None and not pools.why_not_split(view)
    score = view.running_tokens if prompt_is_there else by_time(o)
    best = [i for i in best_few(np.where(members, score, np.inf)) if members[i]]
    i = best[0]
    kept = o.candidates(best)
    goes = "goes on" if prompt_is_there else "answers first"
    reason = (
        f"{view.names[i]} {goes}: {int(view.queued_tokens[i])} tokens queued, "
        f"{int(view.running[i])} sequences running, "
        f"{1e3 * kept[0].predicted_ttft_s:.1f} ms predicted{o.doubt(i)}"
    )
    decode = _second_stage(view, request, i, lambda *_: view.running_tokens)
    return Decision(
        policy="least-load",
        instance=view.names[i],
        candidates=kept,
        reason=reason,
        decode=decode,
    )


def by_time(o: Outlook) -> Floats:
    """Predicted TTFT as a score; equal times (nothing measured yet) are told apart by tokens and
    sequences, at a picosecond each."""
    score: Floats = o.ttft_s + 1e-12 * (o.view.queued_tokens + o.view.running - o.hits_WI[0])
    return score


# --- stages ---------------------------------------------------------------------------------------


def _first_stage(view: ClusterView, request: RouteRequest) -> Bools:
    """Who may take the request now: the pool of the stage that comes next, or everybody."""
    if pools.why_not_split(view):
        return np.ones(len(view.names), dtype=np.bool_)
    if request.prefilled_on is not None:
        return pools.first_pool(view, pools.DECODE, pools.TURNING_TO_DECODE)
    if request.aggregated_because:
        return np.ones(len(view.names), dtype=np.bool_)
    return pools.first_pool(view, pools.PREFILL, pools.TURNING_TO_PREFILL)


def _second_stage(
    view: ClusterView,
    request: RouteRequest,
    prefill: int,
    score: Callable[[Bools, RouteRequest], Floats],
) -> str | None:
    """Who goes on once the prompt is computed at `prefill`; None: the same."""
    if request.prefilled_on is not None or request.aggregated_because or pools.why_not_split(view):
        return None
    members = pools.first_pool(view, pools.DECODE, pools.TURNING_TO_DECODE, besides=prefill)
    return view.names[pools.least(score(members, request), members)]


def _until_turn(members: Bools, request: RouteRequest) -> Floats:
    """How many turns each of the members is away from its own."""
    places = np.cumsum(members) - 1
    return ((places - request.number) % max(int(members.sum()), 1)).astype(np.float64)
