"""A runner that is a cost model: it takes the time a device would, and draws tokens from a hash.

The next token is a function of everything before it, so a request that was preempted, resumed or
moved must come out with exactly the tokens of an undisturbed run, or something read the wrong KV.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.engine.scheduler.batch import Batch, BatchRow, RowResult, StepResult


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step; the terms are those of `protocol.instance.CostModel`."""

    base_s: float = 0.004
    per_token_s: float = 0.00002
    per_row_s: float = 0.0001
    per_context_token_s: float = 0.0
    per_attention_s: float = 0.0

    def of(self, batch: Batch) -> float:
        rows = batch.rows
        seconds = self.base_s + self.per_token_s * batch.num_tokens + self.per_row_s * len(rows)
        if self.per_context_token_s or self.per_attention_s:
            reads = [row.start + row.num_tokens for row in rows]
            seconds += self.per_context_token_s * sum(reads)
            seconds += self.per_attention_s * sum(
                row.num_tokens * read for row, read in zip(rows, reads)
            )
        return seconds


def next_token(ids: Sequence[int], vocab_size: int) -> int:
    """The simulated model: a hash of the whole sequence so far."""
    digest = hashlib.sha256(array("I", ids).tobytes()).digest()
    return int.from_bytes(digest[:8], "little") % vocab_size


class CostModelRunner:
    """`at(when_s, call)` schedules on the virtual clock; batches run one after the other."""

    def __init__(
        self,
        cost: StepCost,
        vocab_size: int,
        clock: Callable[[], float],
        at: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._cost = cost
        self._vocab_size = vocab_size
        self._clock = clock
        self._at = at
        self._free_at_s = 0.0
        self._ids: dict[int, list[int]] = {}
        self.closed = False

    def launch(self, batch: Batch, done: Callable[[StepResult], None]) -> None:
        step_s = self._cost.of(batch)
        self._free_at_s = max(self._free_at_s, self._clock()) + step_s
        result = self._execute(batch, step_s)

        def finish() -> None:
            if not self.closed:
                done(result)

        self._at(self._free_at_s, finish)

    def close(self) -> None:
        self.closed = True

    def _execute(self, batch: Batch, step_s: float) -> StepResult:
        for slot in batch.freed_slots:
            self._ids.pop(slot, None)
        for new in batch.admitted:
            self._ids[new.slot] = list(new.token_ids)
        return StepResult(batch.step, [self._row(row) for row in batch.rows], step_s)

    def _row(self, row: BatchRow) -> RowResult:
        if not row.samples:
            return RowResult(row.slot, [])
        ids = self._ids[row.slot]
        end = row.start + row.num_tokens
        token = next_token(ids[:end], self._vocab_size)
        # The same position again (a surplus row after a stop) overwrites, as on a device.
        ids[end:] = [token]
        return RowResult(row.slot, [token])
