"""Rotary position embedding (arXiv:2104.09864) and the ways to stretch it.

Frequencies are computed once, in float32 and in the order of operations of `transformers`, so that
float32 runs agree to the last bits. Cosines and sines are computed for the positions of a step: a
table for 128k positions would cost 64 MiB and save a few microseconds.
"""

from __future__ import annotations

import math

import torch

from penstock.engine.models.config import RopeConfig
from penstock.engine.platforms.base import Platform


class Rotary:
    """`cos_sin(positions_T)` gives what a step needs, the same for all layers."""

    def __init__(
        self, rope: RopeConfig, head_dim: int, max_model_len: int, platform: Platform
    ) -> None:
        self._platform = platform
        self._inv_freq_F = inverse_frequencies(rope, head_dim, max_model_len).to(platform.device)
        self._scale = rope.attention_factor

    def cos_sin(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both float32 [T, head_dim], their halves equal: dimensions f and f + head_dim / 2 are a
        pair and turn by the same angle."""
        return self._platform.cos_sin(positions_T, self._inv_freq_F, self._scale)


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> torch.Tensor:
    """Radians per position for each of the head_dim / 2 pairs, float32 on the CPU."""
    inv_freq_F = _scaled(rope, head_dim, max_model_len)
    if rope.frequency_factors:
        return inv_freq_F / torch.tensor(rope.frequency_factors, dtype=torch.float32)
    return inv_freq_F


def length_that_decides(rope: RopeConfig, max_model_len: int) -> int | None:
    """The context length that the frequencies are made for, where they depend on what is served:
    equal lengths, equal frequencies. None: they are the same for every length."""
    return max(max_model_len, rope.original_max_tokens) if rope.type == "dynamic" else None


def _scaled(rope: RopeConfig, head_dim: int, max_model_len: int) -> torch.Tensor:
    if rope.type == "linear":
        return _plain(rope.theta, head_dim) / rope.factor
    if rope.type == "dynamic":
        served = length_that_decides(rope, max_model_len)
        assert served is not None
        return _plain(_ntk_theta(rope, head_dim, served), head_dim)
    if rope.type == "llama3":
        return _llama3(rope, _plain(rope.theta, head_dim))
    if rope.type == "yarn":
        return _yarn(rope, head_dim)
    assert rope.type == "default", rope.type
    return _plain(rope.theta, head_dim)


def _plain(theta: float, head_dim: int) -> torch.Tensor:
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents_F)


def _ntk_theta(rope: RopeConfig, head_dim: int, served: int) -> float:
    """NTK-aware scaling for a context of `served` tokens, no less than the model was trained on.

    transformers raises theta as a sequence grows, which leaves old keys rotated by other angles
    than new ones and would make KV depend on who asked first. Here the length that is served
    decides, so blocks can be shared; up to the trained length both are the unscaled embedding.
    """
    trained = rope.original_max_tokens
    stretch = rope.factor * served / trained - (rope.factor - 1)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))


def _llama3(rope: RopeConfig, inv_freq_F: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones left alone, those between blended."""
    wavelength_F = 2 * math.pi / inv_freq_F
    longest = rope.original_max_tokens / rope.low_freq_factor
    shortest = rope.original_max_tokens / rope.high_freq_factor
    stretched_F = inv_freq_F / rope.factor
    blend_F = (rope.original_max_tokens / wavelength_F - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended_F = (1 - blend_F) * inv_freq_F / rope.factor + blend_F * inv_freq_F
    out_F = torch.where(wavelength_F > longest, stretched_F, blended_F)
    return torch.where(wavelength_F < shortest, inv_freq_F, out_F)


def _yarn(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): pairs that turn often within the trained length keep
    their frequency, those that turn less than once are interpolated, a linear ramp between."""

    def pair_that_turns(times: float) -> float:
        turns_per_radian = rope.original_max_tokens / (times * 2 * math.pi)
        return head_dim * math.log(turns_per_radian) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as everybody does: a step instead of a division by zero
    ramp_F = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep_F = 1 - ramp_F.clamp(0, 1)
    powers_F = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (1.0 / (rope.factor * powers_F)) * (1 - keep_F) + (1.0 / powers_F) * keep_F
