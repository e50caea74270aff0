"""Which tokens a grammar allows: packed bits, and their use on logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.protocol.errors import PenstockError

_BITS_PER_WORD = 32


def mask_words(vocab_size: int) -> int:
    """Number of int32 words that hold one bit for each id."""
    return -(-vocab_size // _BITS_PER_WORD)


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """The masks of one step. `rows[i]` is the row of the batch that `bits[i]` belongs to.

    Bit b of word w is set when id 32 * w + b is allowed. Rows that are not named are free. `errors`
    holds rows whose grammar failed: they end with that error whatever their logits are.
    """

    rows: Sequence[int] = ()
    bits: Tensor | None = None  # int32 [M, mask_words(vocab_size)]
    errors: Mapping[int, PenstockError] = field(default_factory=dict)


NO_MASKS = TokenMasks()


def unpack(bits_MW: Tensor, vocab_size: int) -> Tensor:
    """Packed int32 words to bool[M, vocab_size], on the same device."""
    # Bytes rather than words: a quarter of the memory traffic. int32 is little-endian on every
    # platform torch supports, so byte j of a row holds ids 8j ... 8j+7.
    bytes_MB = bits_MW.contiguous().view(torch.uint8)
    bit = torch.arange(8, dtype=torch.uint8, device=bits_MW.device)
    spread_MB8 = (bytes_MB.unsqueeze(-1) >> bit) & 1
    return spread_MB8.view(bits_MW.shape[0], -1)[:, :vocab_size].to(torch.bool)


def apply_masks(logits_RV: Tensor, masks: TokenMasks) -> None:
    """Set the logits of forbidden ids to -inf, in place, in the rows that have a mask."""
    if masks.bits is None or not masks.rows:
        return
    allowed_MV = unpack(masks.bits.to(logits_RV.device), logits_RV.shape[1])
    for row, allowed_V in zip(masks.rows, allowed_MV):
        logits_RV[row].masked_fill_(~allowed_V, float("-inf"))
