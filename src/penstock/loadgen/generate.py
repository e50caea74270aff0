"""Traces made up: bursts, tides, lengths, and sessions that come back with all that was said.

    generate:rate=4,duration=10m,cv=3,input=1500,output=250,turns=4,seed=7

Arrivals are a renewal process with gamma gaps (vLLM's `burstiness` is their shape), stretched in
time so that their rate follows a tide: a unit process mapped through the inverse of the cumulative
rate (Brown et al., "The time-rescaling theorem", 2002). One seed, one trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.loadgen.traces import (
    HASH_BLOCK_TOKENS,
    Rates,
    TraceRequest,
    read_lengths,
    read_rates,
)
from penstock.protocol.errors import ConfigError

PREFIX = "generate:"
Floats = npt.NDArray[np.float64]
#: More requests than this are a mistake in the words.
_MOST = 5_000_000
#: Sessions that have begun this many mean lives before the first request are still heard of.
_WARM_UP_LIVES = 4
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedTrace:
    """What a trace is to be like. Lengths in tokens, drawn from log-normal distributions unless
    `pairs` has some to choose from."""

    #: Requests a second, on average; None: as `rates` says.
    rate: float | None = None
    duration_s: float | None = None
    requests: int | None = None
    #: Coefficient of variation of the gaps between arrivals; 1: Poisson.
    cv: float = 1.0
    #: The rate goes up and down by this share of itself, once a period.
    tide: float = 0.0
    #: Of the tide; what all of `rates` is squeezed into.
    period_s: float | None = None
    rates: Rates | None = None
    #: What a turn adds to the prompt; what it is answered with.
    input: float = 512.0
    input_cv: float = 1.0
    output: float = 128.0
    output_cv: float = 1.0
    pairs: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    #: Mean turns of a session; each begins with all that was said before.
    turns: float = 1.0
    #: Mean time from one turn to the next.
    think_s: float = 30.0
    #: Sessions begin with one of `systems` prompts of this length.
    system: int = 0
    systems: int = 1
    #: A session ends where its prompt would become longer.
    max_input: int = 128_000
    block: int = HASH_BLOCK_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "duration_s", "requests", "cv", "period_s", "input", "output",
                     "think_s", "systems", "max_input"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{PREFIX}{_word(name)}={value:g} has to be more than 0")
        for name in ("input_cv", "output_cv", "system", "tide"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{PREFIX}{name}={getattr(self, name):g} is negative")
        if self.rate is None and self.rates is None:
            raise ConfigError(f"{PREFIX} needs a rate (requests a second), or rates=FILE")
        if self.duration_s is None and self.requests is None:
            raise ConfigError(f"{PREFIX} needs a duration (10m) or a number of requests")
        if self.tide > 1 or (self.tide and self.rates):
            raise ConfigError(f"{PREFIX}tide is a share of the rate, up to 1, and not beside rates")
        for name in ("system",) if self.pairs else ("input", "system"):
            if getattr(self, name) > self.max_input:
                raise ConfigError(
                    f"{PREFIX}{name}={getattr(self, name):g} is more than "
                    f"max_input={self.max_input:g}, which no prompt is longer than"
                )
        if self.turns < 1:
            raise ConfigError(f"{PREFIX}turns={self.turns:g}: a session has at least one")
        if self.block < 16 or self.system % self.block:
            raise ConfigError(
                f"{PREFIX}block={self.block}, system={self.system}: a block has at least 16 "
                "tokens, and shared prompts are whole blocks"
            )
        if self.mean_rate * self.duration > _MOST:
            raise ConfigError(f"{PREFIX} would make more than {_MOST} requests")

    @property
    def mean_rate(self) -> float:
        if self.rate is not None:
            return self.rate
        assert self.rates is not None
        return float(np.average(self.rates.per_s, weights=_widths(self.rates)))

    @property
    def duration(self) -> float:
        if self.duration_s is not None:
            return self.duration_s
        assert self.requests is not None
        # Enough, even if few come at first; what is too much is cut off.
        return 2 * self.requests / self.mean_rate + 10 * self.think_s * (self.turns > 1)


def generate(spec: GeneratedTrace) -> list[TraceRequest]:
    """In order of arrival. Raises `ConfigError` where none would come."""
    dice = np.random.default_rng(spec.seed)
    blocks = _Blocks(spec)
    made: list[TraceRequest] = []
    for start_s in _session_starts(spec, dice):
        made += _session(spec, float(start_s), blocks, dice)
    made.sort(key=lambda r: r.arrival_s)
    made = [r for r in made if 0 <= r.arrival_s < spec.duration][: spec.requests]
    if not made:
        raise ConfigError(f"{PREFIX} makes no request in {spec.duration:g} s at this rate")
    first_s = made[0].arrival_s
    return [replace(r, arrival_s=r.arrival_s - first_s) for r in made]


def arrivals(number: int, rate: float, cv: float, seed: int) -> list[float]:
    """Times of so many arrivals of a steady process, the first at 0 s."""
    gaps = np.random.default_rng(seed).gamma(1 / cv**2, cv**2 / rate, max(number - 1, 0))
    return [0.0, *np.cumsum(gaps).tolist()][:number]


def _session_starts(spec: GeneratedTrace, dice: np.random.Generator) -> Floats:
    """From before 0 s on, so that at 0 s there are later turns as well as first ones."""
    warm_up_s = _WARM_UP_LIVES * spec.turns * spec.think_s if spec.turns > 1 else 0.0
    times, cumulative = _cumulative(spec, -warm_up_s, spec.duration)
    cumulative = cumulative / spec.turns
    shape, total = 1 / spec.cv**2, cumulative[-1]
    gaps: list[Floats] = []
    sum_of_gaps = 0.0
    while sum_of_gaps < total:
        more = dice.gamma(shape, spec.cv**2, max(64, int((total - sum_of_gaps) * 1.1)))
        gaps.append(more)
        sum_of_gaps += float(more.sum())
    at = np.cumsum(np.concatenate(gaps))
    return np.interp(at[at < total], cumulative, times)


def _cumulative(spec: GeneratedTrace, from_s: float, to_s: float) -> tuple[Floats, Floats]:
    """(times, requests that are to have come by then since `from_s`): grows strictly."""
    if spec.rates is None:
        period_s = spec.period_s or max(to_s, 1.0)
        points = 2 if not spec.tide else 2 + int(256 * min((to_s - from_s) / period_s + 1, 4096))
        times = np.linspace(from_s, to_s, points)
        turn = 2 * math.pi / period_s
        # The rate is mean * (1 + tide * sin(turn * t)): it begins at its mean and rises.
        waves = times - spec.tide / turn * np.cos(turn * times)
        return times, spec.mean_rate * (waves - waves[0])
    starts, widths = np.array(spec.rates.start_s), _widths(spec.rates)
    squeeze = spec.period_s / float(widths.sum()) if spec.period_s else 1.0
    lap_s = float(widths.sum()) * squeeze
    rates = np.array(spec.rates.per_s)
    rates = rates * (spec.mean_rate / float(np.average(rates, weights=widths)))
    laps = range(math.floor(from_s / lap_s), math.ceil(to_s / lap_s))
    edges = np.concatenate([starts * squeeze + lap * lap_s for lap in laps] + [[laps.stop * lap_s]])
    reached = np.concatenate([[0.0], np.cumsum(np.tile(rates, len(laps)) * np.diff(edges))])
    inside = edges[(edges > from_s) & (edges < to_s)]
    times = np.concatenate([[from_s], inside, [to_s]])
    found = np.interp(times, edges, reached)
    # Where the rate is 0 the inverse jumps: a hair's breadth keeps it a function.
    return times, found - found[0] + np.linspace(0, 1e-9, len(times))


def _widths(rates: Rates) -> Floats:
    starts = np.array(rates.start_s)
    gaps = np.diff(starts)
    return np.append(gaps, gaps[-1] if len(gaps) else 1.0)


class _Blocks:
    """Hash ids: those of the shared prompts come first, all others are given out once."""

    def __init__(self, spec: GeneratedTrace) -> None:
        self._size = spec.block
        self._of_a_system = spec.system // spec.block
        self._next = self._of_a_system * spec.systems

    def begin(self, system: int) -> tuple[int, ...]:
        first = system * self._of_a_system
        return tuple(range(first, first + self._of_a_system))

    def cover(self, ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """`ids` and as many new ones as that many tokens take."""
        fresh = -(-num_tokens // self._size) - len(ids)
        ids += tuple(range(self._next, self._next + fresh))
        self._next += max(fresh, 0)
        return ids


def _session(
    spec: GeneratedTrace, start_s: float, blocks: _Blocks, dice: np.random.Generator
) -> list[TraceRequest]:
    turns = int(dice.geometric(1 / spec.turns)) if spec.turns > 1 else 1
    shares = spec.turns > 1 or spec.system > 0
    ids = blocks.begin(int(dice.integers(spec.systems))) if spec.system else ()
    made: list[TraceRequest] = []
    at_s, said = start_s, spec.system
    for _ in range(turns):
        added, output = _lengths(spec, dice)
        if said + added > spec.max_input:
            if made:
                break
            added = spec.max_input - said
        prompt = max(said + added, 1)
        if shares:
            ids = blocks.cover(ids, prompt)
        made.append(TraceRequest(at_s, prompt, output, ids, spec.block))
        said = prompt + output
        at_s += float(dice.exponential(spec.think_s))
    return made


def _lengths(spec: GeneratedTrace, dice: np.random.Generator) -> tuple[int, int]:
    if spec.pairs:
        return spec.pairs[int(dice.integers(len(spec.pairs)))]
    return (
        _log_normal(spec.input, spec.input_cv, dice),
        _log_normal(spec.output, spec.output_cv, dice),
    )


def _log_normal(mean: float, cv: float, dice: np.random.Generator) -> int:
    variance = math.log(1 + cv**2)
    drawn = dice.lognormal(math.log(mean) - variance / 2, math.sqrt(variance))
    return max(1, round(drawn))


# --- in words -------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    """ "90", "90s", "10m", "2h", "500ms". Raises `ValueError`."""
    text = text.strip()
    unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if text.endswith(u)), "")
    value = float(text.removesuffix(unit)) * _UNITS.get(unit, 1.0)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_SECONDS = {"duration": "duration_s", "period": "period_s", "think": "think_s"}
_WHOLE = ("requests", "system", "systems", "max_input", "block", "seed")


def _word(name: str) -> str:
    return name.removesuffix("_s")


def parse(words: str) -> GeneratedTrace:
    """`generate:key=value,...` (the prefix may be missing). Raises `ConfigError`."""
    said: dict[str, Any] = {}
    for part in words.removeprefix(PREFIX).split(","):
        key, equals, value = part.strip().partition("=")
        if not equals:
            raise ConfigError(f"{PREFIX} takes key=value,...: {part!r} is none")
        if key in said:
            raise ConfigError(f"{PREFIX}{key} is said twice")
        said[key] = _value(key, value)
    values = {_SECONDS.get(key, key): value for key, value in said.items()}
    if "burstiness" in values:
        if "cv" in values:
            raise ConfigError(f"{PREFIX}cv and burstiness say the same: cv = 1 / sqrt(burstiness)")
        values["cv"] = 1 / math.sqrt(values.pop("burstiness"))
    if "lengths" in values:
        values["pairs"] = values.pop("lengths")
    return GeneratedTrace(**values)


def _value(key: str, text: str) -> Any:
    readers: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(_SECONDS, seconds),
        **dict.fromkeys(_WHOLE, int),
        "rates": _rates,
        "lengths": lambda name: tuple(read_lengths(Path(name))),
        "burstiness": _positive,
    }
    plain = {f.name for f in fields(GeneratedTrace)} - {"pairs", *_SECONDS.values()}
    known = sorted(plain | readers.keys())
    if key not in known:
        raise ConfigError(f"{PREFIX} knows no {key!r}: it knows {', '.join(known)}")
    try:
        return readers.get(key, _finite)(text)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{PREFIX}{key}={text} cannot be understood") from None


def _positive(text: str) -> float:
    value = _finite(text)
    if value <= 0:
        raise ValueError(text)
    return value


def _rates(name: str) -> Rates:
    """FILE, or FILE:column."""
    path, colon, column = name.rpartition(":")
    if colon and not Path(name).exists():
        return read_rates(Path(path), column)
    return read_rates(Path(name))
