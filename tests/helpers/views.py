"""Cluster views for tests of policies: any column by name, one value or one for each instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock.service.policies.view import ROLES, ClusterView

#: A small engine: 4 ms a step, 20 µs a token; 256 tokens fit a step.
COLUMNS = {
    "queued_tokens": 0.0, "queued": 0.0, "running": 0.0, "running_tokens": 0.0, "step_left_s": 0.0,
    "base_s": 4e-3, "per_token_s": 2e-5, "per_row_s": 1e-4, "per_context_token_s": 1e-8,
    "per_attention_s": 1e-9, "residual_s": 1e-4, "num_steps": 100.0, "ttft_ratio": 1.0,
    "step_tokens": 256.0, "max_running": 16.0, "free_blocks": 1e4, "total_blocks": 1e4,
}  # fmt: skip


def make_view(
    count: int,
    *,
    roles: Sequence[str] | None = None,
    hosts: Sequence[int] | None = None,
    **more: Any,
) -> ClusterView:
    def column(name: str, default: float) -> np.ndarray:
        return np.broadcast_to(np.asarray(more.pop(name, default), dtype=float), count).copy()

    columns = {name: column(name, default) for name, default in COLUMNS.items()}
    for optional in ("ttft_error", "prefill_share"):
        if optional in more:
            columns[optional] = column(optional, 0.0)
    codes = [ROLES.index(role) for role in roles or ["any"] * count]
    return ClusterView(
        names=tuple(f"i{n}" for n in range(count)),
        roles=np.array(codes),
        hosts=np.array(hosts if hosts is not None else [0] * count),
        **columns,
        **more,
    )


def hits(*tokens: float) -> np.ndarray:
    return np.array(tokens, dtype=float)
