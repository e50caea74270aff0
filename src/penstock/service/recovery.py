"""Sequences that have lost their instance or leave it: who goes first, and what came of it.

Where each goes, and whether it computes its KV again, loads it from a slower tier or gets it from a
peer, the policies decide as they do for new requests: by the predicted time to the next token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.protocol.kv import KvSource
from penstock.service.cluster.instances import Instance
from penstock.service.cluster.view import LiveView
from penstock.service.explain import PlacementRecord
from penstock.service.journal import Entry
from penstock.service.policies import predict
from penstock.service.policies.view import Decision, Way, WayKind

WAYS: tuple[WayKind, ...] = ("recompute", "restore", "fetch")


def by_urgency(entries: Sequence[Entry], now: float) -> list[Entry]:
    """Those that are to be placed first come first: by class, priority, and how little time is left
    to keep what was promised. What is too late already comes after what can still be in time, and
    what has no SLO after both, in the order of arrival."""

    def key(entry: Entry) -> tuple[bool, int, int, float, float]:
        slack_s = _slack_s(entry, now)
        rank = 2 if slack_s == math.inf else int(slack_s < 0.0)
        return (
            entry.request_class != "online",
            entry.priority,
            rank,
            slack_s,
            entry.accepted_s,
        )

    return sorted(entries, key=key)


def _slack_s(entry: Entry, now: float) -> float:
    """Time left to the next token if the SLO is to hold; infinite without one."""
    first_s = entry.record.first_token_s
    if first_s is None:
        return math.inf if entry.ttft_slo_s is None else entry.accepted_s + entry.ttft_slo_s - now
    if entry.tpot_slo_s is None:
        return math.inf
    return first_s + entry.tpot_slo_s * len(entry.emitted) - now


def way_of(decision: Decision) -> Way | None:
    """The fastest one on the chosen instance; None where the policy has not compared them."""
    chosen = (c for c in decision.candidates if c.instance == decision.instance)
    return next((c.ways[0] for c in chosen if c.ways), None)


def way_taken(decision: Decision | None, source: KvSource | None) -> WayKind:
    """How an interrupted sequence is to go on, whoever decided that."""
    way = way_of(decision) if decision is not None else None
    if way is not None:
        return way.kind
    return "recompute" if source is None else "fetch"


def wait_for_each_other(
    view: LiveView, instances: dict[str, Instance], placed: Sequence[Entry], now: float
) -> None:
    """Sequences placed on one instance at one moment share its steps, so that each gets its token
    with the last of them in its step. Each was decided on with only those before it in the queue:
    add to its prediction what those behind it take."""
    together: dict[str, list[Entry]] = {}
    for entry in placed:
        if entry.instance is not None and entry.queued_tokens:
            together.setdefault(entry.instance, []).append(entry)
    for name, entries in together.items():
        if len(entries) < 2:
            continue
        seen = view.of([instances[name]], now)
        speeds = predict.speeds(seen)
        news = [entry.queued_tokens for entry in entries]
        longer_s = predict.company_s(seen, speeds, news, [entry.num_tokens for entry in entries])
        for entry, more_s in zip(entries, longer_s):
            record = entry.record.present
            if record is not None and record.predicted_ttft_s is not None:
                record.predicted_ttft_s += float(speeds.ratio[0]) * more_s


@dataclass(slots=True)
class Recovered:
    """Sums over the sequences that went on in one way."""

    num: int = 0
    #: Computed anew, of what the sequences had.
    recomputed_tokens: int = 0
    #: From the placement to the next token; of those for which that was predicted, and the sum of
    #: |predicted - actual|.
    num_predicted: int = 0
    predicted_s: float = 0.0
    actual_s: float = 0.0
    error_s: float = 0.0
    #: From the moment the service knew that the placement before was lost.
    waited_s: float = 0.0


@dataclass(slots=True)
class Recoveries:
    """What became of interrupted sequences, by the way that was chosen for them."""

    by_way: dict[WayKind, Recovered] = field(
        default_factory=lambda: {way: Recovered() for way in WAYS}
    )

    def went_on(self, entry: Entry, placement: PlacementRecord, now: float) -> None:
        """The first token after the interruption is here."""
        assert entry.interrupted_s is not None
        sums = self.by_way[placement.way or "recompute"]
        sums.num += 1
        sums.waited_s += now - entry.interrupted_s
        sums.recomputed_tokens += max(0, placement.num_tokens - (placement.cached_tokens or 0))
        predicted_s, actual_s = placement.predicted_ttft_s, placement.actual_ttft_s
        if predicted_s and actual_s is not None:
            sums.num_predicted += 1
            sums.predicted_s += predicted_s
            sums.actual_s += actual_s
            sums.error_s += abs(predicted_s - actual_s)
