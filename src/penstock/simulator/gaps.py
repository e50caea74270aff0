"""Seconds between two tokens of one sequence, over a whole run, in little memory."""

from __future__ import annotations

import math
from collections import Counter

#: Buckets are so much wider than the one before: what is read back is off by half of it at most.
_WIDTH = 1.02
_PER_LOG = 1.0 / math.log(_WIDTH)


class GapHistogram:
    """Counts in buckets that are 2% wide."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        #: Gaps of less than a nanosecond: tokens that came together.
        self._none = 0

    def add(self, gap_s: float, count: int = 1) -> None:
        """`count` tokens in a row came `gap_s` after the one before."""
        if gap_s < 1e-9:
            self._none += count
        else:
            self._counts[round(math.log(gap_s) * _PER_LOG)] += count

    def quantile(self, share: float) -> float:
        """The gap that `share` of all gaps do not exceed, in seconds; 0 where there was none."""
        wanted = share * (self._none + self._counts.total())
        reached = self._none
        if reached >= wanted:
            return 0.0
        for bucket in sorted(self._counts):
            reached += self._counts[bucket]
            if reached >= wanted:
                return float(_WIDTH**bucket)
        raise AssertionError("the last bucket reaches every share")
