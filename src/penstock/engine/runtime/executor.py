"""One step on one rank: apply the batch to the slots, run the model, sample.

Runs on the compute thread only, strictly in launch order; that order is what makes slot and block
reuse safe and placeholder tokens unnecessary: each sampled id is in the token table before the next
step reads it.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from penstock.engine.attention.base import AttentionBackend, AttentionRow
from penstock.engine.memory.base import KvMemory
from penstock.engine.models.base import Model
from penstock.engine.runtime.forms import Forms
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.batch import Batch, BatchRow, RowResult, StepResult
from penstock.engine.structured.matchers import MaskService
from penstock.protocol.errors import EngineFailed, ErrorInfo, PenstockError
from penstock.protocol.tokens import TokenLogprobs
from penstock.trace import NO_TRACE, Trace

log = logging.getLogger(__name__)


class StepExecutor:
    """Owns the per-slot state of the device side: token table, KV ranges, sampler, matchers."""

    def __init__(
        self,
        model: Model,
        memory: KvMemory,
        attention: AttentionBackend,
        sampler: Sampler,
        masks: MaskService,
        *,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        forms: Forms,
        trace: Trace = NO_TRACE,
    ) -> None:
        self._forms = forms
        self._trace = trace
        self._ended_s: float | None = None  # the last step
        self._model = model
        self._memory = memory
        self._attention = attention
        self._sampler = sampler
        self._masks = masks
        self._device = device
        # One past the limit: the last sampled id is written too. Untouched rows cost no memory.
        self._tokens_SL = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self._num_prompt_S = np.zeros(max_num_seqs, dtype=np.int64)

    def execute(self, batch: Batch) -> StepResult:
        """A step that fails to compute says so in its result. Raises only if the batch cannot even
        be applied to the slots: after that nothing here can be trusted."""
        started_s = time.perf_counter()
        idle_since_s = started_s if self._ended_s is None else self._ended_s
        with self._trace.span("apply"):
            self._apply(batch)
        rows, error = self._attempt(batch)
        rows, stale_windows = self._verified(batch, rows)
        self._ended_s = ended_s = time.perf_counter()
        self._trace.add("idle", idle_since_s, started_s)
        self._trace.add(f"step {batch.step}", started_s, ended_s, partial(_about, batch))
        return StepResult(
            batch.step,
            rows,
            ended_s - started_s,
            error,
            gap_s=started_s - idle_since_s,
            maps=self._memory.maps,
            stale_windows=stale_windows,
        )

    def _verified(
        self, batch: Batch, results: list[RowResult]
    ) -> tuple[list[RowResult], tuple[int, ...]]:
        """Rows that have read a peer's page which is not what was offered any more count for
        nothing. This is after the last read of the step, as it must be."""
        block_tokens = self._memory.layout.block_tokens
        read = [(r.slot, -(-(r.start + r.num_tokens) // block_tokens)) for r in batch.rows]
        stale = self._memory.moved_on(read)
        if not stale:
            return results, ()
        results = [
            RowResult(result.slot, [], stale=True) if i in stale else result
            for i, result in enumerate(results)
        ]
        return results, tuple(dict.fromkeys(window for found in stale.values() for window in found))

    def _attempt(self, batch: Batch) -> tuple[list[RowResult], ErrorInfo | None]:
        try:
            with torch.inference_mode():
                return self._compute(batch.rows), None
        except Exception as exc:
            log.exception("step %d failed", batch.step)
            reason = f"step {batch.step} failed: {type(exc).__name__}: {exc}"
            error = exc if isinstance(exc, PenstockError) else EngineFailed(reason)
            return [RowResult(row.slot, []) for row in batch.rows], error.info()

    def _compute(self, rows: list[BatchRow]) -> list[RowResult]:
        hidden_TH = self._forward(rows)
        ends = np.cumsum([row.num_tokens for row in rows])
        results = [RowResult(row.slot, []) for row in rows]
        for i, row in enumerate(rows):
            if row.prompt_logprobs:
                span_TH = hidden_TH[ends[i] - row.num_tokens : ends[i]]
                entries = self._prompt_logprobs(row, span_TH)
                results[i] = RowResult(row.slot, [], prompt_logprobs=entries)
        drawn = [i for i, row in enumerate(rows) if row.samples]
        if drawn:
            last = torch.as_tensor(ends[drawn] - 1, device=self._device)
            self._sample(rows, drawn, hidden_TH[last], results)
        return results

    def _apply(self, batch: Batch) -> None:
        """Frees, admissions and maps, in this order."""
        for slot in batch.freed_slots:
            self._memory.free_slot(slot)
            self._sampler.free(slot)
            self._masks.free(slot)
        for new in batch.admitted:
            self._tokens_SL[new.slot, : len(new.token_ids)] = new.token_ids
            self._num_prompt_S[new.slot] = new.num_prompt_tokens
            self._sampler.admit(new)
            if new.constraint is not None:
                self._masks.admit(new.slot, new.constraint, new.token_ids[new.num_prompt_tokens :])
        if batch.maps:
            with self._trace.span("map"):
                for m in batch.maps:
                    self._memory.map(m.slot, m.index, m.block)

    def _forward(self, rows: list[BatchRow]) -> torch.Tensor:
        ids = [self._tokens_SL[r.slot, r.start : r.start + r.num_tokens] for r in rows]
        positions = [np.arange(r.start, r.start + r.num_tokens) for r in rows]
        ids_T = torch.from_numpy(np.concatenate(ids)).to(self._device)
        positions_T = torch.from_numpy(np.concatenate(positions)).to(self._device)
        with self._trace.span("plan"):
            self._attention.plan([AttentionRow(r.slot, r.start, r.num_tokens) for r in rows])
        with self._trace.span("forward"):
            return self._forms.forward(ids_T, positions_T)

    def _sample(
        self,
        rows: list[BatchRow],
        drawn: list[int],
        hidden_RH: torch.Tensor,
        results: list[RowResult],
    ) -> None:
        with self._trace.span("logits"):
            logits_RV = self._model.logits(hidden_RH)
        slots = [rows[i].slot for i in drawn]
        at = [rows[i].start + rows[i].num_tokens for i in drawn]
        outputs = [p - int(self._num_prompt_S[s]) for p, s in zip(at, slots, strict=True)]
        with self._trace.span("sample"):
            sampled = self._sampler.sample(logits_RV, slots, outputs, self._masks.masks(slots))
        for j, i in enumerate(drawn):
            slot, token, error = slots[j], sampled.ids[j], sampled.errors.get(j)
            if error is None:
                self._tokens_SL[slot, at[j]] = token
            logprobs = sampled.logprobs[j]
            results[i] = RowResult(
                slot,
                [] if error else [token],
                None if error or logprobs is None else [logprobs],
                results[i].prompt_logprobs,
                error,
            )
        self._masks.advance_async(slots, sampled.ids)

    def _prompt_logprobs(self, row: BatchRow, span_TH: torch.Tensor) -> list[TokenLogprobs]:
        """Of the prompt tokens that follow each computed position, in slices to bound memory."""
        num_prompt = int(self._num_prompt_S[row.slot])
        stop = min(row.start + row.num_tokens, num_prompt - 1)
        found: list[TokenLogprobs] = []
        for start in range(row.start, stop, 64):
            end = min(start + 64, stop)
            logits_TV = self._model.logits(span_TH[start - row.start : end - row.start])
            next_ids = self._tokens_SL[row.slot, start + 1 : end + 1].tolist()
            found += self._sampler.prompt_logprobs(logits_TV, next_ids, row.slot)
        return found

    def close(self) -> None:
        self._masks.close()
        self._memory.close()


def _about(batch: Batch) -> dict[str, Any]:
    """What a trace says of a step."""
    kinds = {"decode" if row.num_tokens == 1 else "prefill" for row in batch.rows}
    return {
        "rows": len(batch.rows),
        "tokens": batch.num_tokens,
        "kind": kinds.pop() if len(kinds) == 1 else "mixed",
        "maps": len(batch.maps),
    }
