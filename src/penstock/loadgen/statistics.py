"""What a trace is like, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock.loadgen.traces import TraceRequest

_PEAK_S = 10.0


def describe(requests: Sequence[TraceRequest]) -> dict[str, Any]:
    """Rates are per second; `reusable_share`: of prompt tokens, those that an endless cache would
    have had already."""
    times = np.array([r.arrival_s for r in requests])
    gaps = np.diff(times)
    seconds = float(times[-1] - times[0])
    _, counts = np.unique(times // _PEAK_S, return_counts=True)
    mean_count = len(requests) / max(seconds / _PEAK_S, 1.0)
    return {
        "requests": len(requests),
        "seconds": seconds,
        "requests_per_s": (len(requests) - 1) / seconds if seconds else None,
        "gap_cv": float(gaps.std() / gaps.mean()) if seconds else None,
        "peak_to_mean_10s": float(counts.max() / mean_count),
        "input_tokens": _lengths([r.input_tokens for r in requests]),
        "output_tokens": _lengths([r.output_tokens for r in requests]),
        "reusable_share": reusable_share(requests),
    }


def _lengths(values: Sequence[int]) -> dict[str, float]:
    found = np.array(values, dtype=float)
    return {
        "mean": float(found.mean()),
        "p50": float(np.quantile(found, 0.5)),
        "p99": float(np.quantile(found, 0.99)),
        "max": float(found.max()),
        "total": float(found.sum()),
    }


def reusable_share(requests: Sequence[TraceRequest]) -> float:
    """Prompt tokens that stood at the beginning of an earlier prompt, of all."""
    #: (node above, hash id) -> node; the most tokens of its block that were seen.
    children: dict[tuple[int, int], int] = {}
    seen = [0]
    shared = total = 0
    for r in requests:
        total += r.input_tokens
        node, left, follows = 0, r.input_tokens, True
        for hash_id in r.hash_ids:
            here = min(left, r.block_tokens)
            left -= here
            node = children.setdefault((node, hash_id), len(seen))
            if node == len(seen):
                seen.append(0)
            if follows:
                shared += min(here, seen[node])
                follows = seen[node] >= here
            seen[node] = max(seen[node], here)
    return shared / total
