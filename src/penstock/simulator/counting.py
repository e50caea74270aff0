"""A runner for large worlds: it takes the time a device would and looks at no block.

Every token it draws is the same. Whether tokens are right is what `runner.CostModelRunner` is for;
here only times and numbers count.
"""

from __future__ import annotations

from penstock.engine.scheduler.batch import Batch, RowResult, StepResult
from penstock.simulator.pacing import PacedRunner

TOKEN = 7


class CountingRunner(PacedRunner):
    def execute(self, batch: Batch, seconds: float) -> StepResult:
        drawn = [TOKEN] * batch.steps
        rows = [RowResult(row.slot, drawn if row.samples else []) for row in batch.rows]
        return StepResult(batch.step, rows, seconds)
