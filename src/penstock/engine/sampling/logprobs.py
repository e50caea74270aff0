"""Log-probabilities under the model's raw distribution, as vLLM's `logprobs_mode=raw_logprobs`.

Nothing that shapes the draw (temperature, penalties, bias, masks) is seen here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.protocol.tokens import TokenLogprobs

#: Rows of float32 logits worked on at once for prompt logprobs; bounds the scratch memory.
_CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Logprobs of `L` positions, still on the device. The alternatives stand best first."""

    ids: Tensor  # [L]
    logprobs: Tensor  # [L]
    ranks: Tensor  # [L]
    top_ids: Tensor  # [L, K]
    top_logprobs: Tensor  # [L, K]

    def to_list(self, wanted: list[int]) -> list[TokenLogprobs]:
        """Copy to the host; `wanted[l]` alternatives are kept for position l."""
        columns = zip(
            self.ids.tolist(),
            self.logprobs.tolist(),
            self.ranks.tolist(),
            self.top_ids.tolist(),
            self.top_logprobs.tolist(),
            wanted,
        )
        return [
            TokenLogprobs(token_id, logprob, rank, top_ids[:k], top_logprobs[:k])
            for token_id, logprob, rank, top_ids, top_logprobs, k in columns
        ]


def gather_logprobs(logits_LV: Tensor, ids_L: Tensor, k: int) -> LogprobTensors:
    """Logprob and rank of `ids_L` (int64) and the best `k` alternatives, from raw logits.

    The rank is 1 + the number of tokens with a strictly greater logit, so the greedy choice always
    has rank 1 even when it shares its logit with another.
    """
    own_L1 = logits_LV.gather(1, ids_L.unsqueeze(1))
    norm_L1 = logits_LV.logsumexp(dim=1, keepdim=True)
    rank_L = (logits_LV > own_L1).sum(dim=1) + 1
    top_LK, top_ids_LK = logits_LV.topk(min(k, logits_LV.shape[1]), dim=1)
    return LogprobTensors(
        ids_L, (own_L1 - norm_L1).squeeze(1), rank_L, top_ids_LK, top_LK - norm_L1
    )


def prompt_logprobs(logits_TV: Tensor, next_ids: list[int], k: int) -> list[TokenLogprobs]:
    """Logprobs of the tokens that really follow: `next_ids[t]` under `logits_TV[t]`."""
    assert logits_TV.shape[0] == len(next_ids)
    ids_T = torch.tensor(next_ids, dtype=torch.int64, device=logits_TV.device)
    found: list[TokenLogprobs] = []
    for start in range(0, len(next_ids), _CHUNK_TOKENS):
        part_T = ids_T[start : start + _CHUNK_TOKENS]
        logits_LV = logits_TV[start : start + _CHUNK_TOKENS].float()
        found += gather_logprobs(logits_LV, part_T, k).to_list([k] * len(part_T))
    return found
