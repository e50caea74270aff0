"""Parts of traces, traces at another speed, and others like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from penstock.loadgen.sources import busiest, faster
from penstock.loadgen.traces import TraceRequest

__all__ = ["busiest", "dealt", "faster"]


def dealt(requests: Sequence[TraceRequest], seed: int) -> list[TraceRequest]:
    """The same arrivals and the same lengths, dealt out anew: another hour like this one. Requests
    that share prefixes stay as they are, since their order has a meaning. Seed 0: as recorded."""
    if seed == 0 or any(r.hash_ids for r in requests):
        return list(requests)
    order = np.random.default_rng(seed).permutation(len(requests))
    lengths = [requests[place] for place in order]
    return [replace(r, arrival_s=a.arrival_s) for a, r in zip(requests, lengths)]
