"""Where a model's tensors come from while it is built.

A model is written once, as code that asks `Weights` for its tensors in order. Who answers decides
what happens: a checkpoint (loading), random numbers (load_format "dummy"), or nobody, which only
writes down names and shapes (`Declared`): that is how a checkpoint is checked and its memory known
before a byte of it is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from penstock.engine.platforms.base import Linear, Platform


class Weights(ABC):
    """Tensors are filled in place, slice by slice, packed by the platform, and let go."""

    def __init__(self, platform: Platform, dtype: torch.dtype) -> None:
        self.platform = platform
        self.dtype = dtype

    @abstractmethod
    def fill(self, name: str, out: torch.Tensor) -> None:
        """Write the tensor of that name to `out` (contiguous, of the tensor's shape)."""

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.platform.device)

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A norm's weight."""
        out = self.empty(size)
        self.fill(name, out)
        return out

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """One tensor as it is, in the layout of the checkpoint."""
        out_NK = self.empty(rows, columns)
        self.fill(name, out_NK)
        return out_NK

    def linear(self, in_features: int, outputs: Mapping[str, int], *, bias: bool) -> Linear:
        """Several linears over the same input as one: `outputs` is name -> out_features, and the
        outputs stand one after the other in that order."""
        weight_NK = self.empty(sum(outputs.values()), in_features)
        bias_N = self.empty(sum(outputs.values())) if bias else None
        start = 0
        for name, rows in outputs.items():
            self.fill(f"{name}.weight", weight_NK[start : start + rows])
            if bias_N is not None:
                self.fill(f"{name}.bias", bias_N[start : start + rows])
            start += rows
        return self.platform.make_linear(weight_NK, bias_N)
