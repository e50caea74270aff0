"""What experience says of predictions, by instance: how far to correct them, whether to believe
them, and how long blocks take to come. Fed by the service, read into the next `ClusterView`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.protocol.instance import MoveCounts
from penstock.protocol.kv import BLOCK_TOKENS, Fetched
from penstock.service.policies.view import TransferCosts

#: Weight of the newest observation, and by how much one may move the estimate at most: a request
#: that waited out a restart says little about the next one.
_GAIN = 0.1
_MOST_LOG = math.log(2.0)
#: Corrections stay within these; what needs more is not a matter of scale.
_LOG_LIMIT = math.log(8.0)
#: A miss by more than 10 times its size counts as that.
_MOST_MISS = math.log(11.0)


@dataclass(slots=True)
class TtftCorrection:
    """Follows the ratio of actual to predicted TTFT of one instance, in logarithms, so that twice
    as long and half as long weigh the same."""

    log_ratio: float = 0.0
    #: Mean relative error of late, of the corrected predictions.
    error: float = 0.0
    num_observed: int = 0

    @property
    def ratio(self) -> float:
        return math.exp(self.log_ratio)

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """`predicted_s` as the decision had it, that is corrected already."""
        if predicted_s <= 0.0 or actual_s <= 0.0:
            return  # nothing was predicted, or the clock has no resolution for it
        miss = math.log(actual_s) - math.log(predicted_s)
        self.num_observed += 1
        # The first observations count for more, or a wrong start would last.
        gain = max(_GAIN, 1.0 / (1.0 + self.num_observed))
        bounded = min(max(miss, -_MOST_LOG), _MOST_LOG)
        self.log_ratio += gain * bounded
        self.log_ratio = min(max(self.log_ratio, -_LOG_LIMIT), _LOG_LIMIT)
        relative = math.expm1(min(abs(miss), _MOST_MISS))
        self.error += gain * (relative - self.error)


@dataclass(slots=True)
class PrefillShare:
    """The share of one instance's time that goes to prompts, over about the last `window_s`."""

    window_s: float = 10.0
    _busy_s: float = 0.0
    _at_s: float | None = None

    def observe(self, now: float, prefill_s: float) -> None:
        """A prompt was given to it that takes `prefill_s` to compute."""
        self._decay(now)
        self._busy_s += prefill_s

    def share(self, now: float) -> float:
        self._decay(now)
        return min(self._busy_s / self.window_s, 1.0)

    def _decay(self, now: float) -> None:
        if self._at_s is not None:
            self._busy_s *= math.exp(-max(now - self._at_s, 0.0) / self.window_s)
        self._at_s = now


#: So many tokens that what a transfer takes once hardly counts.
_MANY_TOKENS = 4096
#: What a link can do is forgotten at this rate with each look at it (one in a heartbeat, at most).
_FORGOTTEN = 1.002


@dataclass(slots=True)
class _Line:
    """seconds = once + per_token * tokens: weighted least squares, old ones fading."""

    once_s: float
    per_token_s: float
    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        keep = 0.95
        self.weight = keep * self.weight + 1.0
        self.tokens = keep * self.tokens + tokens
        self.seconds = keep * self.seconds + seconds
        self.squares = keep * self.squares + tokens * tokens
        self.products = keep * self.products + tokens * seconds
        mean, mean_s = self.tokens / self.weight, self.seconds / self.weight
        variance = self.squares / self.weight - mean * mean
        if variance > 1e-6 * mean * mean:
            slope = (self.products / self.weight - mean * mean_s) / variance
        else:  # all of one size so far: keep the proportion that was guessed
            guessed = self.once_s + self.per_token_s * mean
            slope = self.per_token_s * mean_s / guessed
        self.per_token_s = min(max(slope, 0.0), mean_s / mean)
        self.once_s = max(mean_s - self.per_token_s * mean, 0.0)


@dataclass(slots=True)
class TransferFitter:
    """How long blocks take to come to one instance, by how they come."""

    _lines: dict[str, _Line] = field(default_factory=dict)
    #: Blocks that came over networks, the seconds of their jobs, and of the time that any of these
    #: took, when that was looked at last.
    _copied: tuple[int, float, float] = (0, 0.0, 0.0)
    #: Seconds a token that the link takes when it is at work: the least of late, since it also
    #: waits for who sends. 0: nothing has come.
    link_token_s: float = 0.0

    def __post_init__(self) -> None:
        guess = TransferCosts()
        for way in ("map", "copy", "tier"):
            once, token = getattr(guess, f"{way}_s"), getattr(guess, f"{way}_token_s")
            self._lines[way] = _Line(float(once), float(token))

    def observe(self, fetched: Fetched) -> None:
        """What came; what did not come says nothing about the speed."""
        ways = {"map": "map", "mooncake": "copy", "tcp": "copy"}
        if fetched.num_blocks and fetched.means:
            way = ways.get(fetched.means, "tier")
            self._lines[way].observe(fetched.num_blocks * BLOCK_TOKENS, fetched.seconds)

    def line(self, way: str) -> tuple[float, float]:
        """(seconds once, seconds a token) of "map", "copy" or "tier"."""
        line = self._lines[way]
        return line.once_s, line.per_token_s

    def restarted(self) -> None:
        """The instance's new process counts from zero."""
        self._copied = (0, 0.0, 0.0)

    def moved(self, moves: Sequence[MoveCounts]) -> None:
        """What an instance counts since its start. These are times of jobs: unlike those of a whole
        fetch they hold no waiting for prompts to be computed."""
        copies = [m for m in moves if m.means in ("tcp", "mooncake")]
        blocks, seconds = sum([m.blocks for m in copies]), sum([m.seconds for m in copies])
        busy_s = sum([m.busy_s for m in copies])
        tokens = (blocks - self._copied[0]) * BLOCK_TOKENS
        if tokens < 0:  # of a process that we have not met
            self.restarted()
        elif tokens >= _MANY_TOKENS:
            seconds_of_these = seconds - self._copied[1]
            token_s = (busy_s - self._copied[2]) / tokens
            self.link_token_s = min(_FORGOTTEN * self.link_token_s or token_s, token_s)
            self._copied = blocks, seconds, busy_s
            self._lines["copy"].observe(tokens, seconds_of_these)
