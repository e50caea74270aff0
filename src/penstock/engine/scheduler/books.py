"""Counting what the scheduler has, and recounting what it believes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.imports import Import
from penstock.engine.scheduler.runs import surplus
from penstock.engine.scheduler.sequence import CLASSES, State
from penstock.engine.scheduler.sequence import Sequence as Seq
from penstock.engine.scheduler.step import Claims, InFlight, SchedulerStats, Totals


def check_claims(claims: Claims) -> None:
    for owner in claims.owners():
        running = isinstance(owner, Seq) and owner.state is State.RUNNING
        assert running or (isinstance(owner, Import) and owner.claiming), "a claim for ever"


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
    flying = Counter[Seq]()
    for flight in flights:
        flying.update({seq: flight.steps for seq, row, _ in flight.rows if row.samples})
    for seq in live:
        assert flying[seq] == seq.num_placeholders, "placeholders without a step"


def stats_of(
    waiting: Sequence[Seq],
    running: Sequence[Seq],
    pool: BlockPool,
    totals: Totals,
    last: InFlight,
    num_steps: int,
    block_tokens: int,
) -> SchedulerStats:
    """Without the last `num_steps` steps of the run `last`."""
    prefills = prefill_tokens_left = waiting_tokens = running_tokens = decode_context_tokens = 0
    for seq in waiting:
        waiting_tokens += len(seq.token_ids)
        if (left := seq.num_to_compute) > 1:
            prefills += 1
            prefill_tokens_left += left
    for seq in running:
        num_tokens = seq.num_tokens
        running_tokens += num_tokens
        if (left := seq.num_to_compute) > 1:
            prefills += 1
            prefill_tokens_left += left
        else:
            decode_context_tokens += num_tokens
    kept = [blocks for _, blocks in surplus(last, num_steps, block_tokens) if blocks is not None]
    surplus_tokens = num_steps * len(kept)
    return SchedulerStats(
        waiting=_by_class(waiting),
        running=_by_class(running),
        waiting_tokens=waiting_tokens,
        running_tokens=running_tokens - surplus_tokens,
        prefills=prefills,
        prefill_tokens_left=prefill_tokens_left,
        decode_context_tokens=decode_context_tokens - surplus_tokens,
        kv_blocks_used=pool.num_held - sum(map(len, kept)),
        kv_blocks_cached=pool.num_reusable,
        kv_blocks_total=pool.num_blocks,
        steps=totals.steps,
        scheduled_tokens=totals.scheduled_tokens,
        preemptions=totals.preemptions,
        prefix_hit_tokens=totals.prefix_hit_tokens,
        prefix_query_tokens=totals.prefix_query_tokens,
    )


def _by_class(sequences: Sequence[Seq]) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(CLASSES, 0)
    for seq in sequences:
        counts[seq.request_class] += 1
    return counts
