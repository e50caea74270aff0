"""What each instance could do for one request: its predicted times, and how they come about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from penstock.service.policies import predict
from penstock.service.policies.predict import Queues
from penstock.service.policies.view import (
    Candidate,
    ClusterView,
    Floats,
    RouteRequest,
    Speeds,
)

_COMPUTE, _TIER, _PEER = "compute", "tier", "peer"


@dataclass(frozen=True, slots=True)
class Outlook:
    """By instance (I), and by the ways (W) of coming to the prompt's KV: computing what the device
    does not hold, loading from slower tiers, getting it from a peer (`source`)."""

    view: ClusterView
    speeds: Speeds
    queues: Queues
    ttft_s: Floats
    ways: tuple[str, ...]
    hits_WI: Floats
    fetch_WI: Floats
    prefill_WI: Floats
    ttft_WI: Floats
    tpot_s: Floats
    source: int = -1

    def way(self, i: int) -> int:
        """The place of the fastest way for instance `i`; the simplest one of equal ones."""
        return int(self.ttft_WI[:, i].argmin())

    def candidate(self, i: int) -> Candidate:
        ratio, w = float(self.speeds.ratio[i]), self.way(i)
        return Candidate(
            instance=self.view.names[i],
            predicted_ttft_s=float(self.ttft_s[i]),
            queue_s=ratio * float(self.queues.queue_s[i]),
            prefill_s=ratio * float(self.prefill_WI[w, i]),
            fetch_s=float(self.fetch_WI[w, i]),
            hit_tokens=int(self.hits_WI[w, i]),
            predicted_tpot_s=float(self.tpot_s[i]),
        )

    def candidates(self, places: Iterable[int]) -> tuple[Candidate, ...]:
        return tuple(self.candidate(i) for i in places)

    def source_of(self, i: int) -> tuple[str | None, int]:
        """The peer that instance `i` should fetch from, and how many tokens."""
        w = self.way(i)
        if self.ways[w] != _PEER:
            return None, 0
        return self.view.names[self.source], int(self.hits_WI[w, i])

    def doubt(self, i: int) -> str:
        """What to add to a reason if the numbers of instance `i` are not its own."""
        if self.speeds.believed[i]:
            return ""
        return (
            f"; {self.view.names[i]} is compared by its tokens at the fleet's speed, since "
            f"{predict.why_doubted(self.view, i)}"
        )


def look(view: ClusterView, request: RouteRequest) -> Outlook:
    """Predicted times on every instance, each by the way that is fastest there."""
    s = view.speeds or predict.speeds(view)
    n = request.num_tokens
    q = predict.queues(view, s, n, request.expected_output_tokens)
    ways, hits_WI, fetch_WI, source = _ways(view, request)
    prefill_WI = predict.prefill_s(s, q, n, hits_WI)
    # Fetching goes on while the request queues.
    ttft_WI = s.ratio * (np.maximum(q.queue_s, fetch_WI) + prefill_WI)
    ttft_s = ttft_WI[0] if len(ways) == 1 else ttft_WI.min(axis=0)
    tpot_s = predict.tpot_s(view, s, q, n)
    return Outlook(view, s, q, ttft_s, ways, hits_WI, fetch_WI, prefill_WI, ttft_WI, tpot_s, source)


def _ways(view: ClusterView, request: RouteRequest) -> tuple[tuple[str, ...], Floats, Floats, int]:
    """Ways, their hits and fetching times (W, I), and the peer of the last one or -1. Where a way
    brings nothing it is no faster than computing, which stands before it."""
    device, tiers, t = request.device_hits, request.tier_hits, view.transfer
    if device is None:
        nothing = np.zeros((1, len(view.names)))
        return (_COMPUTE,), nothing, nothing, -1
    ways, hits, fetch = [_COMPUTE], [device], [np.zeros_like(device)]
    if tiers is not None:
        missing = tiers - device
        if missing.any():
            ways.append(_TIER)
            hits.append(tiers)
            fetch.append(t.tier_s + missing * t.tier_token_s)
    # The peer is the one that holds most: two sources of nearly the same are not weighed.
    source = int(device.argmax())
    missing = device[source] - device
    if missing.any():
        near = view.hosts == view.hosts[source]
        cost_s = t.copy_s + missing * t.copy_token_s
        ways.append(_PEER)
        hits.append(np.full_like(device, device[source]))
        fetch.append(np.where(near, t.map_s + missing * t.map_token_s, cost_s))
    return tuple(ways), np.array(hits), np.array(fetch), source
