"""How keys and values stand in a block, for `write` and `read` of the memories.

A float dtype stores them as they are. "int8" keeps a scale for each token and kv head:
value = int8 * scale, the largest value being 127 or -127. One head's share of a block is then
[token][dim] int8 followed by [token] float32, which in bytes is what [token][dim + 4] is: that is
the shape that blocks have, so whoever copies or maps them need not know.
"""

from __future__ import annotations

import torch

from penstock.protocol.kv import KvLayout

#: Below this a token's values count as zero: 127 over it would not be a float any more.
_SMALLEST = 1e-35


def encode(
    layout: KvLayout, blocks_NGBX: torch.Tensor, index: torch.Tensor, offset: torch.Tensor,
    x_TGD: torch.Tensor,
) -> None:  # fmt: skip
    """Store x as keys, or values, of one layer: token t at place offset[t] of block index[t]."""
    if layout.dtype != "int8":
        blocks_NGBX[index, :, offset] = x_TGD.to(blocks_NGBX.dtype)
        return
    values_NGBD, scales_NGB = _int8(layout, blocks_NGBX)
    largest_TG = x_TGD.float().abs().amax(-1)
    largest_TG = torch.where(largest_TG.isfinite(), largest_TG, torch.nan)  # seen by whoever reads
    factor_TG = torch.where(largest_TG > _SMALLEST, 127.0 / largest_TG, 0.0)
    codes_TGD = (x_TGD.float() * factor_TG[..., None]).round().nan_to_num(0.0)
    values_NGBD[index, :, offset] = codes_TGD.to(torch.int8)
    scales_NGB[index, :, offset] = largest_TG / 127.0


def decode(layout: KvLayout, blocks_NGBX: torch.Tensor) -> torch.Tensor:
    """The keys, or values, of one layer [N, kv_head, token, dim]; float32 where they are int8."""
    if layout.dtype != "int8":
        return blocks_NGBX
    values_NGBD, scales_NGB = _int8(layout, blocks_NGBX)
    return values_NGBD.float() * scales_NGB[..., None]


def _int8(layout: KvLayout, blocks_NGBX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the values [N, kv_head, token, dim] and of their scales [N, kv_head, token]."""
    flat = blocks_NGBX.flatten(-2)
    num_values = layout.block_tokens * layout.head_dim
    values = flat[..., :num_values].unflatten(-1, (layout.block_tokens, layout.head_dim))
    return values, flat[..., num_values:].view(torch.float32)
