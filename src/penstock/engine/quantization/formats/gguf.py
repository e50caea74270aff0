"""GGUF's quantized types. Each tensor says its own: files named Q4_K_M mix several.

A raw tensor here is its bytes, [rows, bytes of a row], the rows in Hugging Face's order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from penstock.engine.models.fields import Fields
from penstock.engine.quantization.formats.base import (
    FLOATS,
    FewBits,
    Find,
    Floats,
    Format,
    Layout,
    Raw,
    Stored,
    require,
    require_multiple,
)
from penstock.engine.quantization.formats.gguf_blocks import AFFINE, Affine
from penstock.engine.quantization.weight import QuantizedWeight, row_slices
from penstock.gguf.types import TYPES
from penstock.protocol.errors import UnsupportedModel

_NUMBERS = {kind.name: number for number, kind in TYPES.items()}


class GgufFormat(Format):
    method = "gguf"

    def __init__(self, types: Counter[str]) -> None:
        """`types`: how many tensors of each quantized type the file has."""
        self._types = types

    def describe(self) -> str:
        listed = ", ".join(f"{count} x {name}" for name, count in self._types.most_common())
        rare = sorted(name for name in self._types if name not in AFFINE)
        return listed + (f"; to floats: {', '.join(rare)}" if rare else "")

    def layout(self, module: str, rows: int, columns: int, find: Find) -> Layout | None:
        stored = find(f"{module}.weight")
        if stored is None or stored.dtypes <= FLOATS:
            return None
        (kind,) = stored.dtypes
        tensors = {"weight": Stored((rows, columns), stored.dtypes)}
        if kind in AFFINE:
            affine = AFFINE[kind]
            require_multiple(module, "inputs", columns, affine.group_size)
            declared = _empty(rows, columns, affine, "meta")
            return FewBits(
                tensors, declared, lambda raw: _decode(module, raw["weight"], kind, columns)
            )
        dequantize = _of_package(kind, module)
        return Floats(tensors, lambda raw, out_NK: _fill(raw, out_NK, dequantize))


def parse(fields: Fields) -> GgufFormat:
    types = fields.child("types") or Fields({})
    return GgufFormat(Counter({name: types.integer(name) for name in types.names()}))


def _empty(rows: int, columns: int, affine: Affine, device: str) -> QuantizedWeight:
    groups = columns // affine.group_size
    return QuantizedWeight(
        affine.bits,
        affine.group_size,
        torch.empty(rows, columns, dtype=torch.uint8, device=device),
        torch.empty(rows, groups, device=device),
        torch.empty(rows, groups, device=device) if affine.has_offsets else None,
    )


def _decode(module: str, raw: torch.Tensor, kind: str, columns: int) -> QuantizedWeight:
    """The weight exactly as it is stored."""
    affine, block_bytes = AFFINE[kind], TYPES[_NUMBERS[kind]].block_bytes
    weight = _empty(len(raw), columns, affine, "cpu")
    for part in row_slices(len(raw), columns):
        codes, scales, offsets = affine.decode(raw[part].reshape(-1, block_bytes))
        weight.codes_NK[part].view(-1).copy_(codes.view(-1))
        weight.scales_NG[part].view(-1).copy_(scales.view(-1))
        if weight.offsets_NG is not None and offsets is not None:
            weight.offsets_NG[part].view(-1).copy_(offsets.view(-1))
    finite = weight.scales_NG.isfinite().all() and weight.offsets().isfinite().all()
    require(module, bool(finite), "its scales are not all finite")
    return weight


def _fill(raw: Raw, out_NK: torch.Tensor, dequantize: Callable[[Any], Any]) -> None:
    bytes_NB = raw["weight"]
    for part in row_slices(*out_NK.shape):
        out_NK[part].copy_(torch.from_numpy(dequantize(bytes_NB[part].numpy())))


def _of_package(kind: str, module: str) -> Callable[[Any], Any]:
    """The rare types, by the `gguf` package, to floats: they have no codes that could be kept."""
    number = _NUMBERS[kind]
    try:
        import gguf
        import numpy as np
    except ImportError as exc:
        raise UnsupportedModel(
            f"{module} has type {kind}, which the gguf package reads: pip install 'penstock[gguf]'"
        ) from exc
    qtype = gguf.GGMLQuantizationType(number)
    try:
        gguf.quants.dequantize(np.zeros((1, TYPES[number].block_bytes), np.uint8), qtype)
    except NotImplementedError as exc:
        raise UnsupportedModel(
            f"{module} has type {kind}, which cannot be read here: convert the file to Q8_0, Q6_K, "
            "Q5_K_M, Q4_K_M or Q4_0"
        ) from exc
    return lambda raw: gguf.quants.dequantize(raw, qtype)
