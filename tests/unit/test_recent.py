"""Windows over the last seconds, against plain recounting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.service.recent import RATE_WINDOW_S, Rate, Recent

times = st.lists(st.floats(0, 30), min_size=1, max_size=60)


@given(times, st.floats(0, 20), st.floats(1, 10))
def test_only_the_window_counts(gaps: list[float], later_s: float, window_s: float) -> None:
    recent = Recent(window_s=window_s)
    now = 100.0
    added = []
    for gap_s in gaps:
        now += gap_s
        recent.add(gap_s, now)
        added.append((now, gap_s))
    now += later_s
    left = sorted(value for at, value in added if at >= now - window_s)
    found = recent.summary(now, slo=1.0)
    assert found.count == len(left)
    if left:
        assert found.mean == pytest.approx(np.mean(left))
        assert found.p50 == left[len(left) // 2]
        assert found.within_slo == np.mean([v <= 1.0 for v in left])


def test_a_flood_costs_no_memory() -> None:
    recent = Recent(capacity=10)
    for i in range(1000):
        recent.add(float(i), 0.0)
    assert recent.summary(0.0).count == 10
    assert recent.summary(0.0).mean == pytest.approx(994.5)


@given(st.lists(st.tuples(st.floats(0, 25), st.integers(1, 9)), max_size=50), st.floats(0, 25))
def test_rates_are_what_a_recount_says(moves: list[tuple[float, int]], later_s: float) -> None:
    rate, now, added = Rate(), 50.0, []
    for gap_s, count in moves:
        now += gap_s
        rate.add(count, now)
        added.append((int(now), count))
    now += later_s
    counted = sum(count for second, count in added if second >= int(now) - RATE_WINDOW_S)
    if not moves:
        assert rate.per_second(now) == 0.0
        return
    span_s = min(RATE_WINDOW_S + now % 1, now - (50.0 + moves[0][0]))
    assert rate.per_second(now) == pytest.approx(counted / max(span_s, 1.0))
