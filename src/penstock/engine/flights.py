"""The batches that are with the runner, and when they are predicted to end.

A run, a batch of several steps, stands for as many batches: `begun` says how many of them would
have been launched by now, and whatever comes is treated as if just those were in flight.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec

from penstock.engine.cost import Features
from penstock.engine.scheduler.batch import Batch
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class PrepareAhead:
    """A step is prepared this long before its predecessor's predicted end (or right away if steps
    are shorter): late enough to take in new arrivals, early enough that the device never waits."""

    seconds: float = 0.006
    fraction: float = 0.15

    def of(self, step_s: float, residual_s: float) -> float:
        return max(self.seconds, self.fraction * step_s, 2 * residual_s)


@dataclass(slots=True)
class Flight:
    batch: Batch
    features: Features
    launched_s: float
    #: None while nothing can be predicted.
    times: StepTimes | None
    #: There was work ever since its predecessor ended.
    follows: bool
    #: `Scheduler.num_changes` when it was launched: as long as it stays so, the run may go on.
    changes: int
    #: The runner has been told to end the run; the answer is still to come.
    is_being_shortened: bool = False

    @property
    def predicted_s(self) -> float:
        return self.times.total_s if self.times is not None else 0.0


class Flights(deque[Flight]):
    """The first is computed, those behind it wait for the device."""

    def __init__(self, ahead: PrepareAhead) -> None:
        super().__init__()
        self._ahead = ahead
        #: When the device is predicted to have done all it was given.
        self.free_at_s = 0.0

    @property
    def first(self) -> Flight:
        return self[0]

    @property
    def last(self) -> Flight:
        return self[-1]

    def launched(self, flight: Flight, now: float) -> None:
        self.append(flight)
        self.free_at_s = max(self.free_at_s, now) + flight.predicted_s

    def ended(self, now: float) -> Flight:
        flight = self.popleft()
        # Predictions err; what is left in flight starts now, whatever was thought before.
        self.free_at_s = now + sum([f.predicted_s for f in self])
        return flight

    def shortened(self, steps: int, now: float) -> None:
        """The last one will have only so many steps, and ends with the present one or the next."""
        flight = self[-1]
        assert flight.times is not None, "runs have been predicted"
        times = flight.times.shortened(steps)
        end_s = self.free_at_s - flight.times.total_s + times.total_s
        if len(self) == 1 and steps < flight.times.steps:
            end_s = min(max(end_s, now), now + 2 * times.of_step(steps))
        self.free_at_s = end_s
        flight.batch = msgspec.structs.replace(flight.batch, steps=steps)
        flight.features = flight.features._replace(steps=steps)
        flight.times, flight.is_being_shortened = times, False

    def hold_back(self, scheduler: Scheduler) -> bool:
        """Must a run be waited for: because where its sequences will stand is not known yet, or
        because they may lose their blocks?"""
        if not self or self[-1].batch.steps == 1:
            return False
        return self[-1].is_being_shortened or scheduler.foresight.may_preempt()

    # --- as time passes ------------------------------------------------------------------------

    def prepare_at_s(self, residual_s: float) -> float:
        """When the next batch should be put together: at once if the device idles or nothing is
        known, else shortly before it is predicted to fall idle."""
        if not self:
            return 0.0
        times = self[-1].times
        if times is None:
            return 0.0
        last_s = times.of_step(times.steps)
        ahead_s = self._ahead.of(last_s, residual_s)
        if times.steps > 1:
            ahead_s = min(ahead_s, last_s)
        return self.free_at_s - ahead_s

    def ahead_s(self, now: float, residual_s: float) -> float:
        """How long before its end the step under way has the next one behind it."""
        times = self[-1].times
        assert times is not None, "runs have been predicted"
        number = times.under_way(now - (self.free_at_s - times.total_s))
        return self._ahead.of(times.of_step(number), residual_s)

    def begun(self, now: float, residual_s: float) -> int:
        """How many steps of the last batch would have been launched by now, were they batches of
        their own: the one that is computed, and the next one if it is time to prepare it."""
        last = self[-1]
        times = last.times
        if times is None or times.steps == 1 or len(self) > 1:
            return 1
        elapsed_s = now - (self.free_at_s - times.total_s)
        number = times.under_way(elapsed_s)
        ahead_s = self._ahead.of(times.of_step(number), residual_s)
        is_next_due = elapsed_s >= times.end_s(number) - ahead_s
        return min(number + is_next_due, times.steps)

    def not_begun(self, now: float, residual_s: float) -> int:
        """How many would not."""
        if not self:
            return 0
        return self[-1].batch.steps - self.begun(now, residual_s)

    def end_in_s(self, now: float, not_begun: int) -> float:
        """Until the end of what has begun."""
        if not self:
            return 0.0
        end_s, times = self.free_at_s, self[-1].times
        if not_begun and times is not None:
            end_s -= times.total_s - times.end_s(times.steps - not_begun)
        return max(0.0, end_s - now)

    def done(self, now: float) -> tuple[int, float]:
        """How many steps of the run under way have been computed, and for how long."""
        if len(self) != 1 or (times := self[0].times) is None:
            return 0, 0.0
        number = times.under_way(now - (self.free_at_s - times.total_s)) - 1
        return number, times.end_s(number)
