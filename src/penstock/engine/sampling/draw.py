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

import torch
from torch import Tensor

#: Tokens looked at before a full sort is considered. A nucleus of trained models nearly always
#: fits; the check is exact, so only time depends on it.
CANDIDATES = 1024
_BLOCK_TOKENS = 256


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


def draw_unfiltered(scaled_RV: Tensor, min_p_R: Tensor | None, uniform_R: Tensor) -> Tensor:
    """Ids drawn from softmax(scaled) after min-p (None: no row uses it)."""
    return invert_cdf(_weights(scaled_RV, min_p_R), uniform_R)


def draw_filtered(
    scaled_RV: Tensor,
    min_p_R: Tensor | None,
    top_k_R: Tensor,
    top_p_R: Tensor,
    uniform_R: Tensor,
    candidates: int = CANDIDATES,
) -> Tensor:
    """Ids drawn after min-p, top-k and top-p. `scaled_RV` has row maxima of 0.

    `top_k_R` is int64 in [1, V] (V: no limit), `top_p_R` and `uniform_R` are float64. Works on the
    best `candidates` of each row; a row whose kept set may reach beyond them is done again on all
    of V. With candidates >= V there is nothing to check, and nothing is read back from the device.
    """
    vocab_size = scaled_RV.shape[1]
    width = min(candidates, vocab_size)
    best_RK, ids_RK = _best(scaled_RV, width)
    weights_RK = _weights(best_RK, min_p_R)
    kth_R1 = best_RK.gather(1, (top_k_R.clamp_max(width) - 1).unsqueeze(1))
    weights_RK.masked_fill_(best_RK < kth_R1, 0.0)

    mass_RK = weights_RK.cumsum(dim=1, dtype=torch.float64)
    total_R1 = mass_RK[:, -1:]
    if width < vocab_size:
        whole_R1 = _weights(scaled_RV, min_p_R).sum(dim=1, keepdim=True, dtype=torch.float64)
        total_R1 = torch.where((top_k_R == vocab_size).unsqueeze(1), whole_R1, total_R1)
    last_R1 = torch.searchsorted(mass_RK, top_p_R.unsqueeze(1) * total_R1).clamp_max(width - 1)
    # top_p = 1 keeps everything, whatever the rounding of the sums says.
    last_R1 = torch.where(top_p_R.unsqueeze(1) < 1.0, last_R1, width - 1)
    weights_RK.masked_fill_(best_RK < best_RK.gather(1, last_R1), 0.0)

    ids_RK, by_id_RK = ids_RK.sort(dim=1)
    drawn_R1 = invert_cdf(weights_RK.gather(1, by_id_RK), uniform_R).unsqueeze(1)
    ids_R = ids_RK.gather(1, drawn_R1).squeeze(1)
    if width == vocab_size:
        return ids_R

    # Weight on the worst candidate: the kept set may go on beyond it. A limit between the two
    # widths: the total above was the wrong one.
    open_R = (weights_RK[:, -1] > 0.0) | ((top_k_R > width) & (top_k_R < vocab_size))
    again = open_R.nonzero().squeeze(1)
    if len(again):
        min_p_again = None if min_p_R is None else min_p_R[again]
        filters = (top_k_R[again], top_p_R[again], uniform_R[again])
        ids_R[again] = draw_filtered(scaled_RV[again], min_p_again, *filters, vocab_size)
    return ids_R


def _best(scaled_RV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    if width == scaled_RV.shape[1]:
        return scaled_RV.sort(dim=1, descending=True)
    return scaled_RV.topk(width, dim=1)


def _weights(scaled_RN: Tensor, min_p_R: Tensor | None) -> Tensor:
    """exp(scaled) with what min-p removes set to 0. The best token has weight 1."""
    weights_RN = scaled_RN.exp()
    if min_p_R is not None:
        weights_RN.masked_fill_(weights_RN < min_p_R.unsqueeze(1), 0.0)
    return weights_RN
