"""How long each step of a batch takes, as predicted or as simulated."""

from __future__ import annotations

import math
from typing import NamedTuple


class StepTimes(NamedTuple):
    """The first of `steps` steps takes `first_s`, each one after it `growth_s` more than the one
    before: in a run of steps only the context grows, and time is linear in it."""

    first_s: float
    growth_s: float = 0.0
    steps: int = 1

    @property
    def total_s(self) -> float:
        return self.steps * (self.first_s + self.growth_s * (self.steps - 1) / 2)

    def of_step(self, number: int) -> float:
        """Seconds of step `number`, which counts from 1."""
        return self.first_s + self.growth_s * (number - 1)

    def end_s(self, number: int) -> float:
        """Seconds from the start of the first step to the end of step `number`."""
        return number * (self.first_s + self.growth_s * (number - 1) / 2)

    def under_way(self, elapsed_s: float) -> int:
        """The step that is computed so long after the start of the first one."""
        if self.steps == 1 or elapsed_s < self.first_s:
            return 1
        # `end_s` solved for the number, in a form that holds without growth, too; then rounding is
        # put right.
        once_s = self.first_s - self.growth_s / 2
        root_s = math.sqrt(once_s * once_s + 2.0 * elapsed_s * self.growth_s)
        ended = self.steps - 1
        if once_s + root_s > 0.0:
            ended = min(ended, int(2.0 * elapsed_s / (once_s + root_s)))
        while ended < self.steps - 1 and self.end_s(ended + 1) <= elapsed_s:
            ended += 1
        while self.end_s(ended) > elapsed_s:
            ended -= 1
        return ended + 1

    def shortened(self, steps: int) -> StepTimes:
        return self._replace(steps=steps)
