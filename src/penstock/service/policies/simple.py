"""Policies that know nothing of caches: in turn, and by what waits."""

from __future__ import annotations

from penstock.service.policies.outlook import Outlook, look
from penstock.service.policies.view import (
    ClusterView,
    Decision,
    Floats,
    RouteRequest,
    best_few,
)


def round_robin(view: ClusterView, request: RouteRequest) -> Decision:
    """Each instance in turn, by the number of the request."""
    assert view.names, "a decision needs at least one candidate"
    turn = request.number % len(view.names)
    name = view.names[turn]
    reason = f"{name} is next: request {request.number} of {len(view.names)} instances in turn"
    candidates = look(view, request).candidates([turn])  # who has an SLO asks for the time
    return Decision(policy="round-robin", instance=name, candidates=candidates, reason=reason)


def least_load(view: ClusterView, request: RouteRequest) -> Decision:
    """The instance with the least predicted time to first token if nothing were cached: what waits
    there, plus this request, at the speed that the instance itself has measured. Ties go to the
    fewest tokens, then to the first name."""
    assert view.names, "a decision needs at least one candidate"
    blind = RouteRequest(
        num_tokens=request.num_tokens, expected_output_tokens=request.expected_output_tokens
    )
    o = look(view, blind)
    best = best_few(by_time(o))
    i = best[0]
    kept = o.candidates(best)
    reason = (
        f"{view.names[i]} answers first: {int(view.queued_tokens[i])} tokens queued, "
        f"{int(view.running[i])} sequences running, "
        f"{1e3 * kept[0].predicted_ttft_s:.1f} ms predicted{o.doubt(i)}"
    )
    return Decision(policy="least-load", instance=view.names[i], candidates=kept, reason=reason)


def by_time(o: Outlook) -> Floats:
    """Predicted TTFT as a score; equal times (nothing measured yet) are told apart by tokens and
    sequences, at a picosecond each."""
    score: Floats = o.ttft_s + 1e-12 * (o.view.queued_tokens + o.view.running - o.hits_WI[0])
    return score
