"""What each instance could do for one request: its predicted times, and how they come about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from penstock.service.policies import predict
from penstock.service.policies.predict import Queues
from penstock.service.policies.view import (
    Bools,
    Candidate,
    ClusterView,
    Floats,
    RouteRequest,
    Speeds,
    Way,
    WayKind,
    some,
)


@dataclass(frozen=True, slots=True)
class Outlook:
    """By instance (I), and by the ways (W) of coming to the prompt's KV: computing what the device
    does not hold, loading from slower tiers, getting it from a peer (`source`)."""

    view: ClusterView
    speeds: Speeds
    queues: Queues
    ttft_s: Floats
    ways: tuple[WayKind, ...]
    hits_WI: Floats
    fetch_WI: Floats
    prefill_WI: Floats
    ttft_WI: Floats
    tpot_s: Floats
    source: str | None = None
    #: Candidates name all ways, not only the fastest.
    shows_ways: bool = False

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
            ways=self._all_ways(i) if self.shows_ways else (),
        )

    def _all_ways(self, i: int) -> tuple[Way, ...]:
        """Those that bring something, and computing; the fastest first."""
        found = [
            Way(kind, float(self.ttft_WI[w, i]), int(self.hits_WI[w, i]), self._source_by(w))
            for w, kind in enumerate(self.ways)
            if w == 0 or self.hits_WI[w, i] > self.hits_WI[0, i]
        ]
        return tuple(sorted(found, key=lambda way: way.predicted_s))

    def _source_by(self, w: int) -> str | None:
        return self.source if self.ways[w] == "fetch" else None

    def candidates(self, places: Iterable[int]) -> tuple[Candidate, ...]:
        return tuple(self.candidate(i) for i in places)

    def source_of(self, i: int) -> tuple[str | None, int]:
        """The peer that instance `i` should fetch from, and how many tokens."""
        w = self.way(i)
        if self.ways[w] != "fetch":
            return None, 0
        return self.source, int(self.hits_WI[w, i])

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
    q = predict.queues(view, s, n, request.expected_output_tokens, request.max_step_s)
    ways, hits_WI, fetch_WI, source = _ways(view, request)
    prefill_WI = predict.prefill_s(s, q, n, hits_WI)
    # Fetching goes on while the request queues.
    ttft_WI = s.ratio * (np.maximum(q.queue_s, fetch_WI) + prefill_WI)
    ttft_s = ttft_WI[0] if len(ways) == 1 else ttft_WI.min(axis=0)
    tpot_s = predict.tpot_s(view, s, q, n, request.max_step_s)
    return Outlook(
        view, s, q, ttft_s, ways, hits_WI, fetch_WI, prefill_WI, ttft_WI, tpot_s, source,
        request.interrupted,
    )  # fmt: skip


def _ways(
    view: ClusterView, request: RouteRequest
) -> tuple[tuple[WayKind, ...], Floats, Floats, str | None]:
    """Ways, their hits and fetching times (W, I), and the peer of the last one. Where a way brings
    nothing it is no faster than computing, which stands before it."""
    device, tiers, t = request.device_hits, request.tier_hits, view.transfer
    if device is None:
        nothing = np.zeros((1, len(view.names)))
        if not request.held:
            return ("recompute",), nothing, nothing, None
        device = nothing[0]
    ways: list[WayKind] = ["recompute"]
    hits, fetch = [device], [np.zeros_like(device)]
    if tiers is not None:
        missing = tiers - device
        if some(missing):
            ways.append("restore")
            hits.append(tiers)
            fetch.append(t.tier_s + missing * t.tier_token_s)
    name, held, near = _most(view, device, request)
    missing = np.maximum(held - device, 0.0)
    if some(missing):
        cost_s = t.copy_s + missing * t.copy_token_s
        ways.append("fetch")
        hits.append(np.maximum(device, held))
        fetch.append(np.where(near, t.map_s + missing * t.map_token_s, cost_s))
    return tuple(ways), np.array(hits), np.array(fetch), name


def _most(view: ClusterView, device: Floats, request: RouteRequest) -> tuple[str, float, Bools]:
    """The peer that holds most on its device: two sources of nearly the same are not weighed. Its
    name, its tokens, and who shares its host."""
    source = int(device.argmax())
    most = float(device[source])
    outside = max(request.held, key=lambda held: held.tokens, default=None)
    if outside is not None and outside.tokens > most:
        return outside.name, float(outside.tokens), outside.near
    return view.names[source], most, view.hosts == view.hosts[source]
