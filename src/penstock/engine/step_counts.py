"""Totals over the steps of an instance, as its `Load` carries them."""

from __future__ import annotations

from typing import Any

from penstock.engine.scheduler.batch import StepResult
from penstock.protocol.instance import NO_MAPS, MapCounts


class StepCounts:
    def __init__(self) -> None:
        self.steps = 0
        self._step_s = 0.0
        self._gaps = 0
        self._gap_s = 0.0
        self._maps: MapCounts = NO_MAPS

    def observe(self, result: StepResult, steps: int, follows: bool) -> None:
        """A batch of so many steps. `follows`: there was work all the time since the step before,
        so that a pause between the two was a loss."""
        self.steps += steps
        self._step_s += result.compute_s
        self._gaps += steps - 1
        if follows:
            self._gaps += 1
            self._gap_s += result.gap_s
        self._maps = result.maps

    def for_load(self, more_steps: int, more_s: float) -> dict[str, Any]:
        """Fields of `Load`, with so many steps of the run under way."""
        return {
            "steps": self.steps + more_steps,
            "step_s": self._step_s + more_s,
            "step_gaps": self._gaps,
            "step_gap_s": self._gap_s,
            "maps": self._maps,
        }
