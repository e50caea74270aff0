"""Counting what the scheduler has, and recounting what it believes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from penstock.engine.scheduler.sequence import CLASSES, State
from penstock.engine.scheduler.sequence import Sequence as Seq
from penstock.engine.scheduler.step import InFlight


def check_sequences(
    running: Sequence[Seq], waiting: Sequence[Seq], live: Sequence[Seq], flights: Iterable[InFlight]
) -> None:
    """Assert that every live sequence is in one place, with counters that fit it and the steps in
    flight."""
    assert list(running) == sorted(running, key=lambda s: s.rank), "running by rank"
    places = [*running, *waiting]
    assert sorted(s.arrival for s in places) == sorted(s.arrival for s in live), (
        "a sequence is lost or in two places"
    )
    for seq in running:
        assert seq.state is State.RUNNING
        assert seq.num_confirmed <= seq.num_computed < seq.num_tokens <= seq.max_total_tokens
    for seq in waiting:
        assert seq.state is State.WAITING and not seq.blocks
    flying = [seq for flight in flights for seq, row, _ in flight.rows if row.samples]
    for seq in live:
        assert flying.count(seq) == seq.num_placeholders, "placeholders without a step"


def counts_of(waiting: Sequence[Seq], running: Sequence[Seq]) -> dict[str, Any]:
    """Fields of `SchedulerStats`."""
    prefills = [seq for seq in [*waiting, *running] if seq.num_to_compute > 1]
    return {
        "waiting": {c: sum(s.request_class == c for s in waiting) for c in CLASSES},
        "running": {c: sum(s.request_class == c for s in running) for c in CLASSES},
        "waiting_tokens": sum(len(s.token_ids) for s in waiting),
        "running_tokens": sum(s.num_tokens for s in running),
        "prefills": len(prefills),
        "prefill_tokens_left": sum(s.num_to_compute for s in prefills),
        "decode_context_tokens": sum(s.num_tokens for s in running if s.num_to_compute <= 1),
    }
