"""A weight in a few bits, as everything in the engine hands it on: what a format is read into, what
a scheme makes, and what a platform packs for its kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from penstock.protocol.errors import CheckpointError

#: Below this, scales of a common group would take as much as floats instead of codes.
_SHORTEST_COMMON_GROUP = 16


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """weight[n, k] = scale[n, g] * code[n, k] + offset[n, g], with g = k // group_size.

    Codes are unsigned, one a byte, whatever `bits` is: packing is the platform's business and
    happens layer by layer. `offsets_NG` None means symmetric: -scale * 2 ** (bits - 1). A group as
    long as a row is a scale for each output channel.

    `input_order_K` (GPTQ's act-order): column k of the codes belongs to input input_order_K[k]; so
    x[:, input_order_K] is what the codes are multiplied by. None: the natural order.
    """

    bits: int  # 4 or 8
    group_size: int
    codes_NK: torch.Tensor  # uint8
    scales_NG: torch.Tensor  # float32
    offsets_NG: torch.Tensor | None = None  # float32
    input_order_K: torch.Tensor | None = None  # int64

    def __post_init__(self) -> None:
        rows, columns = self.codes_NK.shape
        groups = (rows, columns // self.group_size)
        assert self.bits in (4, 8), self.bits
        assert columns % self.group_size == 0, (columns, self.group_size)
        assert self.codes_NK.dtype == torch.uint8 and self.scales_NG.shape == groups
        assert self.offsets_NG is None or self.offsets_NG.shape == groups

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes_NK.shape
        return rows, columns

    @property
    def num_bytes(self) -> int:
        """With codes packed and scales and offsets in float32, which is what kernels hold at most;
        an input order is not worth counting."""
        tables = [table for table in (self.scales_NG, self.offsets_NG) if table is not None]
        return self.codes_NK.numel() * self.bits // 8 + sum(table.nbytes for table in tables)

    @property
    def per_channel(self) -> bool:
        return self.group_size == self.codes_NK.shape[1]

    def offsets(self) -> torch.Tensor:
        """offsets_NG, spelt out where they are implied."""
        if self.offsets_NG is not None:
            return self.offsets_NG
        if self.scales_NG.is_meta:
            return torch.empty_like(self.scales_NG)
        return self.scales_NG * -float(1 << (self.bits - 1))

    def to(self, device: torch.device) -> QuantizedWeight:
        """On `device`; itself if it is there already."""
        if self.codes_NK.device == device:
            return self
        return QuantizedWeight(
            self.bits,
            self.group_size,
            self.codes_NK.to(device),
            self.scales_NG.to(device),
            None if self.offsets_NG is None else self.offsets_NG.to(device),
            None if self.input_order_K is None else self.input_order_K.to(device),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K] in `dtype`, the columns in the order of the inputs. Computed in float32, a few
        rows at a time: there is never a whole copy in float32 beside the result."""
        rows, columns = self.codes_NK.shape
        weight_NK = torch.empty(rows, columns, dtype=dtype, device=self.codes_NK.device)
        if weight_NK.is_meta:
            return weight_NK
        offsets_NG = self.offsets()
        for part in row_slices(rows, columns):
            codes_NGK = self.codes_NK[part].unflatten(1, (-1, self.group_size)).float()
            values_NGK = codes_NGK * self.scales_NG[part, :, None] + offsets_NG[part, :, None]
            if self.input_order_K is None:
                weight_NK[part] = values_NGK.flatten(1)
            else:
                weight_NK[part, self.input_order_K] = values_NGK.flatten(1).to(dtype)
        return weight_NK


def row_slices(rows: int, columns: int, values: int = 1 << 17) -> Iterator[slice]:
    """All rows, in pieces of about `values`: what is computed in float32 stays in the cache."""
    step = max(1, values // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def stack(parts: list[QuantizedWeight]) -> QuantizedWeight | None:
    """Several weights over the same input as one, the outputs one after the other; None if they
    cannot be one (other orders of the inputs, or groups that have too little in common). Parts of
    different kinds are held like the widest, in groups that divide those of all; exactly."""
    first = parts[0]
    for part in parts[1:]:
        if part.shape[1] != first.shape[1]:
            raise CheckpointError(f"{part.shape[1]} inputs beside {first.shape[1]}")
        if not _same_order(part.input_order_K, first.input_order_K):
            return None
    group_size = math.gcd(*(part.group_size for part in parts))
    if group_size < min(_SHORTEST_COMMON_GROUP, *(part.group_size for part in parts)):
        return None
    bits = max(part.bits for part in parts)
    parts = [_widened(part, bits, group_size) for part in parts]
    symmetric = all(part.offsets_NG is None for part in parts)
    return QuantizedWeight(
        bits,
        group_size,
        _below_each_other([part.codes_NK for part in parts]),
        _below_each_other([part.scales_NG for part in parts]),
        None if symmetric else _below_each_other([part.offsets() for part in parts]),
        first.input_order_K,
    )


def _widened(weight: QuantizedWeight, bits: int, group_size: int) -> QuantizedWeight:
    """The same values, described in more bits and smaller groups."""
    if (weight.bits, weight.group_size) == (bits, group_size):
        return weight
    offsets_NG = weight.offsets_NG if weight.bits == bits else weight.offsets()
    repeats = weight.group_size // group_size
    return QuantizedWeight(
        bits,
        group_size,
        weight.codes_NK,
        _each_repeated(weight.scales_NG, repeats),
        None if offsets_NG is None else _each_repeated(offsets_NG, repeats),
        weight.input_order_K,
    )


# On the meta device torch computes shapes in Python, and imports its compiler to do so: 1 to 3 s
# that a start does not have. So shapes are computed here.


def _below_each_other(parts: list[torch.Tensor]) -> torch.Tensor:
    if not parts[0].is_meta:
        return torch.cat(parts)
    rows = sum(len(part) for part in parts)
    return torch.empty(rows, parts[0].shape[1], dtype=parts[0].dtype, device="meta")


def _each_repeated(table_NG: torch.Tensor, repeats: int) -> torch.Tensor:
    if not table_NG.is_meta:
        return table_NG.repeat_interleave(repeats, dim=1)
    rows, groups = table_NG.shape
    return torch.empty(rows, groups * repeats, dtype=table_NG.dtype, device="meta")


def _same_order(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
