"""Recounting what the scheduler believes of its sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.engine.scheduler.sequence import Sequence as Seq
from penstock.engine.scheduler.sequence import State
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
