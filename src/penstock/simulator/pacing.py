"""The time that batches take on a virtual clock, one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

from msgspec.structs import replace

from penstock.engine.scheduler.batch import Batch, StepResult
from penstock.engine.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step; the terms are those of `protocol.instance.CostModel`."""

    base_s: float = 0.004
    per_token_s: float = 0.00002
    per_row_s: float = 0.0001
    per_context_token_s: float = 0.0
    per_attention_s: float = 0.0

    def of(self, batch: Batch) -> StepTimes:
        tokens = context = attention = 0
        for row in batch.rows:
            new = row.num_tokens
            read = row.start + new
            tokens += new
            context += read
            attention += new * read
        num_rows = len(batch.rows)
        first_s = self.base_s + self.per_token_s * tokens + self.per_row_s * num_rows
        first_s += self.per_context_token_s * context + self.per_attention_s * attention
        growth_s = (self.per_context_token_s + self.per_attention_s) * num_rows
        return StepTimes(first_s, growth_s, batch.steps)

    def scaled(self, factor: float) -> StepCost:
        """Of a device on which everything takes `factor` times as long."""
        return StepCost(*(factor * getattr(self, f.name) for f in fields(self)))


@dataclass(slots=True, eq=False)
class _Launched:
    batch: Batch
    start_s: float
    times: StepTimes
    done: Callable[[StepResult], None]

    @property
    def end_s(self) -> float:
        return self.start_s + self.times.total_s


class PacedRunner(ABC):
    """`at(when_s, call)` schedules on the virtual clock."""

    def __init__(
        self,
        cost: StepCost,
        clock: Callable[[], float],
        at: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self.cost = cost
        self.closed = False
        self._clock = clock
        self._at = at
        self._launched: deque[_Launched] = deque()
        self._free_at_s = 0.0
        self._busy_s = 0.0  # of batches that have ended

    @abstractmethod
    def execute(self, batch: Batch, seconds: float) -> StepResult:
        """What comes of a batch when its time is over: it sees whatever others have done to its
        blocks meanwhile."""

    def launch(self, batch: Batch, done: Callable[[StepResult], None]) -> None:
        start_s = max(self._free_at_s, self._clock())
        launched = _Launched(batch, start_s, self.cost.of(batch), done)
        self._launched.append(launched)
        self._wait_for(launched)

    def shorten(self, step: int, ahead_s: float) -> int:
        """End the run `step`, the batch launched last, with the step under way, or with the next
        one where that is due within `ahead_s`. Returns how many steps that makes."""
        launched = self._launched[-1]
        assert launched.batch.step == step, "only the last batch can be shortened"
        times, elapsed_s = launched.times, self._clock() - launched.start_s
        steps = 1
        if elapsed_s >= 0.0:
            steps = times.under_way(elapsed_s)
            if elapsed_s >= times.end_s(steps) - ahead_s:
                steps = min(steps + 1, times.steps)
        if steps < times.steps:
            launched.times = times.shortened(steps)
            self._wait_for(launched)
        return steps

    @property
    def busy_s(self) -> float:
        """Seconds computed since the start, in steps that have ended."""
        if not self._launched:
            return self._busy_s
        first = self._launched[0]
        ended = first.times.under_way(self._clock() - first.start_s) - 1
        return self._busy_s + first.times.end_s(ended)

    def close(self) -> None:
        """What has not ended never does; steps that had ended count."""
        self._busy_s = self.busy_s
        self._launched.clear()
        self.closed = True

    def _wait_for(self, launched: _Launched) -> None:
        self._free_at_s = launched.end_s
        self._at(launched.end_s, partial(self._finish, launched, launched.times.steps))

    def _finish(self, launched: _Launched, steps: int) -> None:
        if self.closed or steps != launched.times.steps:
            return  # it was shortened, and has ended before
        self._launched.popleft()
        seconds = launched.times.total_s
        self._busy_s += seconds
        batch = launched.batch
        if batch.steps != steps:
            batch = replace(batch, steps=steps)
        launched.done(self.execute(batch, seconds))
