"""What happened of late: percentiles and rates over a sliding window, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

#: Long enough to be steady, short enough that a graph of it follows a change.
WINDOW_S = 60.0
RATE_WINDOW_S = 10


class Summary(msgspec.Struct, frozen=True):
    """Of the values of the last `WINDOW_S` seconds; None where there were none."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    #: Share of them within the objective; None without one.
    within_slo: float | None = None


def joined(parts: Iterable[Summary]) -> Summary:
    """Of the values of several places. Percentiles cannot be joined exactly: the highest of the
    parts is taken, which that of all values together does not exceed."""
    found = [part for part in parts if part.count]
    if not found:
        return Summary(0)
    count = sum(part.count for part in found)

    def mean(values: Iterable[float | None]) -> float | None:
        known = [(v, part.count) for v, part in zip(values, found) if v is not None]
        weight = sum(n for _, n in known)
        return sum(v * n for v, n in known) / weight if weight else None

    def highest(values: Iterable[float | None]) -> float | None:
        return max((v for v in values if v is not None), default=None)

    return Summary(
        count,
        mean(p.mean for p in found),
        highest(p.p50 for p in found),
        highest(p.p90 for p in found),
        highest(p.p99 for p in found),
        mean(p.within_slo for p in found),
    )


class Recent:
    """Values with their times. Over `capacity` the oldest goes, so that a flood costs no memory."""

    __slots__ = ("_values", "_window_s")

    def __init__(self, window_s: float = WINDOW_S, capacity: int = 2048) -> None:
        self._window_s = window_s
        self._values: deque[tuple[float, float]] = deque(maxlen=capacity)

    def add(self, value: float, now_s: float) -> None:
        self._values.append((now_s, value))

    def summary(self, now_s: float, slo: float | None = None) -> Summary:
        values = self._values
        while values and values[0][0] < now_s - self._window_s:
            values.popleft()
        if not values:
            return Summary(0)
        found = sorted(value for _, value in values)

        def rank(share: float) -> float:
            return found[min(len(found) - 1, int(share * len(found)))]

        within = None if slo is None else sum(v <= slo for v in found) / len(found)
        mean = sum(found) / len(found)
        return Summary(len(found), mean, rank(0.5), rank(0.9), rank(0.99), within)


class Rate:
    """Events a second over the last `window_s` whole seconds: a counter for each of them."""

    __slots__ = ("_counts", "_first_s", "_last_s", "_window_s")

    def __init__(self, window_s: int = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._counts = [0] * (window_s + 1)  # and the second under way
        self._first_s: float | None = None
        self._last_s = 0

    def add(self, count: int, now_s: float) -> None:
        if self._first_s is None:
            self._first_s, self._last_s = now_s, int(now_s)
        self._forget(int(now_s))
        self._counts[int(now_s) % len(self._counts)] += count

    def per_second(self, now_s: float) -> float:
        if self._first_s is None:
            return 0.0
        self._forget(int(now_s))
        # The whole seconds before this one and what has passed of it, or less at the beginning.
        span_s = min(self._window_s + now_s % 1, now_s - self._first_s)
        return sum(self._counts) / max(span_s, 1.0)

    def _forget(self, second: int) -> None:
        for passed in range(self._last_s + 1, min(second, self._last_s + len(self._counts)) + 1):
            self._counts[passed % len(self._counts)] = 0
        if second > self._last_s + len(self._counts):
            self._counts = [0] * len(self._counts)
        self._last_s = max(self._last_s, second)
