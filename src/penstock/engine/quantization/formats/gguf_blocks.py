"""ggml's blocks of quantized values as codes, scales and offsets.

Every type here is weight = scale * code + offset within groups of a block, so that nothing is
rounded on the way into a `QuantizedWeight`; codes of symmetric types are moved to where it has its
middle. The layouts are those of ggml's `ggml-common.h`; tests
compare each with the `gguf` package bit by bit.

Shapes: B blocks, V values of a block, G groups of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: (codes_BV uint8, scales_BG float32, offsets_BG float32 or None for symmetric)
Decoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Affine:
    """What a type is read into. `decode` takes blocks as bytes, [B, block_bytes]."""

    bits: int  # 4 or 8: of the codes as they are held, at least as many as are stored
    group_size: int
    decode: Callable[[torch.Tensor], Decoded]
    has_offsets: bool = True


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """A float16 of each block as float32, [B, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes to [..., 2n] codes: all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bit_planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[B, n] bytes to [B, 8 / bits, n] codes: plane p has each byte's bits from p * bits on."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=1)


def _q8_0(blocks: torch.Tensor) -> Decoded:
    return blocks[:, 2:] ^ 0x80, _half(blocks, 0), None


def _q4_0(blocks: torch.Tensor) -> Decoded:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: torch.Tensor) -> Decoded:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """4 bytes to the 32 values 0 or 16: bit i belongs to code i."""
    bits = _bit_planes(packed, 1)  # [B, 8, 4]
    return (bits.transpose(1, 2).reshape(len(packed), 32)) << 4


def _q5_0(blocks: torch.Tensor) -> Decoded:
    scales = _half(blocks, 0)
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return codes + 112, scales, None  # centred on 16


def _q5_1(blocks: torch.Tensor) -> Decoded:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes, _half(blocks, 0), _half(blocks, 2)


def _six_bit_pairs(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes to 8 scales and 8 minima of 6 bits, float32.

    The first four of each lie in the low 6 bits of bytes 0-3 and 4-7; the others have their low
    4 bits in bytes 8-11 (scale low, minimum high) and their high 2 in the tops of bytes 0-7.
    """
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=-1)
    minima = torch.cat((mid & 63, (high >> 4) | ((mid >> 6) << 4)), dim=-1)
    return scales.float(), minima.float()


def _q4_k(blocks: torch.Tensor) -> Decoded:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q5_k(blocks: torch.Tensor) -> Decoded:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    codes = low | (_bit_planes(blocks[:, 16:48], 1) << 4)
    return codes.reshape(-1, 256), _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q6_k(blocks: torch.Tensor) -> Decoded:
    """Two halves of 128 values: 64 bytes of low nibbles, 32 bytes of high pairs each."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = _bit_planes(blocks[:, 128:192].reshape(-1, 32), 2).reshape(-1, 2, 4, 32)
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (low | (high << 4)).reshape(-1, 256) + 96, scales, None  # centred on 32


def _q2_k(blocks: torch.Tensor) -> Decoded:
    codes = _bit_planes(blocks[:, 16:80].reshape(-1, 32), 2).reshape(-1, 256)
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).float()
    return codes, scales, -(_half(blocks, 82) * (blocks[:, :16] >> 4).float())


def _q3_k(blocks: torch.Tensor) -> Decoded:
    """Two low bits as in Q2_K; the third comes from 32 bytes, bit i for values 32i to 32i + 31.
    Sixteen scales of 6 bits: low nibbles in 8 bytes, high pairs in 4."""
    low = _bit_planes(blocks[:, 32:96].reshape(-1, 32), 2).reshape(-1, 8, 32)
    codes = low | (_bit_planes(blocks[:, :32], 1) << 2)
    packed = blocks[:, 96:108]
    low_scales = _nibbles(packed[:, :8])
    high_scales = _bit_planes(packed[:, 8:], 2).reshape(-1, 16)
    scales = _half(blocks, 108) * ((low_scales | (high_scales << 4)).float() - 32.0)
    return codes.reshape(-1, 256) + 4, scales, None  # centred on 4


AFFINE = {
    "Q8_0": Affine(8, 32, _q8_0, has_offsets=False),
    "Q4_0": Affine(4, 32, _q4_0, has_offsets=False),
    "Q4_1": Affine(4, 32, _q4_1),
    "Q5_0": Affine(8, 32, _q5_0, has_offsets=False),
    "Q5_1": Affine(8, 32, _q5_1),
    "Q2_K": Affine(4, 16, _q2_k),
    "Q3_K": Affine(4, 16, _q3_k, has_offsets=False),
    "Q4_K": Affine(4, 32, _q4_k),
    "Q5_K": Affine(8, 32, _q5_k),
    "Q6_K": Affine(8, 16, _q6_k, has_offsets=False),
}
