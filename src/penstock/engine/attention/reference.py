"""Attention in plain torch on any device: the one that is obviously right.

Row by row: store the new keys and values, read all of the sequence back, softmax(q·k) v with an
explicit mask, in float32 throughout. The other backends are tested against it, and it is what runs
where they say no.
"""

from __future__ import annotations

import torch

from penstock.engine.attention.base import AttentionRow, AttentionShape
from penstock.engine.memory.base import KvMemory


class ReferenceAttention:
    """See `AttentionBackend`."""

    name = "reference"

    @staticmethod
    def unsupported(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def __init__(self, shape: AttentionShape, memory: KvMemory) -> None:
        self._shape = shape
        self._memory = memory
        self._rows: list[AttentionRow] = []

    def plan(self, rows: list[AttentionRow]) -> None:
        self._rows = rows

    def run(
        self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        out_THD = torch.empty_like(q_THD)
        first = 0
        for row in self._rows:
            here = slice(first, first + row.num_tokens)
            end = row.start + row.num_tokens
            self._memory.write(row.slot, row.start, layer, k_TGD[here], v_TGD[here])
            k_GSD, v_GSD = self._memory.read(row.slot, end, layer)
            out_THD[here] = attend(self._shape, q_THD[here], k_GSD, v_GSD, row.start)
            first += row.num_tokens
        return out_THD


def attend(
    shape: AttentionShape,
    q_THD: torch.Tensor,
    k_GSD: torch.Tensor,
    v_GSD: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """Queries at positions start, start + 1, ... over keys at positions 0 ... S - 1.

    Returns float32 [T, H, D] (float64 where the inputs are float64).
    """
    compute = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    group = shape.num_heads // shape.num_kv_heads
    k_HSD = k_GSD.to(compute).repeat_interleave(group, dim=0)
    v_HSD = v_GSD.to(compute).repeat_interleave(group, dim=0)
    scores_HTS = q_THD.to(compute).transpose(0, 1) @ k_HSD.transpose(1, 2) * shape.scale
    query_T1 = torch.arange(start, start + len(q_THD), device=q_THD.device)[:, None]
    key_1S = torch.arange(k_HSD.shape[1], device=q_THD.device)[None, :]
    hidden_TS = key_1S > query_T1
    if shape.sliding_window is not None:
        # As in transformers: a window of W sees its own position and the W - 1 before it.
        hidden_TS = hidden_TS | (key_1S <= query_T1 - shape.sliding_window)
    weights_HTS = scores_HTS.masked_fill(hidden_TS, float("-inf")).softmax(dim=-1)
    return (weights_HTS @ v_HSD).transpose(0, 1)
