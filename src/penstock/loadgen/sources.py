"""Where requests come from, in a word: a file with a trace, or `generate:...`; and its parts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from penstock.loadgen.generate import PREFIX, generate, parse
from penstock.loadgen.traces import TraceRequest, read_trace, spread_ticks, tick_of
from penstock.protocol.errors import ConfigError

_log = logging.getLogger(__name__)


def open_trace(
    source: str,
    *,
    speed: float = 1.0,
    window_s: float | None = None,
    limit: int | None = None,
) -> list[TraceRequest]:
    """The requests of a file or of `generate:...` (see `loadgen.generate`), `speed` times as fast.
    Of these the busiest stretch of `window_s`, and of that the first `limit`.

    Arrivals that share a tick of a clock that is known to be coarse are spread over it, which is
    logged as a warning. Raises `ConfigError`.
    """
    if not 0 < speed < float("inf"):
        raise ConfigError(f"a trace cannot come {speed:g} times as fast")
    if window_s is not None and not window_s > 0:
        raise ConfigError(f"a window of {window_s:g} s holds nothing")
    if source.startswith(PREFIX):
        requests = generate(parse(source))
    else:
        requests = _read(Path(source).expanduser(), limit if window_s is None else None)
    return busiest(faster(requests, speed), window_s)[:limit]


def _read(path: Path, limit: int | None) -> list[TraceRequest]:
    requests = read_trace(path, limit)
    tick_s = tick_of(path, requests)
    if tick_s is None:
        return requests
    _log.warning(
        "%s: its clock is coarse; requests at one time are spread evenly over %g s", path, tick_s
    )
    return spread_ticks(requests, tick_s)


def faster(requests: Sequence[TraceRequest], speed: float) -> list[TraceRequest]:
    """The same requests, `speed` times as fast."""
    return [replace(r, arrival_s=r.arrival_s / speed) for r in requests]


def busiest(requests: Sequence[TraceRequest], window_s: float | None) -> list[TraceRequest]:
    """The stretch of `window_s` with the most prompt and output tokens, beginning at 0 s; None, or
    longer than the trace: all of it."""
    if window_s is None:
        return list(requests)
    times = np.array([r.arrival_s for r in requests])
    if times[-1] - times[0] <= window_s:
        return list(requests)
    tokens = np.cumsum([0] + [r.input_tokens + r.output_tokens for r in requests])
    ends = np.searchsorted(times, times + window_s)
    first = int((tokens[ends] - tokens[: len(times)]).argmax())
    start_s = requests[first].arrival_s
    return [replace(r, arrival_s=r.arrival_s - start_s) for r in requests[first : ends[first]]]
