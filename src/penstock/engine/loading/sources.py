"""The answers to a model that asks for its tensors: nobody, random numbers, a checkpoint; and over
each of them one that quantizes what it is given."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch

from penstock.engine.layers.weights import Weights
from penstock.engine.loading.declared import CountingPlatform
from penstock.engine.loading.tensors import CheckpointTensors
from penstock.engine.platforms.base import Linear, Platform, TiedEmbedding
from penstock.engine.quantization.formats.base import FewBits, Find, Floats, Layout, Raw, Stored
from penstock.engine.quantization.schemes import Scheme
from penstock.engine.quantization.select import Quantization
from penstock.engine.quantization.weight import QuantizedWeight

#: Called with the fraction that has been read, after each tensor; 1.0 at the end.
Progress = Callable[[float], None]

_HEAD = "lm_head"


class _Modules(Weights):
    """Knows by the checkpoint's format in which tensors a module's weight is stored."""

    def __init__(
        self, platform: Platform, dtype: torch.dtype, quantization: Quantization, find: Find
    ) -> None:
        super().__init__(platform, dtype)
        self._quantization = quantization
        self._find = find

    def read_quantized(self, name: str, rows: int, columns: int) -> QuantizedWeight | None:
        if not self._quantization.keep_bits:
            return None
        layout = self._quantization.format.layout(name, rows, columns, self._find)
        return self._few_bits(name, layout) if isinstance(layout, FewBits) else None

    def fill(self, name: str, out: torch.Tensor) -> None:
        module = name.removesuffix(".weight")
        if out.dim() == 2 and module != name:
            layout = self._quantization.format.layout(module, *_matrix(out), self._find)
            if layout is not None:
                self._fill_module(module, layout, out)
                return
        self._fill_plain(name, out)

    @abstractmethod
    def _few_bits(self, module: str, layout: FewBits) -> QuantizedWeight: ...

    @abstractmethod
    def _fill_module(self, module: str, layout: Layout, out: torch.Tensor) -> None: ...

    @abstractmethod
    def _fill_plain(self, name: str, out: torch.Tensor) -> None: ...


class Declared(_Modules):
    """Writes down what is asked for and allocates nothing.

    `shapes`: name -> shape, in order; `dtypes`: what is allowed, for tensors that are no plain
    floats. Bytes are those on `platform`, which says what stays in few bits there.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        platform: Platform | None = None,
        quantization: Quantization | None = None,
        find: Find = lambda name: None,
    ) -> None:
        self.counted = CountingPlatform(platform or Platform("meta"))
        super().__init__(self.counted, dtype, quantization or Quantization(), find)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, frozenset[str]] = {}
        #: Name -> [outputs, inputs].
        self.linears: dict[str, tuple[int, int]] = {}
        self._largest_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self.counted.num_bytes

    @property
    def largest_bytes(self) -> int:
        """What the largest linear takes beside the weights while it is read and packed."""
        return self._largest_bytes + 2 * self.counted.largest_codes_bytes

    def empty(self, *shape: int) -> torch.Tensor:
        self._largest_bytes = max(self._largest_bytes, math.prod(shape) * self.dtype.itemsize)
        return super().empty(*shape)

    def vector(self, name: str, size: int) -> torch.Tensor:
        return self.counted.count(super().vector(name, size))

    def embedding(self, name: str, rows: int, columns: int) -> torch.Tensor:
        return self.counted.count(super().embedding(name, rows, columns))

    def linear(self, in_features: int, outputs: Mapping[str, int], *, bias: bool) -> Linear:
        self.linears |= {name: (rows, in_features) for name, rows in outputs.items()}
        return super().linear(in_features, outputs, bias=bias)

    def _few_bits(self, module: str, layout: FewBits) -> QuantizedWeight:
        self._declare(module, layout)
        return layout.declared

    def _fill_module(self, module: str, layout: Layout, out: torch.Tensor) -> None:
        self._declare(module, layout)

    def _fill_plain(self, name: str, out: torch.Tensor) -> None:
        self.shapes[name] = tuple(out.shape)

    def _declare(self, module: str, layout: Layout) -> None:
        for suffix, stored in layout.tensors.items():
            self.shapes[f"{module}.{suffix}"] = stored.shape
            self.dtypes[f"{module}.{suffix}"] = stored.dtypes


