"""From logits and a uniform number to a token: temperature, min-p, top-k, top-p, inverse CDF.

One uniform number a draw, turned into a token by the inverse of the cumulative distribution. The
usual alternative, the Gumbel trick, needs a random number for every token of the vocabulary: with a
counter-based generator that is 152k Philox blocks a row for Qwen's vocabulary, against one here.

Tokens are laid out *by id*, not by probability. Then the draw is a continuous function of the
logits: two tokens that are nearly equally likely may swap their order of merit between two runs
whose matrix products differ in the last bit, and the drawn token stays the same.

Sums are float64: in float32 the mass of a 152k vocabulary is off by more than a rare token's share.

Semantics, with p_i the probabilities after temperature (vLLM's order: min-p, top-k, top-p):

* min-p keeps p_i >= min_p * max(p).
* top-k keeps p_i >= the k-th largest p, ties included (as HF and vLLM).
* top-p keeps the smallest set, best first, whose mass reaches top_p; the token that crosses the
  threshold is in. The masses are those of what min-p and top-k left, renormalised. Tokens exactly
  as likely as the last one kept are kept too (HF and vLLM cut a tie in the order of their sort):
  the set then depends on values alone, hence not on which sort found it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Best tokens looked at before a full sort. The nucleus of a trained model nearly always fits; the
#: check is exact, so only time depends on this number.
CANDIDATES = 256
_BLOCK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Top:
    """Top-k and top-p of R rows."""

    k: Tensor  # int64 [R], in [1, V]; V: no limit
    p: Tensor  # float64 [R], in (0, 1]; 1: no limit


def invert_cdf(weights_RN: Tensor, uniform_R: Tensor) -> Tensor:
    """Index drawn in each row, int64[R], with probability proportional to `weights_RN` (>= 0).

    Two levels, so that only block sums and one block a row are accumulated in float64. An index of
    weight zero is never drawn while the row has any mass.
    """
    rows, width = weights_RN.shape
    blocks = -(-width // _BLOCK_TOKENS)
    padded_RN = torch.nn.functional.pad(weights_RN, (0, blocks * _BLOCK_TOKENS - width))
    blocks_RBN = padded_RN.view(rows, blocks, _BLOCK_TOKENS)
    block_cdf_RB = blocks_RBN.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target_R1 = uniform_R.unsqueeze(1) * block_cdf_RB[:, -1:]
    block_R1 = _first_above(block_cdf_RB, target_R1)
    before_R1 = torch.where(block_R1 > 0, block_cdf_RB.gather(1, (block_R1 - 1).clamp_min(0)), 0.0)
    chosen_RN = blocks_RBN[torch.arange(rows, device=weights_RN.device), block_R1.squeeze(1)]
    inside_R1 = _first_above(chosen_RN.cumsum(dim=1, dtype=torch.float64), target_R1 - before_R1)
    return (block_R1 * _BLOCK_TOKENS + inside_R1).squeeze(1).clamp_max(width - 1)


def _first_above(cdf_RN: Tensor, target_R1: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds the target; the last one that adds any, if none.

    "None" happens when the two levels round differently, or when u * total rounds up to total.
    """
    found_R1 = torch.searchsorted(cdf_RN, target_R1, right=True)
    last_R1 = torch.searchsorted(cdf_RN, cdf_RN[:, -1:].contiguous(), right=False)
    return torch.minimum(found_R1, last_R1).clamp_max(cdf_RN.shape[1] - 1)


def draw(
    scaled_RV: Tensor,
    uniform_R: Tensor,
    min_p_R: Tensor | None = None,
    top: Top | None = None,
    candidates: int = CANDIDATES,
) -> Tensor:
    """Ids drawn, int64[R]. `scaled_RV`: logits over temperature, shifted to row maxima of 0.

    `uniform_R` is float64 in [0, 1). `min_p_R` or `top` None: no row uses that filter.
    """
    weights_RV = _weights(scaled_RV, min_p_R)
    if top is not None:
        cut_R1 = _cut(scaled_RV, weights_RV, min_p_R, top, candidates)
        weights_RV.masked_fill_(scaled_RV < cut_R1, 0.0)
    return invert_cdf(weights_RV, uniform_R)


def _cut(
    scaled_RV: Tensor, weights_RV: Tensor, min_p_R: Tensor | None, top: Top, candidates: int
) -> Tensor:
    """The least scaled logit that top-k and top-p keep, [R, 1].

    Both filters depend on values alone, so a threshold says it all. It is sought among the best
    `candidates` of each row, and among all of V for a row where it may lie beyond them. With
    candidates >= V there is nothing to check, and nothing is read back from the device.
    """
    vocab_size = scaled_RV.shape[1]
    width = min(candidates, vocab_size)
    best_RK = _descending(scaled_RV) if width == vocab_size else scaled_RV.topk(width, dim=1)[0]
    kept_RK = _weights(best_RK, min_p_R)
    kth_R1 = best_RK.gather(1, (top.k.clamp_max(width) - 1).unsqueeze(1))
    kept_RK.masked_fill_(best_RK < kth_R1, 0.0)

    mass_RK = kept_RK.cumsum(dim=1, dtype=torch.float64)
    total_R1 = mass_RK[:, -1:]
    if width < vocab_size:
        # Without top-k the whole row counts, not only the candidates.
        whole_R1 = weights_RV.sum(dim=1, keepdim=True, dtype=torch.float64)
        total_R1 = torch.where((top.k == vocab_size).unsqueeze(1), whole_R1, total_R1)
    p_R1 = top.p.unsqueeze(1)
    last_R1 = torch.searchsorted(mass_RK, p_R1 * total_R1).clamp_max(width - 1)
    # top_p = 1 keeps everything, whatever the rounding of the sums says.
    last_R1 = torch.where(p_R1 < 1.0, last_R1, width - 1)
    cut_R1 = torch.maximum(kth_R1, best_RK.gather(1, last_R1))
    if width == vocab_size:
        return cut_R1

    # The worst candidate is kept: so may be tokens beyond it. And a limit k between the two widths
    # means that the total above was the wrong one.
    worst_kept_R = (kept_RK[:, -1] > 0.0) & (best_RK[:, -1:] >= cut_R1).squeeze(1)
    open_R = worst_kept_R | ((top.k > width) & (top.k < vocab_size))
    again = open_R.nonzero().squeeze(1)
    if len(again):
        min_p_again = None if min_p_R is None else min_p_R[again]
        top_again = Top(top.k[again], top.p[again])
        cut_R1[again] = _cut(
            scaled_RV[again], weights_RV[again], min_p_again, top_again, vocab_size
        )
    return cut_R1


def _descending(scaled_RV: Tensor) -> Tensor:
    """Row values sorted, best first. On the CPU numpy's vectorised sort is ten times torch's."""
    if scaled_RV.device.type == "cpu":
        return torch.from_numpy(np.sort(scaled_RV.numpy(), axis=1)).flip(1)
    return scaled_RV.sort(dim=1, descending=True)[0]


def _weights(scaled_RN: Tensor, min_p_R: Tensor | None) -> Tensor:
    """exp(scaled) with what min-p removes set to 0. The best token has weight 1."""
    weights_RN = scaled_RN.exp()
    if min_p_R is not None:
        weights_RN.masked_fill_(weights_RN < min_p_R.unsqueeze(1), 0.0)
    return weights_RN
