"""A runner for large worlds: it takes the time a device would and looks at no block.

Every token it draws is the same. Whether tokens are right is what `runner.CostModelRunner` is for;
here only times and numbers count.
"""

from __future__ import annotations

from collections.abc import Callable

from penstock.engine.scheduler.batch import Batch, RowResult, StepResult
from penstock.simulator.runner import StepCost

TOKEN = 7


class CountingRunner:
    """`at(when_s, call)` schedules on the virtual clock; batches run one after the other."""

    def __init__(
        self,
        cost: StepCost,
        clock: Callable[[], float],
        at: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self.cost = cost
        self._clock = clock
        self._at = at
        self._free_at_s = 0.0
        self.closed = False
        #: Seconds computed since the start.
        self.busy_s = 0.0

    def launch(self, batch: Batch, done: Callable[[StepResult], None]) -> None:
        step_s = self.cost.of(batch)
        self._free_at_s = max(self._free_at_s, self._clock()) + step_s

        def finish() -> None:
            if self.closed:
                return
            self.busy_s += step_s
            rows = [RowResult(row.slot, [TOKEN] if row.samples else []) for row in batch.rows]
            done(StepResult(batch.step, rows, step_s))

        self._at(self._free_at_s, finish)

    def close(self) -> None:
        self.closed = True
