"""The seam between deciding and computing: `launch(batch, done)`.

A runner stands for N ranks of one device kind. The torch runner computes; the simulator's runner is
a cost model. Whoever drives the core calls `launch` as often as the core says; batches finish in
order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from penstock.engine.scheduler.batch import Batch, StepResult


class Runner(Protocol):
    def launch(self, batch: Batch, done: Callable[[StepResult], None]) -> None:
        """Queue `batch`. `done` is called once with its result, from any thread."""

    def close(self) -> None:
        """Stop after the batches in flight; frees the device's memory."""
