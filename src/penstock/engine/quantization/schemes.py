"""From a float weight to few bits, without data: what `--quantization` and `penstock quantize` do.

Scales are rounded before codes are chosen, to values that both float16 and bfloat16 hold: files
keep one of the two, kernels may keep the other, and nothing is rounded twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.engine.quantization.weight import QuantizedWeight, row_slices
from penstock.protocol.errors import CheckpointError, ConfigError

#: Tried in turn where a row is no multiple of the wanted group.
GROUP_SIZES = (128, 64, 32)

#: What the range of a group is shrunk by, to find where the squared error is least: a clipped
#: outlier is often worth finer steps for all others (figures in docs/design/quantization.md).
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How linears are quantized, and with them the embedding that is also the output head."""

    name: str
    bits: int
    group_size: int | None = None  # None: a scale for each output channel

    def of(self, columns: int) -> tuple[int, int]:
        """(bits, group size) for a row of that many weights; 8 bits and one group to a row where
        no group size divides it."""
        if self.group_size is not None:
            for size in (self.group_size, *GROUP_SIZES):
                if size <= self.group_size and columns % size == 0:
                    return self.bits, size
        return 8, columns

    def declare(self, rows: int, columns: int) -> QuantizedWeight:
        """What `quantize` makes of such a weight, on the meta device."""
        bits, group_size = self.of(columns)
        return meta_weight(rows, columns, bits, group_size, symmetric=bits == 8)

    def quantize(self, weight_NK: torch.Tensor, name: str = "weight") -> QuantizedWeight:
        """Raises `CheckpointError`, naming the weight, if a value is not finite."""
        rows, columns = weight_NK.shape
        if weight_NK.is_meta:
            return self.declare(rows, columns)
        bits, group_size = self.of(columns)
        groups = columns // group_size
        codes_NK = torch.empty(rows, columns, dtype=torch.uint8, device=weight_NK.device)
        scales_NG = torch.empty(rows, groups, device=weight_NK.device)
        offsets_NG = torch.empty_like(scales_NG) if bits == 4 else None
        for part in row_slices(rows, columns):
            x_NGK = weight_NK[part].float().unflatten(1, (groups, group_size))
            low_NG1 = x_NGK.amin(-1, keepdim=True)  # these hand on what is not finite
            high_NG1 = x_NGK.amax(-1, keepdim=True)
            if not (low_NG1.isfinite().all() and high_NG1.isfinite().all()):
                raise CheckpointError(f"{name} holds values that are not finite: is it damaged?")
            if offsets_NG is None:
                largest_NG1 = torch.maximum(-low_NG1, high_NG1)
                codes_NGK, scales_NG[part] = _symmetric8(x_NGK, largest_NG1)
            else:
                low_NG1, high_NG1 = low_NG1.clamp_(max=0), high_NG1.clamp_(min=0)
                found = _asymmetric4(x_NGK, low_NG1, high_NG1)
                codes_NGK, scales_NG[part], offsets_NG[part] = found
            codes_NK[part] = codes_NGK.flatten(1)
        return QuantizedWeight(bits, group_size, codes_NK, scales_NG, offsets_NG)


INT8 = Scheme("int8", 8)
INT4 = Scheme("int4", 4, 128)
SCHEMES = {scheme.name: scheme for scheme in (INT8, INT4)}


def scheme_named(name: str, group_size: int | None = None) -> Scheme:
    """Raises `ConfigError` for a scheme or a group size that there is not."""
    if name not in SCHEMES:
        raise ConfigError(f"there is no scheme {name!r}: choose one of {', '.join(SCHEMES)}")
    if group_size is None:
        return SCHEMES[name]
    if name != INT4.name:
        raise ConfigError(f"{name} has a scale for each output channel: leave --group-size out")
    if group_size not in GROUP_SIZES:
        listed = ", ".join(str(size) for size in sorted(GROUP_SIZES))
        raise ConfigError(f"--group-size {group_size} is none of {listed}")
    return Scheme(name, 4, group_size)


def meta_weight(
    rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool
) -> QuantizedWeight:
    """A weight of that kind without its data."""
    codes_NK = torch.empty(rows, columns, dtype=torch.uint8, device="meta")
    scales_NG = torch.empty(rows, columns // group_size, device="meta")
    offsets_NG = None if symmetric else torch.empty_like(scales_NG)
    return QuantizedWeight(bits, group_size, codes_NK, scales_NG, offsets_NG)


def half(scale: torch.Tensor) -> torch.Tensor:
    """The nearest values that float16 and bfloat16 have in common, never zero."""
    rounded = scale.bfloat16().clamp_(max=torch.finfo(torch.float16).max).half().float()
    return rounded.clamp_(min=2.0**-24)


def _symmetric8(
    x_NGK: torch.Tensor, largest_NG1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in 1..255 around 128, as wide as the largest weight. Returns codes, scales."""
    # A scale that was rounded down would clip: the next one up then.
    scale_NG1 = half(largest_NG1 / 127)
    above_NG1 = half(torch.maximum(scale_NG1 * 1.008, scale_NG1 + 2.0**-24))
    scale_NG1 = torch.where(scale_NG1 * 127.5 < largest_NG1, above_NG1, scale_NG1)
    codes_NGK = (x_NGK / scale_NG1).round_().clamp_(-127, 127).add_(128)
    return codes_NGK.to(torch.uint8), scale_NG1[..., 0]


def _asymmetric4(
    x_NGK: torch.Tensor, low_NG1: torch.Tensor, high_NG1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes in 0..15 with an integer zero point (as formats store it), of the range with the least
    squared error. Returns codes, scales, offsets."""
    best_scale_NG1 = torch.ones_like(low_NG1)
    best_zero_NG1 = torch.zeros_like(low_NG1)
    least_NG1 = torch.full_like(low_NG1, torch.inf)
    for shrink in _SHRINK:
        scale_NG1 = half((high_NG1 - low_NG1) * (shrink / 15))
        zero_NG1 = (low_NG1 * -shrink / scale_NG1).round_().clamp_(0, 15)
        codes_NGK = _codes4(x_NGK, scale_NG1, zero_NG1)
        error_NGK = codes_NGK.sub_(zero_NG1).mul_(scale_NG1).sub_(x_NGK)
        error_NG1 = error_NGK.square_().sum(-1, keepdim=True)
        better_NG1 = error_NG1 < least_NG1
        least_NG1 = torch.where(better_NG1, error_NG1, least_NG1)
        best_scale_NG1 = torch.where(better_NG1, scale_NG1, best_scale_NG1)
        best_zero_NG1 = torch.where(better_NG1, zero_NG1, best_zero_NG1)
    codes_NGK = _codes4(x_NGK, best_scale_NG1, best_zero_NG1)
    offset_NG1 = best_scale_NG1 * -best_zero_NG1
    return codes_NGK.to(torch.uint8), best_scale_NG1[..., 0], offset_NG1[..., 0]


def _codes4(x_NGK: torch.Tensor, scale_NG1: torch.Tensor, zero_NG1: torch.Tensor) -> torch.Tensor:
    return (x_NGK / scale_NG1).round_().add_(zero_NG1).clamp_(0, 15)
