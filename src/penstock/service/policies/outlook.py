"""What each instance could do for one request: its predicted times, and how they come about."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from penstock.service.policies import predict
from penstock.service.policies.predict import Queues, Speeds
from penstock.service.policies.view import (
    Bools,
    Candidate,
    ClusterView,
    Floats,
    RouteRequest,
    best_few,
)


@dataclass(frozen=True, slots=True)
class Outlook:
    """Arrays of length I. `source` is the place in the view of the peer from which `fetched`
    instances would get `hits` leading tokens; -1: no peer has more than they have."""

    view: ClusterView
    speeds: Speeds
    queues: Queues
    prefill_s: Floats
    fetch_s: Floats
    hits: Floats
    ttft_s: Floats
    source: int = -1
    fetched: Bools | None = None

    def candidate(self, i: int, num_tokens: int) -> Candidate:
        ratio = float(self.speeds.ratio[i])
        return Candidate(
            instance=self.view.names[i],
            predicted_ttft_s=float(self.ttft_s[i]),
            queue_s=ratio * float(self.queues.queue_s[i]),
            prefill_s=ratio * float(self.prefill_s[i]),
            fetch_s=float(self.fetch_s[i]),
            hit_tokens=int(self.hits[i]),
            predicted_tpot_s=float(predict.tpot_of(self.view, self.speeds, num_tokens, i)),
        )

    def candidates(self, score: Floats, num_tokens: int) -> tuple[Candidate, ...]:
        return tuple(self.candidate(i, num_tokens) for i in best_few(score))

    def source_of(self, i: int) -> tuple[str | None, int]:
        """The peer that instance `i` should fetch from, and how many tokens."""
        if self.fetched is None or not self.fetched[i]:
            return None, 0
        return self.view.names[self.source], int(self.hits[i])

    def doubt(self, i: int) -> str:
        """What to add to a reason if the numbers of instance `i` are not its own."""
        if self.speeds.believed[i]:
            return ""
        return (
            f"; {self.view.names[i]} is compared by its tokens at the fleet's speed, since "
            f"{predict.why_doubted(self.view, i)}"
        )


def look(view: ClusterView, request: RouteRequest) -> Outlook:
    """Predicted times on every instance, each by the way that is fastest there: computing what its
    device does not hold, loading from its slower tiers, or getting it from a peer."""
    s = predict.speeds(view)
    n = request.num_tokens
    q = predict.queues(view, s, n, request.expected_output_tokens)
    hits: Floats = np.zeros_like(q.queue_s) if request.device_hits is None else request.device_hits
    prefill = predict.prefill_s(s, q, n, hits)
    o = Outlook(view, s, q, prefill, np.zeros_like(prefill), hits, s.ratio * (q.queue_s + prefill))
    t = view.transfer
    if request.tier_hits is not None:
        missing = request.tier_hits - hits
        if missing.any():
            cost_s = np.where(missing > 0.0, t.tier_s + missing * t.tier_token_s, np.inf)
            o, _ = _or(o, n, request.tier_hits, cost_s)
    if request.device_hits is not None:
        o = _or_from_a_peer(o, n, request.device_hits)
    return o


def _or_from_a_peer(o: Outlook, num_tokens: int, device_hits: Floats) -> Outlook:
    """The peer is the one that holds most: two sources of nearly the same are not weighed."""
    source = int(device_hits.argmax())
    found = float(device_hits[source])
    if found <= float(device_hits.min()):
        return o
    view, t = o.view, o.view.transfer
    missing = found - device_hits
    near = view.hosts == view.hosts[source]
    cost_s = np.where(near, t.map_s + missing * t.map_token_s, t.copy_s + missing * t.copy_token_s)
    cost_s = np.where(missing > 0.0, cost_s, np.inf)  # who has it all needs no source
    o, fetched = _or(o, num_tokens, np.full_like(device_hits, found), cost_s)
    return replace(o, source=source, fetched=fetched)


def _or(o: Outlook, num_tokens: int, hits: Floats, fetch_s: Floats) -> tuple[Outlook, Bools]:
    """Take the other way wherever it is faster. Fetching goes on while the request queues."""
    prefill = predict.prefill_s(o.speeds, o.queues, num_tokens, hits)
    ttft = o.speeds.ratio * (np.maximum(o.queues.queue_s, fetch_s) + prefill)
    better = ttft < o.ttft_s
    return replace(
        o,
        prefill_s=np.where(better, prefill, o.prefill_s),
        fetch_s=np.where(better, fetch_s, o.fetch_s),
        hits=np.where(better, hits, o.hits),
        ttft_s=np.where(better, ttft, o.ttft_s),
    ), better