class Adopted(_Modules):
    """Reads nothing: all that the model keeps is there already (see `memory/keeper.py`). What it
    would be made of has no data."""

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def _few_bits(self, module: str, layout: FewBits) -> QuantizedWeight:
        return layout.declared

    def _fill_module(self, module: str, layout: Layout, out: torch.Tensor) -> None:
        pass

    def _fill_plain(self, name: str, out: torch.Tensor) -> None:
        pass


class FromCheckpoint(_Modules):
    """Reads each tensor into its place."""

    def __init__(
        self,
        platform: Platform,
        dtype: torch.dtype,
        tensors: CheckpointTensors,
        total_bytes: int,
        progress: Progress | None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__(platform, dtype, quantization or Quantization(), tensors.find)
        self._tensors = tensors
        self._total_bytes = total_bytes
        self._read_bytes = 0
        self._progress = progress

    def _few_bits(self, module: str, layout: FewBits) -> QuantizedWeight:
        # Files are read and decoded on the CPU, wherever the model is going to be.
        return layout.decode(self._raw(module, layout.tensors)).to(self.platform.device)

    def _fill_module(self, module: str, layout: Layout, out: torch.Tensor) -> None:
        raw = self._raw(module, layout.tensors)
        if isinstance(layout, Floats):
            layout.fill(raw, out)
        else:
            out.copy_(layout.decode(raw).dequantize(out.dtype))

    def _fill_plain(self, name: str, out: torch.Tensor) -> None:
        self._advance(self._tensors.read_into(name, out))

    def _raw(self, module: str, stored: Mapping[str, Stored]) -> Raw:
        raw = {suffix: self._tensors.read(f"{module}.{suffix}") for suffix in stored}
        self._advance(sum(tensor.nbytes for tensor in raw.values()))
        return raw

    def _advance(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        if self._progress is not None:
            # More than once where sharing was given up on the way.
            self._progress(min(1.0, self._read_bytes / self._total_bytes))


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


class Quantizing(Weights):
    """What another source says, its linears quantized by a scheme as they come; an embedding that
    is no output head stays as it is."""

    def __init__(self, source: Weights, quantization: Quantization) -> None:
        super().__init__(source.platform, source.dtype)
        self._source = source
        self._linears = quantization.scheme
        self._scheme_of: dict[str, Scheme | None] = {_HEAD: quantization.head}
        self._head = quantization.head

    def fill(self, name: str, out: torch.Tensor) -> None:
        self._source.fill(name, out)

    def empty(self, *shape: int) -> torch.Tensor:
        return self._source.empty(*shape)

    def vector(self, name: str, size: int) -> torch.Tensor:
        return self._source.vector(name, size)

    def embedding(self, name: str, rows: int, columns: int) -> torch.Tensor:
        return self._source.embedding(name, rows, columns)

    def tied_embedding(self, name: str, rows: int, columns: int) -> TiedEmbedding:
        self._scheme_of[name] = self._head
        return super().tied_embedding(name, rows, columns)

    def read_quantized(self, name: str, rows: int, columns: int) -> QuantizedWeight | None:
        scheme = self._scheme_of.get(name, self._linears)
        if scheme is None:
            return self._source.read_quantized(name, rows, columns)
        return scheme.quantize(self.matrix(f"{name}.weight", rows, columns), name)


def _matrix(tensor: torch.Tensor) -> tuple[int, int]:
    rows, columns = tensor.shape
    return rows, columns


def quantized(source: Weights, quantization: Quantization) -> Weights:
    """`source` with what `quantization` makes of it beyond how it is stored."""
    if quantization.scheme is None and quantization.head is None:
        return source
    return Quantizing(source, quantization)
