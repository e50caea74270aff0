"""Parts of traces, and traces at another speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from penstock.loadgen.traces import TraceRequest


def faster(requests: Sequence[TraceRequest], speed: float) -> list[TraceRequest]:
    """The same requests, `speed` times as fast."""
    return [replace(r, arrival_s=r.arrival_s / speed) for r in requests]


def busiest(requests: Sequence[TraceRequest], window_s: float | None) -> list[TraceRequest]:
    """The stretch of `window_s` with the most prompt and output tokens, beginning at 0 s; None, or
    longer than the trace: all of it."""
    if window_s is None or requests[-1].arrival_s <= window_s:
        return list(requests)
    times = np.array([r.arrival_s for r in requests])
    tokens = np.cumsum([0] + [r.input_tokens + r.output_tokens for r in requests])
    ends = np.searchsorted(times, times + window_s)
    first = int((tokens[ends] - tokens[: len(times)]).argmax())
    start_s = requests[first].arrival_s
    return [replace(r, arrival_s=r.arrival_s - start_s) for r in requests[first : ends[first]]]


def dealt(requests: Sequence[TraceRequest], seed: int) -> list[TraceRequest]:
    """The same arrivals and the same lengths, dealt out anew: another hour like this one. Requests
    that share prefixes stay as they are, since their order has a meaning. Seed 0: as recorded."""
    if seed == 0 or any(r.hash_ids for r in requests):
        return list(requests)
    order = np.random.default_rng(seed).permutation(len(requests))
    lengths = [requests[place] for place in order]
    return [replace(r, arrival_s=a.arrival_s) for a, r in zip(requests, lengths)]
