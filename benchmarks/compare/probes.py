"""What the machine gives at this moment: read bandwidth, and the rate of a bf16 matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reading:
    bandwidth_gb_s: float
    matrix_tflops: float

    def mean(self, other: Reading) -> Reading:
        return Reading(
            (self.bandwidth_gb_s + other.bandwidth_gb_s) / 2,
            (self.matrix_tflops + other.matrix_tflops) / 2,
        )


class Probe:
    """Holds its 1 GiB, so that probing is reading and never allocating."""

    def __init__(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._buffer = torch.ones(1 << 28, dtype=torch.float32)
        self._a = torch.randn(1024, 1024).bfloat16()
        self._b = torch.randn(1024, 3072).bfloat16()

    def read(self) -> Reading:
        """Best of three of each: a probe is for what could be had."""
        read_s = min(_timed(lambda: self._buffer.sum()) for _ in range(3))
        multiply_s = min(_timed(lambda: self._a @ self._b) for _ in range(3))
        num_bytes = self._buffer.numel() * self._buffer.element_size()
        flops = 2 * self._a.shape[0] * self._a.shape[1] * self._b.shape[1]
        return Reading(num_bytes / read_s / 1e9, flops / multiply_s / 1e12)


def _timed(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s
