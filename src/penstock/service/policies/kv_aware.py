"""Routing by where the KV is, in one number: the predicted time to first token.

Hit tokens, their tier, the cost of fetching what another instance holds, and the queue are all
seconds of the same sum, so a popular prefix draws requests only while its owner's queue is worth
the computation it saves. Dynamo's KV router and Mooncake's Conductor weigh the same things; there
they are block counts under tuned weights and a TTFT estimate (docs/design/policies.md).
"""

from __future__ import annotations

import numpy as np

from penstock.service.policies.outlook import Outlook, look
from penstock.service.policies.pools import least
from penstock.service.policies.simple import by_time
from penstock.service.policies.view import (
    KEPT,
    ClusterView,
    Decision,
    Floats,
    RouteRequest,
    best_few,
)

#: Predicted times that differ by less of the time that the prompt itself takes are the same.
_ALIKE = 0.05


def kv_aware(view: ClusterView, request: RouteRequest) -> Decision:
    assert view.names, "a decision needs at least one candidate"
    o = look(view, request)
    score = by_time(o)
    i = _in_turn(o, score, request)
    turn = "" if i == int(score.argmin()) else "; it is its turn among those as good as the first"
    best = [i, *(other for other in best_few(score) if other != i)][:KEPT]
    source, source_tokens = o.source_of(best[0])
    return Decision(
        policy="kv-aware",
        instance=view.names[best[0]],
        candidates=o.candidates(best),
        reason=f"{explain(o, best[0], request)}{turn}{o.doubt(best[0])}",
        source=source,
        source_tokens=source_tokens,
    )


def _in_turn(o: Outlook, score: Floats, request: RouteRequest) -> int:
    """Of those who are as good as the best one, whose turn it is: who holds as much, and is within
    what predictions may err by. Otherwise under a light load the one whose model flatters it most
    would get every new prompt, and lose old ones for it, while the caches of others stay empty."""
    first = int(score.argmin())
    held = o.hits_WI[0]
    own_s = o.speeds.ratio[first] * o.prefill_WI[o.way(first), first]
    alike = (score <= score[first] + _ALIKE * own_s) & (held == held[first])
    if np.count_nonzero(alike) < 2:
        return first
    turns = (np.arange(len(score)) - request.number) % len(score)
    return least(turns.astype(np.float64), alike)


def explain(o: Outlook, i: int, request: RouteRequest) -> str:
    """One sentence about instance `i`, with the numbers that decided."""
    c = o.candidate(i)
    source, _ = o.source_of(i)
    if source is not None:
        cached = f"fetches {c.hit_tokens} of {request.num_tokens} tokens from {source} in "
        cached += f"{1e3 * c.fetch_s:.1f} ms"
    elif c.fetch_s:
        cached = f"loads {c.hit_tokens} of {request.num_tokens} tokens from its slower tiers in "
        cached += f"{1e3 * c.fetch_s:.1f} ms"
    else:
        cached = f"holds {c.hit_tokens} of {request.num_tokens} tokens"
    return (
        f"{c.instance} answers first: it {cached}, queue {1e3 * c.queue_s:.1f} ms, "
        f"prefill {1e3 * c.prefill_s:.1f} ms, {1e3 * c.predicted_ttft_s:.1f} ms predicted"
    )
