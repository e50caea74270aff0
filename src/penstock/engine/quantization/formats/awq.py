"""AWQ, version "gemm": 4 bits, asymmetric, packed along the outputs in an order of its own.

qweight int32 [K, N / 8], qzeros int32 [K / G, N / 8], scales float16 [K / G, N];
weight[n, k] = scales[g, n] * (code - zero). Format: AutoAWQ, awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.engine.models.fields import Fields
from penstock.engine.quantization.formats.base import (
    FLOATS,
    INT32,
    FewBits,
    Find,
    Format,
    Layout,
    Raw,
    Stored,
    holds_any,
    require_multiple,
)
from penstock.engine.quantization.formats.packing import unpack
from penstock.engine.quantization.schemes import meta_weight
from penstock.engine.quantization.weight import QuantizedWeight

_SUFFIXES = ("qweight", "qzeros", "scales")
_PER_WORD = 8
#: The nibble of a word, from the lowest, in which each of its eight outputs stands.
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class Awq(Format):
    group_size: int | None  # None: a row
    method = "awq"

    def describe(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "one group a row"
        return f"4 bits in {groups}, asymmetric"

    def layout(self, module: str, rows: int, columns: int, find: Find) -> Layout | None:
        if not holds_any(find, module, _SUFFIXES):
            return None
        group_size = self.group_size or columns
        require_multiple(module, "inputs", columns, group_size)
        require_multiple(module, "outputs", rows, _PER_WORD)
        groups = columns // group_size
        tensors = {
            "qweight": Stored((columns, rows // _PER_WORD), INT32),
            "qzeros": Stored((groups, rows // _PER_WORD), INT32),
            "scales": Stored((groups, rows), FLOATS),
        }
        declared = meta_weight(rows, columns, 4, group_size, symmetric=False)
        return FewBits(tensors, declared, lambda raw: _decode(raw, group_size))


def _decode(raw: Raw, group_size: int) -> QuantizedWeight:
    scales_NG = raw["scales"].T.float()
    zeros_NG = _in_order(raw["qzeros"]).T.float()
    codes_NK = _in_order(raw["qweight"]).T.contiguous()
    return QuantizedWeight(
        4, group_size, codes_NK, scales_NG.contiguous(), (zeros_NG * -scales_NG).contiguous()
    )


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """[K, N / 8] to [K, N], the outputs in their natural order."""
    codes = unpack(words, 4).unflatten(-1, (-1, _PER_WORD))
    return codes[..., _NIBBLE_OF].flatten(-2)


def parse(fields: Fields) -> Format:
    bits = fields.integer("bits", fields.integer("w_bit", 4))
    if bits != 4:
        raise fields.unsupported("bits", bits, "4")
    version = fields.text("version", "gemm").lower()
    if version != "gemm":
        raise fields.unsupported("version", version, 'gemm (AutoAWQ: version="GEMM")')
    if not fields.flag("zero_point", True):
        raise fields.unsupported("zero_point", False, "true")
    size = fields.integer("group_size", fields.integer("q_group_size", 128, low=-1), low=-1)
    if size == 0:
        raise fields.wrong("group_size", size, "-1 or a number from 1")
    return Awq(None if size == -1 else size)
