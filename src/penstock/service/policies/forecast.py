"""How much work is coming: rates of requests and of prompt tokens.

Holt's linear smoothing (C. Holt, 1957) over bins of a second gives a level and a trend; beside it a
fast average sees bursts, which the slow one would average away. What is expected is the greater of
the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from penstock.service.policies.view import Floats


@dataclass(frozen=True, slots=True)
class Work:
    """What arrives in a second, as expected."""

    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0

    @property
    def mean_prompt_tokens(self) -> float:
        return self.prompt_tokens_per_s / self.requests_per_s if self.requests_per_s else 0.0

    @property
    def mean_output_tokens(self) -> float:
        return self.output_tokens_per_s / self.requests_per_s if self.requests_per_s else 0.0


@dataclass(frozen=True, slots=True)
class ForecastConfig:
    bin_s: float = 1.0
    #: Time constants of the level, of its trend, and of the fast average.
    level_s: float = 20.0
    trend_s: float = 60.0
    burst_s: float = 3.0
    #: The trend is believed for so long.
    horizon_s: float = 5.0


#: Requests that make a mean.
_ENOUGH = 400.0


def _zeros() -> Floats:
    return np.zeros(2)


@dataclass(slots=True)
class Forecast:
    """`observe` arrivals; `work`."""

    config: ForecastConfig = field(default_factory=ForecastConfig)
    _begun_s: float | None = None
    _bin_end_s: float = 0.0
    _bins: int = 0
    #: Requests and prompt tokens of the bin that is being filled.
    _bin: Floats = field(default_factory=_zeros)
    _level: Floats = field(default_factory=_zeros)
    _trend: Floats = field(default_factory=_zeros)
    _fast: Floats = field(default_factory=_zeros)

    def observe(self, now: float, prompt_tokens: int) -> None:
        """A request with that prompt has come."""
        self._advance(now)
        self._bin += (1.0, prompt_tokens)

    def work(self, now: float, mean_output_tokens: float) -> Work:
        """What is expected over the next `horizon_s`, if answers are so long. Rates are never
        negative."""
        self._advance(now)
        coming = self._level + self._trend * (self.config.horizon_s / self.config.bin_s)
        rates = np.maximum(np.maximum(coming, self._fast), 0.0) / self.config.bin_s
        if self._bins == 0 and self._begun_s is not None:  # the first bin is all there is
            rates = self._bin / self.config.bin_s
        requests, prompt_tokens = (float(rate) for rate in rates)
        return Work(requests, prompt_tokens, requests * mean_output_tokens)

    def _advance(self, now: float) -> None:
        if self._begun_s is None:
            self._begun_s = now
            self._bin_end_s = now + self.config.bin_s
        # After a long silence what was known is forgotten all the same; its bins need no counting.
        forgotten_s = 20 * self.config.trend_s
        if now - self._bin_end_s > forgotten_s:
            self._bin_end_s = now - forgotten_s
        while now >= self._bin_end_s:
            self._close_bin()
            self._bin_end_s += self.config.bin_s

    def _close_bin(self) -> None:
        c, bins = self.config, self._bins + 1
        # As many bins as hold so many requests that chance has little part in it.
        level_s = min(max(c.bin_s * _ENOUGH / max(self._level[0], 1e-9), c.burst_s), c.level_s)
        # While there are few bins they weigh the same, as in a plain mean.
        alpha = max(c.bin_s / level_s, 1.0 / bins)
        beta = c.bin_s / c.trend_s
        # The more arrivals a bin has, the less of it is chance.
        fast = max(c.bin_s / c.burst_s, 1.0 / bins, 1.0 - 1.0 / math.sqrt(1.0 + self._bin[0]))
        before = self._level
        self._level = alpha * self._bin + (1.0 - alpha) * (before + self._trend)
        if bins > 1:
            self._trend = beta * (self._level - before) + (1.0 - beta) * self._trend
        self._fast = fast * self._bin + (1.0 - fast) * self._fast
        self._bin = _zeros()
        self._bins = bins
