"""A quantized weight as compressed-tensors stores it: tensors, and the settings that say so.

int8 is "int-quantized" (W8A8, activations by token), int4 is "pack-quantized", asymmetric. The
output head stays as floats, and config.json says that it is to be loaded as int8: others know no
quantized embeddings, and a tied head is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from penstock.engine.quantization.schemes import Scheme
from penstock.engine.quantization.weight import QuantizedWeight

_ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


def tensors_of(weight: QuantizedWeight, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By what follows the module's name. 8 bits by output channel, or 4 bits with zero points."""
    scales_NG = weight.scales_NG.to(scale_dtype)
    assert weight.scales_NG.is_meta or torch.equal(scales_NG.float(), weight.scales_NG)
    if weight.bits == 8:
        assert weight.per_channel and weight.offsets_NG is None
        return {"weight": (weight.codes_NK ^ 128).view(torch.int8), "weight_scale": scales_NG}
    assert weight.offsets_NG is not None
    zeros_NG = (-weight.offsets_NG / weight.scales_NG).round().to(torch.uint8)
    return {
        "weight_packed": pack(weight.codes_NK),
        "weight_scale": scales_NG,
        "weight_zero_point": pack(zeros_NG.T).T.contiguous(),
        "weight_shape": torch.tensor(weight.shape, device=scales_NG.device),
    }


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes (uint8 [A, B]) in int32, eight in a word along the last dimension, the lowest
    bits first; the last word is filled up with zeros."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    pairs = codes[..., ::2] | (codes[..., 1::2] << 4)
    return pairs.reshape(-1).view(torch.int32).view(*codes.shape[:-1], -1)


def settings(scheme: Scheme, linears: Mapping[str, int]) -> dict[str, Any]:
    """quantization_config for linears: name -> inputs. Where the scheme falls back to something
    else for some of them, each kind of module is named: readers differ in whom they believe when
    one is meant twice."""
    kinds: dict[tuple[int, int | None], list[str]] = {}
    for name, columns in linears.items():
        bits, group_size = scheme.of(columns)
        kinds.setdefault((bits, None if bits == 8 else group_size), []).append(name)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    groups = {
        f"group_{i}": _group(bits, group_size, ["Linear"] if len(kinds) == 1 else _patterns(names))
        for i, ((bits, group_size), names) in enumerate(ordered)
    }
    formats = list(dict.fromkeys(group["format"] for group in groups.values()))
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def _patterns(names: list[str]) -> list[str]:
    """Modules of one name have one shape in all layers: ".mlp.down_proj" is enough."""
    found = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
    return [f"re:.*\\.{re.escape(name)}$" for name in found]


def _group(bits: int, group_size: int | None, targets: list[str]) -> dict[str, Any]:
    if bits == 8:
        weights: dict[str, Any] = {"symmetric": True, "strategy": "channel"}
    else:
        weights = {"symmetric": False, "strategy": "group", "group_size": group_size}
    return {
        "targets": targets,
        "weights": {"num_bits": bits, "type": "int", "dynamic": False, **weights},
        "input_activations": _ACTIVATIONS if bits == 8 else None,
        "format": "int-quantized" if bits == 8 else "pack-quantized",
    }
