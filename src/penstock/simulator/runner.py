"""A runner that is a cost model: it takes the time a device would, and draws tokens from a hash.

The next token is a function of everything before it, and of what the KV blocks contain (`kv.py`).
So a request that was preempted, resumed, moved, or given blocks from elsewhere must come out with
exactly the tokens of an undisturbed run, or something read the wrong KV.

A batch is executed when its time is over, not when it is launched: whatever others do to its blocks
meanwhile, it sees.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.engine.scheduler.batch import Batch, BatchRow, RowResult, StepResult
from penstock.protocol.errors import EngineFailed
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.simulator.kv import GARBAGE, KvMemory, prefix_hash
from penstock.simulator.pacing import PacedRunner, StepCost


def next_token(ids: Sequence[int], vocab_size: int) -> int:
    """The simulated model: a hash of the whole sequence so far."""
    digest = hashlib.sha256(array("I", ids).tobytes()).digest()
    return int.from_bytes(digest[:8], "little") % vocab_size


@dataclass(slots=True)
class _Slot:
    ids: list[int]
    blocks: list[int] = field(default_factory=list)
    _prefixes: list[int] = field(default_factory=list)

    def prefixes(self, end: int) -> list[int]:
        """What the cells of positions [0, end) should be (and maybe further ones)."""
        known = self._prefixes
        while len(known) < end:
            before = known[-1] if known else 0
            known.append(prefix_hash(before, self.ids[len(known)]))
        return known

    def put(self, position: int, token: int) -> None:
        """The same position again (a surplus row after a stop) overwrites, as on a device."""
        self.ids[position:] = [token]
        del self._prefixes[position:]

    def map(self, index: int, block: int) -> None:
        self.blocks[index : index + 1] = [block]


class CostModelRunner(PacedRunner):
    """`at(when_s, call)` schedules on the virtual clock; batches run one after the other."""

    def __init__(
        self,
        cost: StepCost,
        vocab_size: int,
        clock: Callable[[], float],
        at: Callable[[float, Callable[[], None]], None],
        memory: KvMemory | None = None,
    ) -> None:
        super().__init__(cost, clock, at)
        self._vocab_size = vocab_size
        self._memory = memory or KvMemory(1 << 20, BLOCK_TOKENS)
        self._slots: dict[int, _Slot] = {}
        #: So many of the next steps will raise.
        self.num_to_fail = 0

    def execute(self, batch: Batch, seconds: float) -> StepResult:
        for slot in batch.freed_slots:
            self._slots.pop(slot, None)
        for new in batch.admitted:
            self._slots[new.slot] = _Slot(list(new.token_ids))
        for entry in batch.maps:
            self._slots[entry.slot].map(entry.index, entry.block)
        if self.num_to_fail:
            self.num_to_fail -= 1
            return self._failed(batch, seconds)
        stale: dict[int, None] = {}
        rows = [self._row(row, stale) for row in batch.rows]
        for step in range(1, batch.steps):
            further = [self._row(_moved_on(row, step), stale) for row in batch.rows]
            rows = [_joined(row, more) for row, more in zip(rows, further)]
        return StepResult(batch.step, rows, seconds, stale_windows=tuple(stale))

    def _failed(self, batch: Batch, step_s: float) -> StepResult:
        """What the step would have written is anything."""
        for row in batch.rows:
            slot, end = self._slots[row.slot], row.start + row.num_tokens + batch.steps - 1
            for position in range(row.start, end):
                index, offset = divmod(position, self._memory.block_tokens)
                self._memory.write(slot.blocks[index], offset, GARBAGE)
            if row.samples:
                for position in range(end - batch.steps + 1, end + 1):
                    slot.put(position, 0)
        error = EngineFailed("the simulated device says so").info()
        return StepResult(batch.step, [], step_s, error=error)

    def _row(self, row: BatchRow, stale: dict[int, None]) -> RowResult:
        slot = self._slots[row.slot]
        end = row.start + row.num_tokens
        wrong = self._first_wrong_cell(slot, row.start)
        prefixes = slot.prefixes(end)
        block_tokens = self._memory.block_tokens
        for position in range(row.start, end):
            cell = prefixes[position] if wrong is None else prefix_hash(wrong, prefixes[position])
            index, offset = divmod(position, block_tokens)
            self._memory.write(slot.blocks[index], offset, cell)
        read = slot.blocks[: -(-end // block_tokens)]
        moved_on = self._memory.stale_among(read)
        stale.update(dict.fromkeys(moved_on))
        if not row.samples:
            return RowResult(row.slot, [], stale=bool(moved_on))
        ids = slot.ids[:end] if wrong is None else [*slot.ids[:end], wrong & 0xFFFFFFFF]
        token = next_token(ids, self._vocab_size)
        slot.put(end, token)
        return RowResult(row.slot, [token], stale=bool(moved_on))

    def _first_wrong_cell(self, slot: _Slot, num_tokens: int) -> int | None:
        """A cell among the first `num_tokens` that is not what it should be."""
        prefixes = slot.prefixes(num_tokens)
        block_tokens = self._memory.block_tokens
        for start in range(0, num_tokens, block_tokens):
            wanted = prefixes[start : min(start + block_tokens, num_tokens)]
            cells = self._memory.read(slot.blocks[start // block_tokens])
            if cells[: len(wanted)] != wanted:
                return next(c for c, w in zip(cells, wanted) if c != w)
        return None


def _moved_on(row: BatchRow, steps: int) -> BatchRow:
    """The row so many steps later in its run."""
    return BatchRow(row.slot, row.start + steps, row.num_tokens, row.samples)


def _joined(row: RowResult, more: RowResult) -> RowResult:
    return RowResult(row.slot, row.ids + more.ids, stale=row.stale or more.stale)
