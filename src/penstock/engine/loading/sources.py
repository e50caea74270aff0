"""The three answers to a model that asks for its tensors: nobody, random numbers, a checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch

from penstock.engine.layers.weights import Weights
from penstock.engine.loading.tensors import CheckpointTensors
from penstock.engine.platforms.base import Platform

#: Called with the fraction that has been read, after each tensor; 1.0 at the end.
Progress = Callable[[float], None]


class Declared(Weights):
    """Writes down what is asked for and allocates nothing. `shapes`: name -> shape, in order."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(Platform("meta"), dtype)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.num_bytes = 0
        #: Of the largest single allocation, which exists twice while it is packed.
        self.largest_bytes = 0

    def empty(self, *shape: int) -> torch.Tensor:
        num_bytes = math.prod(shape) * self.dtype.itemsize
        self.num_bytes += num_bytes
        self.largest_bytes = max(self.largest_bytes, num_bytes)
        return super().empty(*shape)

    def fill(self, name: str, out: torch.Tensor) -> None:
        self.shapes[name] = tuple(out.shape)


class FromCheckpoint(Weights):
    """Reads each tensor into its place."""

    def __init__(
        self,
        platform: Platform,
        dtype: torch.dtype,
        tensors: CheckpointTensors,
        total_bytes: int,
        progress: Progress | None,
    ) -> None:
        super().__init__(platform, dtype)
        self._tensors = tensors
        self._total_bytes = total_bytes
        self._read_bytes = 0
        self._progress = progress

    def fill(self, name: str, out: torch.Tensor) -> None:
        self._read_bytes += self._tensors.read_into(name, out)
        if self._progress is not None:
            self._progress(self._read_bytes / self._total_bytes)


class Dummy(Weights):
    """Random weights from the config alone: norms are 1, all else uniform with deviation 0.02.

    Each tensor has a generator of its own, keyed by seed and name, so that it does not matter what
    else a model has.
    """

    _LIMIT = 0.02 * math.sqrt(3.0)

    def __init__(self, platform: Platform, dtype: torch.dtype, seed: int) -> None:
        super().__init__(platform, dtype)
        self._seed = seed

    def fill(self, name: str, out: torch.Tensor) -> None:
        if name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator(out.device).manual_seed(int.from_bytes(digest[:7], "little"))
        out.uniform_(-self._LIMIT, self._LIMIT, generator=generator)
