"""What the scheduler decides, as plain data, and what the runner answers. No torch here.

A batch is applied in the order of its fields: freed slots, admitted sequences, block maps, rows.
The runner executes batches strictly in the order in which they were launched, so everything that
step N does to a slot has happened before step N+1 touches it.

A batch of several `steps` is a *run*: its rows, one token each, are computed so many times, each
time one position further and from the id just drawn. Its maps cover all of its steps.

These are msgspec structs because millions of them are made.
"""

from __future__ import annotations

import msgspec

from penstock.protocol.errors import ErrorInfo
from penstock.protocol.instance import NO_MAPS, MapCounts
from penstock.protocol.request import Constraint, SamplingParams
from penstock.protocol.tokens import TokenLogprobs


class NewSequence(msgspec.Struct, frozen=True):
    """A sequence takes a slot. `token_ids` are all known ids (prompt, then output so far)."""

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    choice: int = 0
    constraint: Constraint | None = None
    adapter: str | None = None


class BlockMap(msgspec.Struct, frozen=True):
    """Block `index` of the slot's virtual range is the physical block `block` from now on."""

    slot: int
    index: int
    block: int


class BatchRow(msgspec.Struct, frozen=True):
    """Compute positions [start, start + num_tokens) of the sequence in `slot`.

    The token ids are in the runner's own table: those of `NewSequence`, and each sampled id, which
    the runner writes at its position as soon as it is drawn (before the host has seen it).
    `samples`: draw the token at position start + num_tokens from the last row of logits.
    `prompt_logprobs`: report log-probabilities of the prompt tokens at positions
    start + 1 ... start + num_tokens that lie inside the prompt.
    """

    slot: int
    start: int
    num_tokens: int
    samples: bool
    prompt_logprobs: bool = False


class Batch(msgspec.Struct, frozen=True):
    step: int
    rows: list[BatchRow]
    freed_slots: list[int] = []
    admitted: list[NewSequence] = []
    maps: list[BlockMap] = []
    steps: int = 1

    @property
    def num_tokens(self) -> int:
        """Of one step."""
        return sum([row.num_tokens for row in self.rows])


class RowResult(msgspec.Struct, frozen=True):
    """`ids` has one id for each step of the batch; it is empty when the row did not sample. An
    `error` ends that sequence alone. A `stale` row has read (or may have read) a window whose page
    its owner has taken back: nothing of it counts, and the sequence's KV is computed again."""

    slot: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: ErrorInfo | None = None
    stale: bool = False


class StepResult(msgspec.Struct, frozen=True):
    """Answers one batch; `rows` stand in the order of `batch.rows`.

    `error` is set when the whole step failed: no row produced anything, and KV written by the step
    must not be trusted. The batch's bookkeeping (freed slots, admissions, maps) is not part of what
    may fail: rows of a batch launched meanwhile rely on it, or they would write to blocks that
    belong to others by now. A runner that cannot do it is lost as a whole (`fatal`): it runs
    nothing more, and its driver ends the instance.

    `stale_windows` are the windows (block ids from `num_blocks` on) that made rows stale.

    `gap_s` is how long nothing was computed before the step; whether there was anything to compute
    the core knows. `maps` counts from the start on.
    """

    step: int
    rows: list[RowResult]
    compute_s: float = 0.0
    error: ErrorInfo | None = None
    fatal: bool = False
    gap_s: float = 0.0
    maps: MapCounts = NO_MAPS
    stale_windows: tuple[int, ...] = ()
