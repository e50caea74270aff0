"""Where each constrained sequence stands in its grammar, and which tokens may come next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray

from penstock.checkpoint import Checkpoint
from penstock.engine.sampling.masks import NO_MASKS, TokenMasks, mask_words
from penstock.engine.structured.compiler import GrammarCompiler
from penstock.grammar import deep_stack_executor, error_text
from penstock.protocol.errors import EngineFailed, PenstockError
from penstock.protocol.request import Constraint

T = TypeVar("T")


class _Slot:
    """One sequence's matcher, its next mask once computed, or the error that ended it."""

    def __init__(self) -> None:
        self.matcher: LLMatcher | None = None
        self.mask_W: NDArray[np.int32] | None = None
        self.error: PenstockError | None = None


class Matchers:
    """The matchers of all constrained slots, synchronous. Used from one thread at a time.

    Nothing here raises for what a grammar or a token did: the failure is kept with its slot, and
    `fill` reports it for that row alone.

    A grammar that is complete allows the eos ids only, and goes on doing so if the sequence is made
    to go on (ignore_eos): the grammar wins, the text stays valid.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._slots: dict[int, _Slot] = {}

    def admit(self, slot: int, constraint: Constraint, output_ids: Sequence[int] = ()) -> None:
        """Start the slot's grammar and replay the output so far (resumed or preempted)."""
        state = self._slots[slot] = _Slot()
        try:
            state.matcher = self._compiler.matcher(constraint)
        except PenstockError as exc:
            state.error = exc
            return
        for token_id in output_ids:
            self._consume(state, token_id)

    def free(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def advance(self, slot: int, token_id: int) -> None:
        """The slot's next output token is `token_id`. A slot without a constraint is ignored."""
        state = self._slots.get(slot)
        if state is not None:
            self._consume(state, token_id)

    def prepare(self, slot: int) -> None:
        """Compute the slot's next mask now, so that `fill` finds it."""
        state = self._slots.get(slot)
        if state is not None and state.mask_W is None and state.error is None:
            self._compute(state)

    def fill(self, slots: Sequence[int]) -> TokenMasks:
        """Masks of the constrained ones among `slots`; `slots[r]` is the slot of batch row r."""
        rows: list[int] = []
        found: list[NDArray[np.int32]] = []
        errors: dict[int, PenstockError] = {}
        for row, slot in enumerate(slots):
            state = self._slots.get(slot)
            if state is None:
                continue
            self.prepare(slot)
            if state.error is not None:
                errors[row] = state.error
                continue
            assert state.mask_W is not None
            rows.append(row)
            found.append(state.mask_W)
        if not rows:
            return TokenMasks(errors=errors) if errors else NO_MASKS
        width = mask_words(self._compiler.vocab_size)
        return TokenMasks(rows, torch.from_numpy(np.stack(found)[:, :width].copy()), errors)

    def wants_stop(self, slot: int) -> bool:
        """The output is complete: nothing but eos may follow."""
        state = self._slots.get(slot)
        return (
            state is not None
            and state.error is None
            and state.matcher is not None
            and state.matcher.is_stopped()
        )

    def _consume(self, state: _Slot, token_id: int) -> None:
        matcher = state.matcher
        if state.error is not None or matcher is None:
            return
        state.mask_W = None
        if matcher.is_stopped():
            if token_id not in self._compiler.eos_token_ids:
                state.error = EngineFailed(f"token {token_id} follows an output that was complete")
            return
        if not matcher.consume_token(token_id):
            state.error = EngineFailed(f"the grammar failed: {error_text(matcher.get_error())}")

    def _compute(self, state: _Slot) -> None:
        matcher, compiler = state.matcher, self._compiler
        assert matcher is not None
        if matcher.is_stopped() and not matcher.is_error():
            state.mask_W = compiler.eos_mask
            return
        mask_W = np.zeros(compiler.mask_words, dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        if matcher.is_error():
            state.error = EngineFailed(f"the grammar failed: {error_text(matcher.get_error())}")
            return
        state.mask_W = mask_W & compiler.known_mask


class MaskService:
    """`Matchers` on a thread of their own, so that masks are made while the device computes.

    Calls are carried out in the order in which they are made. Only `masks` waits. llguidance lets
    go of the interpreter lock while it works.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._matchers = Matchers(compiler)
        self._constrained: set[int] = set()
        self._unchecked: list[Future[None]] = []
        self._worker = deep_stack_executor("penstock-masks")

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> MaskService:
        return cls(GrammarCompiler.from_checkpoint(checkpoint, vocab_size, eos_token_ids))

    def admit(self, slot: int, constraint: Constraint, output_ids: Sequence[int] = ()) -> None:
        """As `Matchers.admit`; compiling happens on the thread too."""
        self._constrained.add(slot)
        self._submit(self._admit, slot, constraint, list(output_ids))

    def free(self, slot: int) -> None:
        if slot in self._constrained:
            self._constrained.discard(slot)
            self._submit(self._matchers.free, slot)

    def advance_async(self, slots: Sequence[int], ids: Sequence[int]) -> None:
        """Take in the sampled ids and start on the next masks. Unconstrained slots are skipped."""
        steps = [(slot, i) for slot, i in zip(slots, ids) if slot in self._constrained]
        if steps:
            self._submit(self._advance, steps)

    def masks(self, slots: Sequence[int]) -> TokenMasks:
        """Masks for the next draw of `slots`, after every advance made so far. Waits for them."""
        if not any(slot in self._constrained for slot in slots):
            return NO_MASKS
        return self._wait(self._matchers.fill, list(slots))

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _admit(self, slot: int, constraint: Constraint, output_ids: list[int]) -> None:
        self._matchers.admit(slot, constraint, output_ids)
        self._matchers.prepare(slot)

    def _advance(self, steps: list[tuple[int, int]]) -> None:
        for slot, token_id in steps:
            self._matchers.advance(slot, token_id)
        for slot, _ in steps:
            self._matchers.prepare(slot)

    def _submit(self, call: Callable[..., None], *args: object) -> None:
        self._unchecked.append(self._worker.submit(call, *args))

    def _wait(self, call: Callable[..., T], *args: object) -> T:
        """The answer of `call`; raises what an earlier call raised (a bug: grammars do not)."""
        found = self._worker.submit(call, *args).result()
        earlier, self._unchecked = self._unchecked, []
        for future in earlier:  # all done: the thread keeps the order
            future.result()
        return found
