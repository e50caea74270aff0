"""Draws the next token of each row: per-slot state, and the order in which things apply.

The order is vLLM v1's: grammar mask, min_tokens, logit_bias, penalties (repetition, frequency,
presence), then greedy, or temperature, min-p, top-k, top-p and the draw (`draw.py` has the exact
boundaries). Logprobs are taken from the logits before any of this.

Where a grammar and min_tokens disagree the grammar wins: min_tokens is not applied to a row that
has a mask, since holding back eos when the grammar allows nothing else would leave no token at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np
import torch
from torch import Tensor

from penstock.engine.sampling.draw import CANDIDATES, Top, draw
from penstock.engine.sampling.logprobs import LogprobTensors, gather_logprobs, prompt_logprobs
from penstock.engine.sampling.masks import NO_MASKS, TokenMasks, apply_masks
from penstock.engine.sampling.penalties import MinTokens, Shaper, shapers
from penstock.engine.sampling.philox import uniforms
from penstock.engine.scheduler.batch import NewSequence
from penstock.protocol.errors import EngineFailed, ErrorInfo, InvalidRequest, PenstockError
from penstock.protocol.tokens import TokenLogprobs

#: Below this a temperature means greedy, as in vLLM.
_GREEDY_BELOW = 1e-5
#: Logits (1 MB of float32) that are drawn from together on the CPU.
_CACHED_LOGITS = 2**18


class SampledRows:
    """What one `Sampler.sample` drew. Everything is on the device until a property is read.

    `ids_R` (int64) may be gathered by the next step at once. A row with an error holds id 0, which
    is safe to embed and must not be used otherwise.
    """

    def __init__(
        self,
        ids_R: Tensor,
        top_R: Tensor,
        known_errors: Mapping[int, PenstockError],
        logprobs_of: Mapping[int, int],
        logprobs: LogprobTensors | None,
    ) -> None:
        self.ids_R = ids_R
        self._top_R = top_R  # best logit after shaping: tells the rows that cannot be sampled
        self._known_errors = known_errors
        self._logprobs_of = logprobs_of  # row: number of alternatives
        self._logprobs = logprobs

    @cached_property
    def ids(self) -> list[int]:
        return self.ids_R.tolist()

    @cached_property
    def errors(self) -> dict[int, ErrorInfo]:
        """Row: why it has no token."""
        found = {
            row: _row_error(top).info()
            for row, top in enumerate(self._top_R.tolist())
            if not math.isfinite(top)
        }
        return found | {row: error.info() for row, error in self._known_errors.items()}

    @cached_property
    def logprobs(self) -> list[TokenLogprobs | None]:
        """For each row its logprobs, or None where the request asked for none."""
        found: list[TokenLogprobs | None] = [None] * len(self.ids_R)
        if self._logprobs is not None:
            entries = self._logprobs.to_list(list(self._logprobs_of.values()))
            for row, entry in zip(self._logprobs_of, entries):
                found[row] = entry
        return found


def _row_error(top: float) -> PenstockError:
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
        on_cpu = self.device.type == "cpu"
        self._candidates = CANDIDATES if on_cpu else vocab_size
        # A draw makes several passes over its rows: on the CPU they should still be in the cache.
        self._rows_at_once = max(1, _CACHED_LOGITS // vocab_size) if on_cpu else max_num_seqs
        self._temperature = np.zeros(max_num_seqs)
        self._min_p = np.zeros(max_num_seqs)
        self._top_p = np.ones(max_num_seqs)
        self._top_k = np.full(max_num_seqs, vocab_size, dtype=np.int64)
        self._seed = np.zeros(max_num_seqs, dtype=np.uint64)
        self._choice = np.zeros(max_num_seqs, dtype=np.uint64)
        self._logprobs = np.full(max_num_seqs, -1, dtype=np.int64)
        self._prompt_logprobs = np.zeros(max_num_seqs, dtype=np.int64)
        self._shapers: list[list[Shaper]] = [[] for _ in range(max_num_seqs)]
        self._errors: dict[int, PenstockError] = {}

    def admit(self, new: NewSequence) -> None:
        """Take over a slot's parameters and rebuild its counts from the ids known so far.

        Never raises: what is wrong with a request is the error of its row when it is sampled.
        """
        params, slot = new.sampling, new.slot
        outside = [i for i in params.logit_bias if not 0 <= i < self.vocab_size]
        if outside:
            self._errors[slot] = InvalidRequest(
                f"logit_bias names token {outside[0]}; ids go up to {self.vocab_size - 1}",
                param="logit_bias",
            )
            params = msgspec.structs.replace(params, logit_bias={})
        greedy = params.temperature < _GREEDY_BELOW
        self._temperature[slot] = 0.0 if greedy else params.temperature
        self._min_p[slot] = params.min_p
        self._top_p[slot] = params.top_p
        limited = 0 < params.top_k < self.vocab_size
        self._top_k[slot] = params.top_k if limited else self.vocab_size
        self._seed[slot] = params.seed % 2**64
        self._choice[slot] = new.choice
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._prompt_logprobs[slot] = params.prompt_logprobs or 0
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
        self._errors.pop(slot, None)

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
        wanted = {r: int(k) for r, k in enumerate(self._logprobs[at]) if k >= 0}
        raw_LV = logits_RV[list(wanted)] if wanted else None  # a copy: what follows is in place
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
        errors = {r: self._errors[slot] for r, slot in enumerate(slots) if slot in self._errors}
        logprobs = (
            gather_logprobs(raw_LV, ids_R[list(wanted)], max(wanted.values()))
            if raw_LV is not None
            else None
        )
        return SampledRows(ids_R, top_R, errors | dict(masks.errors), wanted, logprobs)

    def prompt_logprobs(
        self, logits_TV: Tensor, next_ids: list[int], slot: int
    ) -> list[TokenLogprobs]:
        """Logprobs of the prompt tokens `next_ids[t]`, each under row t of raw logits.

        With as many alternatives as the sequence in `slot` asked for.
        """
        return prompt_logprobs(logits_TV, next_ids, int(self._prompt_logprobs[slot]))

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
        for group in (random[~filtered[random]], random[filtered[random]]):
            for start in range(0, len(group), self._rows_at_once):
                rows = group[start : start + self._rows_at_once]
                own, index = at[rows], rows.tolist()
                temperature_R1 = self._to(self._temperature[own], torch.float32).unsqueeze(1)
                scaled_RV = logits_RV[index].sub_(top_R[index].unsqueeze(1)).div_(temperature_R1)
                min_p = self._min_p[own]
                min_p_R = self._to(min_p, torch.float32) if min_p.any() else None
                top = None
                if filtered[rows[0]]:
                    top = Top(self._to(self._top_k[own]), self._to(self._top_p[own]))
                uniform_R = self._to(uniform[rows])
                ids_R[index] = draw(scaled_RV, uniform_R, min_p_R, top, self._candidates)

    def _to(self, values: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        return torch.as_tensor(values).to(device=self.device, dtype=dtype)
