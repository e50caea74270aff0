"""One interface for attention: `plan` once a step, then `run` once a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.engine.memory.base import KvMemory


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Per-rank head counts. `scale` multiplies q·k; `sliding_window` None means full attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """Queries at positions [start, start + num_tokens) of `slot` attend to all positions before
    and including their own. The rows' tokens stand one after the other in the flat token axis."""

    slot: int
    start: int
    num_tokens: int


class AttentionBackend(Protocol):
    name: str

    @staticmethod
    def unsupported(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
        """None if this backend can do it, else why not (shown by `penstock doctor`)."""

    def __init__(self, shape: AttentionShape, memory: KvMemory) -> None: ...

    def plan(self, rows: list[AttentionRow]) -> None:
        """Prepare for a step; what depends on the batch but not on the layer is done here."""

    def run(
        self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Store k and v at the rows' positions, then attend. Returns out_THD, q's dtype.

        T: flat tokens of all rows, H: query heads, G: key/value heads, D: head_dim.
        """
