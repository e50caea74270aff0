"""Counts what a model's weights would take on a platform, without allocating any of them."""

from __future__ import annotations

from collections import Counter

import torch

from penstock.engine.platforms.base import Linear, Platform, TiedEmbedding
from penstock.engine.quantization.weight import QuantizedWeight

#: How weights are counted that no kernel takes in their few bits.
DEQUANTIZED = "dequantized"


class CountingPlatform(Platform):
    """Stands in for `real` on the meta device."""

    def __init__(self, real: Platform) -> None:
        super().__init__("meta")
        self._real = real
        self.num_bytes = 0
        self.largest_codes_bytes = 0
        #: Kernel, or DEQUANTIZED -> how many weights it runs.
        self.kernel_counts: Counter[str] = Counter()

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_bytes += tensor.nbytes
        return tensor

    def make_linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> Linear:
        self.count(weight_NK)
        if bias_N is not None:
            self.count(bias_N)
        return super().make_linear(weight_NK, bias_N)

    def make_tied_embedding(self, weight_VE: torch.Tensor) -> TiedEmbedding:
        return super().make_tied_embedding(self.count(weight_VE))

    def make_quantized_linear(
        self, weight: QuantizedWeight, bias_N: torch.Tensor | None, dtype: torch.dtype
    ) -> Linear:
        self._count_few_bits(weight, dtype, embedding=False)
        if bias_N is not None:
            self.count(bias_N)
        return lambda x_TK: x_TK.new_empty(*x_TK.shape[:-1], weight.shape[0])

    def make_quantized_embedding(
        self, weight: QuantizedWeight, dtype: torch.dtype
    ) -> TiedEmbedding:
        self._count_few_bits(weight, dtype, embedding=True)
        return TiedEmbedding(torch.empty(weight.shape, dtype=dtype, device="meta"))

    def _count_few_bits(
        self, weight: QuantizedWeight, dtype: torch.dtype, *, embedding: bool
    ) -> None:
        kernel = self._real.quantized_kernel(weight, dtype, embedding=embedding)
        self.kernel_counts[kernel or DEQUANTIZED] += 1
        self.largest_codes_bytes = max(self.largest_codes_bytes, weight.codes_NK.nbytes)
        if kernel is None:
            self.num_bytes += weight.codes_NK.numel() * dtype.itemsize
        else:
            self.num_bytes += weight.num_bytes
