"""GPTQ: 4 or 8 bits in groups, packed along the inputs.

qweight int32 [K * bits / 32, N], qzeros int32 [groups, N * bits / 32], scales float16 [groups, N],
g_idx int32 [K]: the group of each input. weight[n, k] = scales[g, n] * (code - zero). In the first
version of the format qzeros hold zero - 1. With desc_act a group's inputs are scattered: columns
are sorted by group then, and the order kept. Formats: AutoGPTQ and GPTQModel, QuantLinear.pack.
"""

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
    Format,
    Layout,
    Raw,
    Stored,
    holds_any,
    require,
    require_multiple,
)
from penstock.engine.quantization.formats.packing import unpack, unpack_down
from penstock.engine.quantization.schemes import meta_weight
from penstock.engine.quantization.weight import QuantizedWeight

_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class Gptq(Format):
    bits: int
    group_size: int | None  # None: a row
    symmetric: bool
    #: What is added to a stored zero: 1 in the first version, 0 in the second.
    zero_shift: int
    method = "gptq"

    def describe(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "one group a row"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits in {groups}, {kind}"

    def ignores(self, name: str) -> bool:
        # AutoGPTQ gave every linear a bias, zero where the model has none.
        return name.endswith("_proj.bias")

    def layout(self, module: str, rows: int, columns: int, find: Find) -> Layout | None:
        if not holds_any(find, module, _SUFFIXES):
            return None
        group_size = self.group_size or columns
        per_word = 32 // self.bits
        for what, count, divisor in (
            ("inputs", columns, group_size),
            ("inputs", columns, per_word),
            ("outputs", rows, per_word),
        ):
            require_multiple(module, what, count, divisor)
        groups = columns // group_size
        tensors = {
            "qweight": Stored((columns // per_word, rows), INT32),
            "qzeros": Stored((groups, rows // per_word), INT32),
            "scales": Stored((groups, rows), FLOATS),
        }
        if find(f"{module}.g_idx") is not None:
            tensors["g_idx"] = Stored((columns,), INT32)
        declared = meta_weight(rows, columns, self.bits, group_size, symmetric=self.symmetric)
        return FewBits(tensors, declared, partial(self._decode, module, group_size))

    def _decode(self, module: str, group_size: int, raw: Raw) -> QuantizedWeight:
        codes_NK = unpack_down(raw["qweight"], self.bits)
        scales_NG = raw["scales"].T.float().contiguous()
        top = (1 << self.bits) - 1
        # A zero of 0 was stored as -1 in as many bits.
        zeros_NG = (unpack(raw["qzeros"], self.bits).T + self.zero_shift) & top
        middle = 1 << (self.bits - 1)
        symmetric = bool((zeros_NG == middle).all())
        offsets_NG = None if symmetric else -scales_NG * zeros_NG.float()
        order_K = None
        if "g_idx" in raw:
            order_K = input_order(module, raw["g_idx"], group_size)
        if order_K is not None:
            codes_NK = codes_NK[:, order_K]
        return QuantizedWeight(
            self.bits, group_size, codes_NK.contiguous(), scales_NG, offsets_NG, order_K
        )


def input_order(module: str, group_K: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """The inputs sorted by their group, int64; None if they are already."""
    columns = len(group_K)
    group_K = group_K.long()
    natural_K = torch.arange(columns) // group_size
    if torch.equal(group_K, natural_K):
        return None
    order_K = torch.argsort(group_K, stable=True)
    require(
        module,
        torch.equal(group_K[order_K], natural_K),
        f"g_idx does not put {group_size} inputs into each group",
    )
    return order_K


def parse(fields: Fields) -> Format:
    bits = fields.integer("bits")
    if bits not in (4, 8):
        raise fields.unsupported("bits", bits, "4, 8")
    checkpoint_format = fields.text("checkpoint_format", fields.text("format", "gptq")).lower()
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise fields.unsupported("checkpoint_format", checkpoint_format, "gptq, gptq_v2")
    dynamic = fields.child("dynamic")
    if dynamic is not None and not all(name.startswith("-:") for name in dynamic.names()):
        raise fields.unsupported("dynamic", "modules with settings of their own", "-: exclusions")
    size = fields.integer("group_size", 128, low=-1)
    if size == 0:
        raise fields.wrong("group_size", size, "-1 or a number from 1")
    return Gptq(
        bits,
        None if size == -1 else size,
        fields.flag("sym", True),
        0 if checkpoint_format == "gptq_v2" else 1,
    )
