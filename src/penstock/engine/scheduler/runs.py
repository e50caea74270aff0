"""Runs that end earlier than they were meant to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.queue import WaitingQueue
from penstock.engine.scheduler.sequence import Sequence, State
from penstock.engine.scheduler.step import InFlight, Totals
from penstock.protocol.request import RequestClass


def shorten(
    flight: InFlight,
    steps: int,
    pool: BlockPool,
    queues: Mapping[RequestClass, WaitingQueue],
    totals: Totals,
    block_tokens: int,
) -> None:
    """Give back what was set aside, and undo what was counted, for all but the first `steps`."""
    num_surplus = flight.steps - steps
    for seq, blocks in surplus(flight, num_surplus, block_tokens):
        seq.num_placeholders -= num_surplus
        queues[seq.request_class].charge(seq.flow, -num_surplus)
        if blocks is not None:
            seq.num_computed -= num_surplus
            del seq.blocks[len(seq.blocks) - len(blocks) :]
            pool.release(blocks)
    totals.scheduled_tokens -= num_surplus * len(flight.rows)
    flight.steps = steps


def surplus(
    flight: InFlight, num_steps: int, block_tokens: int
) -> Iterator[tuple[Sequence, list[int] | None]]:
    """Whose steps the last `num_steps` are, and which blocks only those need; None: the sequence
    has lost the blocks it had then."""
    for seq, _, run in flight.rows if num_steps else ():
        if seq.state is State.FINISHED:
            continue
        here = run == seq.run and seq.state is State.RUNNING
        needed = -(-(seq.num_computed - num_steps) // block_tokens)
        yield seq, seq.blocks[needed:] if here else None
