"""Draws the next token of each row: per-slot state, and the order in which things apply.

The order is vLLM v1's: grammar mask, min_tokens, logit_bias, penalties (repetition, frequency,
presence), then greedy, or temperature, min-p, top-k, top-p and the draw (`draw.py` has the exact
boundaries). Logprobs are taken from the logits before any of this.

Where a grammar and min_tokens disagree the grammar wins: min_tokens is not applied to a row that
has a mask, since holding back eos when the grammar allows nothing else would leave no token at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.engine.sampling import draw
from penstock.engine.sampling.logprobs import LogprobTensors, gather_logprobs, prompt_logprobs
from penstock.engine.sampling.masks import NO_MASKS, TokenMasks, apply_masks
from penstock.engine.sampling.penalties import MinTokens, Shaper, shapers
from penstock.engine.sampling.philox import uniforms
from penstock.engine.scheduler.batch import NewSequence
from penstock.protocol.errors import EngineFailed, InvalidRequest, PenstockError
from penstock.protocol.tokens import TokenLogprobs

#: Below this a temperature means greedy, as in vLLM.
_GREEDY_BELOW = 1e-5


@dataclass(slots=True)
class SampledRows:
    """What one `Sampler.sample` drew. Everything is on the device until a property is read.

    `ids_R` (int64) may be gathered by the next step at once. A row with an error holds id 0, which
    is safe to embed and must not be used otherwise.
    """

    ids_R: Tensor
    top_R: Tensor  # best logit after shaping: tells rows that cannot be sampled
    mask_errors: dict[int, PenstockError]
    logprob_rows: list[int]
    logprob_counts: list[int]
    logprob_tensors: LogprobTensors | None

    @property
    def ids(self) -> list[int]:
        return self.ids_R.tolist()

    @property
    def errors(self) -> list[PenstockError | None]:
        """For each row the reason why it has no token, or None."""
        found = [_row_error(top) for top in self.top_R.tolist()]
        for row, error in self.mask_errors.items():
            found[row] = error
        return found

    @property
    def logprobs(self) -> list[TokenLogprobs | None]:
        """For each row its logprobs, or None where the request asked for none."""
        found: list[TokenLogprobs | None] = [None] * len(self.ids_R)
        if self.logprob_tensors is not None:
            entries = self.logprob_tensors.to_list(self.logprob_counts)
            for row, entry in zip(self.logprob_rows, entries):
                found[row] = entry
        return found


def _row_error(top: float) -> PenstockError | None:
    if math.isfinite(top):
        return None
    if top == -math.inf:
        return EngineFailed("no token is left to sample: every one is forbidden at this position")
    return EngineFailed("the model's logits are not finite")


class Sampler:
    """Sampling state of `max_num_seqs` slots. Used from the runner's thread only."""

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._eos_token_ids = tuple(eos_token_ids)
        # On the CPU reading a flag back is free, so a small candidate set with an exact fallback
        # pays. Elsewhere it would stall the loop, and a sort is cheap.
        self._candidates = draw.CANDIDATES if self.device.type == "cpu" else vocab_size
        self._temperature = np.zeros(max_num_seqs)
        self._min_p = np.zeros(max_num_seqs)
        self._top_p = np.ones(max_num_seqs)
        self._top_k = np.full(max_num_seqs, vocab_size, dtype=np.int64)
        self._seed = np.zeros(max_num_seqs, dtype=np.uint64)
        self._choice = np.zeros(max_num_seqs, dtype=np.uint64)
        self._logprobs = np.full(max_num_seqs, -1, dtype=np.int64)
        self._shapers: list[list[Shaper]] = [[] for _ in range(max_num_seqs)]

    def admit(self, new: NewSequence) -> None:
        """Take over a slot's parameters and rebuild its counts from the ids known so far.

        Raises `InvalidRequest` for a logit_bias on an id outside the vocabulary.
        """
        params, slot = new.sampling, new.slot
        for token_id in params.logit_bias:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"logit_bias names token {token_id}; this model has {self.vocab_size}",
                    param="logit_bias",
                )
        greedy = params.temperature < _GREEDY_BELOW
        self._temperature[slot] = 0.0 if greedy else params.temperature
        self._min_p[slot] = params.min_p
        self._top_p[slot] = params.top_p
        limited = 0 < params.top_k < self.vocab_size
        self._top_k[slot] = params.top_k if limited else self.vocab_size
        self._seed[slot] = params.seed % 2**64
        self._choice[slot] = new.choice
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._shapers[slot] = shapers(
            params,
            new.token_ids[: new.num_prompt_tokens],
            new.token_ids[new.num_prompt_tokens :],
            [i for i in (*self._eos_token_ids, *params.stop_token_ids) if 0 <= i < self.vocab_size],
            self.device,
        )

    def free(self, slot: int) -> None:
        self._temperature[slot] = 0.0
        self._logprobs[slot] = -1
        self._shapers[slot] = []

    def sample(
        self,
        logits_RV: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks = NO_MASKS,
    ) -> SampledRows:
        """Draw one token a row.

        `logits_RV` is float32 and is changed in place; row r belongs to `slots[r]`, and its token
        will be output token `positions[r]` (0 is the first after the prompt).
        """
        at = np.asarray(slots, dtype=np.int64)
        logprob_rows = np.flatnonzero(self._logprobs[at] >= 0).tolist()
        raw_LV = logits_RV[logprob_rows] if logprob_rows else None  # a copy: the rest is in place
        broken_R = self._shape(logits_RV, slots, positions, masks)

        ids_R = logits_RV.argmax(dim=1)
        top_R = logits_RV.gather(1, ids_R.unsqueeze(1)).squeeze(1)
        random = np.flatnonzero(self._temperature[at] > 0)
        if len(random):
            self._draw(ids_R, top_R, logits_RV, at, np.asarray(positions), random)
        if broken_R is not None:
            top_R = torch.where(broken_R, torch.nan, top_R)
        ids_R = torch.where(top_R.isfinite(), ids_R, 0)

        for row, (slot, position) in enumerate(zip(slots, positions)):
            for shaper in self._shapers[slot]:
                shaper.record(ids_R[row : row + 1], position)
        counts = self._logprobs[at[logprob_rows]].tolist()
        tensors = (
            None if raw_LV is None else gather_logprobs(raw_LV, ids_R[logprob_rows], max(counts))
        )
        return SampledRows(ids_R, top_R, dict(masks.errors), logprob_rows, counts, tensors)

    def prompt_logprobs(
        self, logits_TV: Tensor, next_ids: list[int], k: int
    ) -> list[TokenLogprobs]:
        """Logprobs of the prompt tokens `next_ids[t]` that follow each row of raw logits."""
        return prompt_logprobs(logits_TV, next_ids, k)

    def _shape(
        self,
        logits_RV: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks,
    ) -> Tensor | None:
        """Masks, bias and penalties. Returns which rows were not finite before a mask hid it."""
        broken_R = None
        if masks.rows:
            rows = list(masks.rows)
            broken_R = torch.zeros(len(slots), dtype=torch.bool, device=self.device)
            broken_R[rows] = ~logits_RV[rows].amax(dim=1).isfinite()
            apply_masks(logits_RV, masks)
        masked = set(masks.rows)
        for row, (slot, position) in enumerate(zip(slots, positions)):
            for shaper in self._shapers[slot]:
                if not (row in masked and isinstance(shaper, MinTokens)):
                    shaper.shape(logits_RV[row], position)
        return broken_R

    def _draw(
        self,
        ids_R: Tensor,
        top_R: Tensor,
        logits_RV: Tensor,
        at: np.ndarray,
        positions: np.ndarray,
        random: np.ndarray,
    ) -> None:
        """Replace the greedy ids of the rows `random` by drawn ones."""
        uniform = uniforms(self._seed[at], self._choice[at], positions)
        filtered = (self._top_k[at] < self.vocab_size) | (self._top_p[at] < 1.0)
        for rows in (random[~filtered[random]], random[filtered[random]]):
            if not len(rows):
                continue
            own = at[rows]
            scaled_RV = logits_RV if len(rows) == len(at) else logits_RV[rows.tolist()]
            temperature_R = self._to(self._temperature[own], torch.float32)
            scaled_RV = (scaled_RV - top_R[rows.tolist()].unsqueeze(1)) / temperature_R.unsqueeze(1)
            uniform_R = self._to(uniform[rows])
            min_p_R = self._to(self._min_p[own], torch.float32) if self._min_p[own].any() else None
            if filtered[rows[0]]:
                top_k_R, top_p_R = self._to(self._top_k[own]), self._to(self._top_p[own])
                drawn_R = draw.draw_filtered(
                    scaled_RV, min_p_R, top_k_R, top_p_R, uniform_R, self._candidates
                )
            else:
                drawn_R = draw.draw_unfiltered(scaled_RV, min_p_R, uniform_R)
            ids_R[rows.tolist()] = drawn_R

    def _to(self, values: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        return torch.as_tensor(values).to(device=self.device, dtype=dtype)
