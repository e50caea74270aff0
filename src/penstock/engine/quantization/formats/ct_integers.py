"""Integer weights of compressed-tensors: 4 or 8 bits, by tensor, output channel or group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from penstock.engine.models.fields import Fields
from penstock.engine.quantization.formats.base import (
    FLOATS,
    INT32,
    FewBits,
    Find,
    Raw,
    Stored,
    require,
    require_multiple,
)
from penstock.engine.quantization.formats.gptq import input_order
from penstock.engine.quantization.formats.packing import unpack, unpack_down
from penstock.engine.quantization.schemes import meta_weight
from penstock.engine.quantization.weight import QuantizedWeight

_INT8 = frozenset({"I8"})
_SHAPES = frozenset({"I32", "I64"})


@dataclass(frozen=True, slots=True)
class Integers:
    bits: int
    strategy: str  # tensor, channel, group
    group_size: int | None
    symmetric: bool
    packed: bool

    def describe(self) -> str:
        where = {
            "tensor": "a scale for each tensor",
            "channel": "a scale for each output channel",
            "group": f"groups of {self.group_size}",
        }[self.strategy]
        return f"{self.bits} bits, {where}, {'symmetric' if self.symmetric else 'asymmetric'}"

    def layout(self, module: str, rows: int, columns: int, find: Find) -> FewBits:
        group_size = self.group_size or columns
        require_multiple(module, "inputs", columns, group_size)
        groups = columns // group_size
        tensors = {"weight_scale": self._scale(module, rows, groups, find, FLOATS)}
        if self.packed:
            words = -(-columns * self.bits // 32)
            tensors["weight_packed"] = Stored((rows, words), INT32)
            tensors["weight_shape"] = Stored((2,), _SHAPES)
        else:
            tensors["weight"] = Stored((rows, columns), _INT8)
        zero_name = f"{module}.weight_zero_point"
        zero = find(zero_name)
        if zero is not None and (not self.packed or zero.dtypes <= _INT8):
            # Early releases stored symmetric zeros too, and did not pack any.
            tensors["weight_zero_point"] = self._zero(module, rows, groups, find)
        elif zero is not None or not self.symmetric:
            words = -(-rows * self.bits // 32)
            tensors["weight_zero_point"] = (
                Stored((words, groups), INT32) if self.packed else Stored((rows, groups), _INT8)
            )
        if find(f"{module}.weight_g_idx") is not None:
            tensors["weight_g_idx"] = Stored((columns,), INT32)
        declared = meta_weight(rows, columns, self.bits, group_size, symmetric=self.symmetric)
        return FewBits(tensors, declared, partial(self._decode, module, (rows, columns)))

    def _scale(
        self, module: str, rows: int, groups: int, find: Find, dtypes: frozenset[str]
    ) -> Stored:
        found = find(f"{module}.weight_scale")
        if self.strategy == "tensor":
            return Stored(found.shape if found and found.shape in ((), (1, 1)) else (1,), dtypes)
        if found and self.strategy == "channel" and found.shape == (rows,):
            return Stored((rows,), dtypes)
        return Stored((rows, groups), dtypes)

    def _zero(self, module: str, rows: int, groups: int, find: Find) -> Stored:
        scale = self._scale(module, rows, groups, find, FLOATS)
        return Stored(scale.shape, _INT8)

    def _decode(self, module: str, shape: tuple[int, int], raw: Raw) -> QuantizedWeight:
        rows, columns = shape
        group_size = self.group_size or columns
        middle = 1 << (self.bits - 1)
        scales_NG = self._spread(raw["weight_scale"], rows)
        if self.packed:
            stored = tuple(raw["weight_shape"].tolist())
            require(module, stored == shape, f"weight_shape is {stored}, not {shape}")
            codes_NK = unpack(raw["weight_packed"], self.bits)[:, :columns]
        else:
            codes_NK = _to_codes(module, raw["weight"], self.bits)
        offsets_NG = None
        if "weight_zero_point" in raw:
            zeros_NG = self._zeros(module, raw["weight_zero_point"], rows)
            if not (zeros_NG == middle).all():
                offsets_NG = -scales_NG * zeros_NG
        order_K = None
        if "weight_g_idx" in raw:
            order_K = input_order(module, raw["weight_g_idx"], group_size)
        if order_K is not None:
            codes_NK = codes_NK[:, order_K]
        return QuantizedWeight(
            self.bits, group_size, codes_NK.contiguous(), scales_NG, offsets_NG, order_K
        )

    def _zeros(self, module: str, stored: torch.Tensor, rows: int) -> torch.Tensor:
        """float32 [N, G], counted as the codes are."""
        if stored.dtype == torch.int32:
            return unpack_down(stored, self.bits).T[:rows].float()
        return self._spread(_to_codes(module, stored, self.bits), rows)

    def _spread(self, found: torch.Tensor, rows: int) -> torch.Tensor:
        """float32 [N, G], one value for all outputs repeated."""
        if self.strategy != "group":
            found = found.reshape(-1, 1).expand(rows, 1)
        return found.float().contiguous()


def _to_codes(module: str, values: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed values to unsigned codes."""
    middle = 1 << (bits - 1)
    if bits < 8:
        inside = bool((values >= -middle).all() and (values < middle).all())
        require(module, inside, f"values do not fit {bits} bits")
    return (values.view(torch.uint8) + middle) & ((1 << bits) - 1)


def parse(weights: Fields, *, packed: bool) -> Integers:
    bits = weights.integer("num_bits", 8)
    if bits not in (4, 8):
        raise weights.unsupported("num_bits", bits, "4, 8")
    size = weights.optional_integer("group_size", low=-1)
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.text("strategy", implied).lower()
    if strategy not in ("tensor", "channel", "group"):
        raise weights.unsupported("strategy", strategy, "tensor, channel, group")
    if strategy == "group" and (size is None or size < 1):
        raise weights.wrong("group_size", size, "a number from 1")
    group_size = size if strategy == "group" else None
    return Integers(bits, strategy, group_size, weights.flag("symmetric", True), packed)
