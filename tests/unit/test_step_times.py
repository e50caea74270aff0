"""Which step of a run is under way, against a search through the ends of all of them."""

from __future__ import annotations

from bisect import bisect_right

from hypothesis import example, given
from hypothesis import strategies as st

from penstock.engine.step_times import StepTimes

SECONDS = st.floats(0.0, 10.0)


@given(SECONDS, st.floats(0.0, 0.1), st.integers(1, 1024), st.integers(0, 1024), SECONDS)
@example(0.0, 0.0, 7, 0, 0.0)
@example(0.0, 0.01, 7, 3, 0.0)
@example(0.004, 1e-9, 1024, 1000, 0.0)
def test_the_step_under_way_is_the_first_that_has_not_ended(
    first_s: float, growth_s: float, steps: int, number: int, more_s: float
) -> None:
    times = StepTimes(first_s, growth_s, steps)
    for elapsed_s in (times.end_s(min(number, steps)), more_s, -more_s):
        ended = bisect_right(range(1, steps), elapsed_s, key=times.end_s)
        assert times.under_way(elapsed_s) == ended + 1
