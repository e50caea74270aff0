"""How long answers are, judged by those that are still being given as well as by those that ended.

Short answers end first. For as long as a long one takes, whoever counts only those that have ended
takes all answers for short: after a start, and whenever the load rises. So what is counted is how
often answers of each length end with their next token, of all that get so far; lengths follow from
that (E. Kaplan and P. Meier, 1958; here lengths of the same half of an octave share one rate, and
those that nobody has come to yet have that of the longest, or of all, whichever ends them sooner).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise

#: Weight of the newest answer.
_WEIGHT = 0.005
#: The share of answers that are shorter than `short_tokens`.
_SHORT = 0.1
#: So many ends before anything is said: eight, the first of them a little faded.
_ENOUGH = 7.5
#: Where bins of lengths begin: 0, 1, 2, 3, 4, 6, 8, 12, 16 ..., and where the last one ends.
_EDGES = [0, 1, *(n for k in range(1, 24) for n in (1 << k, 3 << k >> 1)), 1 << 24]
_WIDTHS = [end - start for start, end in pairwise(_EDGES)]


def _zeros() -> list[float]:
    return [0.0] * len(_WIDTHS)


@dataclass(slots=True)
class AnswerLengths:
    #: By bins of how many tokens were there before: tokens said, and ends after them.
    _said: list[float] = field(default_factory=_zeros)
    _ends: list[float] = field(default_factory=_zeros)
    _has_changed: bool = False
    _mean_tokens: float = 0.0
    _short_tokens: float = math.inf

    @property
    def mean_tokens(self) -> float:
        """0 until some have ended."""
        self._look()
        return self._mean_tokens

    @property
    def short_tokens(self) -> float:
        """Nine answers of ten are longer, about. Infinite until some have ended."""
        self._look()
        return self._short_tokens

    def said(self, before: int, after: int) -> None:
        """An answer of `before` tokens has `after` now."""
        while before < after:
            place = bisect_right(_EDGES, before) - 1
            end = min(after, _EDGES[place + 1])
            self._said[place] += end - before
            before = end

    def ended(self, num_tokens: int) -> None:
        """One of so many tokens, at least one, has ended."""
        keep = 1.0 - _WEIGHT
        self._said = [keep * n for n in self._said]
        self._ends = [keep * n for n in self._ends]
        self._ends[bisect_right(_EDGES, num_tokens - 1) - 1] += 1.0
        self._has_changed = sum(self._ends) >= _ENOUGH

    def _look(self) -> None:
        if not self._has_changed:
            return
        self._has_changed = False
        rate = sum(self._ends) / sum(self._said)
        left, mean, short, goes_on = 1.0, 0.0, 0.0, 1.0 - rate
        for place, width in enumerate(_WIDTHS):
            if self._said[place]:
                # As if one more answer of the usual rate had been seen: a single end is no rule.
                ends_with_next = (self._ends[place] + 1.0) / (self._said[place] + 1.0 / rate)
                goes_on = 1.0 - min(ends_with_next, 1.0 - 1e-9)
            else:
                goes_on = min(goes_on, 1.0 - rate)
            through = goes_on**width
            mean += left * (1.0 - through) / (1.0 - goes_on)
            if left > 1.0 - _SHORT >= left * through:
                short = _EDGES[place] + math.log((1.0 - _SHORT) / left) / math.log(goes_on)
            left *= through
            if left < 1e-3:
                break
        self._mean_tokens, self._short_tokens = mean, short
