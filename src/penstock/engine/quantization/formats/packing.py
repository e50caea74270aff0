"""Several codes in one int32, lowest bits first, as GPTQ, AWQ and compressed-tensors store them."""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of int32 `words` [A, B]: [A, B * 32 // bits], along the last dimension.

    4 and 8 bits never straddle a byte, and safetensors is little-endian: bytes are enough.
    """
    bytes_AB = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], -1)
    if bits == 8:
        return bytes_AB
    assert bits == 4, bits
    return torch.stack((bytes_AB & 15, bytes_AB >> 4), dim=-1).flatten(-2)


def unpack_down(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed along the first dimension: words [A, B] to codes [B, A * 32 // bits], transposed."""
    return unpack(words.T, bits)
