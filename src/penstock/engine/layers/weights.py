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

from penstock.engine.memory.huge_pages import empty_huge
from penstock.engine.memory.keeper import Fill
from penstock.engine.platforms.base import Linear, Platform, TiedEmbedding
from penstock.engine.quantization.weight import QuantizedWeight, stack


class Weights(ABC):
    """Tensors are filled in place, slice by slice, packed by the platform, and let go."""

    def __init__(self, platform: Platform, dtype: torch.dtype) -> None:
        self.platform = platform
        self.dtype = dtype

    @abstractmethod
    def fill(self, name: str, out: torch.Tensor) -> None:
        """Write the tensor of that name to `out` (contiguous, of the tensor's shape)."""

    def empty(self, *shape: int) -> torch.Tensor:
        if self.platform.device.type == "cpu":
            return empty_huge(shape, self.dtype)
        return torch.empty(shape, dtype=self.dtype, device=self.platform.device)

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A norm's weight."""
        return self._kept(name, size)

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """One tensor as it is, in the layout of the checkpoint."""
        out_NK = self.empty(rows, columns)
        self.fill(name, out_NK)
        return out_NK

    def read_quantized(self, name: str, rows: int, columns: int) -> QuantizedWeight | None:
        """The linear or embedding called `name` (without ".weight") in the few bits in which it is
        stored or wanted, or None: then it is a plain tensor and `fill` reads it."""
        return None

    def linear(self, in_features: int, outputs: Mapping[str, int], *, bias: bool) -> Linear:
        """Several linears over the same input as one: `outputs` is name -> out_features, and the
        outputs stand one after the other in that order."""
        bias_N = self._biases(outputs) if bias else None
        few_bits = [self.read_quantized(name, n, in_features) for name, n in outputs.items()]
        found = [part for part in few_bits if part is not None]
        if len(found) == len(outputs) and (stacked := stack(found)) is not None:
            return self.platform.make_quantized_linear(stacked, bias_N, self.dtype)
        weight_NK = self.empty(sum(outputs.values()), in_features)
        parts_NK = weight_NK.split(list(outputs.values()))
        for name, part_NK, quantized in zip(outputs, parts_NK, few_bits, strict=True):
            if quantized is None:
                self.fill(f"{name}.weight", part_NK)
            else:
                part_NK.copy_(quantized.dequantize(self.dtype))
        return self.platform.make_linear(weight_NK, bias_N)

    def tied_embedding(self, name: str, rows: int, columns: int) -> TiedEmbedding:
        """One matrix for both ends of a model."""
        quantized = self.read_quantized(name, rows, columns)
        if quantized is not None:
            return self.platform.make_quantized_embedding(quantized, self.dtype)
        return self.platform.make_tied_embedding(self.matrix(f"{name}.weight", rows, columns))

    def embedding(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """An embedding that is not the output head as well: a plain matrix [rows, columns]."""
        quantized = self.read_quantized(name, rows, columns)
        if quantized is not None:
            return self._keep(
                (rows, columns), lambda out: out.copy_(quantized.dequantize(self.dtype))
            )
        return self._kept(f"{name}.weight", rows, columns)

    def _biases(self, outputs: Mapping[str, int]) -> torch.Tensor:
        def fill(bias_N: torch.Tensor) -> None:
            for name, part_N in zip(outputs, bias_N.split(list(outputs.values())), strict=True):
                self.fill(f"{name}.bias", part_N)

        return self._keep((sum(outputs.values()),), fill)

    def _kept(self, name: str, *shape: int) -> torch.Tensor:
        """One tensor that the model keeps as it is."""
        return self._keep(shape, lambda out: self.fill(name, out))

    def _keep(self, shape: tuple[int, ...], fill: Fill) -> torch.Tensor:
        if self.platform.device.type == "cpu":
            return self.platform.keeper.keep(shape, self.dtype, fill)
        out = self.empty(*shape)
        fill(out)
        return out
