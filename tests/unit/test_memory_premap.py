"""Mapping ahead must never be noticed: not by a step under way, and not by the one it is for.

Several batches are in flight; maps are made ahead at any moment hypothesis likes, or not at all.
The oracle applies each batch's maps at its start and knows nothing of mapping ahead.
"""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.engine.memory.premap import Premapper
from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.scheduler.batch import Batch, BatchRow, BlockMap
from penstock.protocol.errors import EngineFailed

BLOCK_TOKENS, NUM_SLOTS, MAX_BLOCKS = 4, 2, 5
#: What becomes of a slot in a batch, and the blocks it gets.
actions = st.tuples(
    st.sampled_from(["rest", "extend", "new", "exchange"]),
    st.lists(st.integers(0, 50), min_size=1, max_size=2),
)


class Table:
    """What a mapped memory's table does."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}

    def map_ahead(self, slot: int, index: int, block: int) -> None:
        self.places[slot, index] = block


class ByHand(Premapper):
    """Without its thread: the test says when it maps."""

    def __init__(self, table: Table) -> None:
        super().__init__(table, BLOCK_TOKENS)
        self.pending: deque[tuple[int, BlockMap]] = deque()

    def _start(self) -> None: ...

    def fetch(self) -> None:
        while not self._waiting.empty():
            work = self._waiting.get()
            assert work is not None
            self.pending += [(work[0], m) for m in work[1]]


class PremapMachine(RuleBasedStateMachine):
    """Batches as a scheduler might make them, only wilder: slots change hands while they are being
    computed, and blocks are exchanged under them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.ahead = ByHand(self.table)
        self.oracle: dict[tuple[int, int], int] = {}
        self.in_flight: deque[Batch] = deque()
        self.running: Batch | None = None
        self.held = [0] * NUM_SLOTS  # blocks, as of the batch launched last
        self.steps = 0

    @rule(slots=st.lists(actions, min_size=NUM_SLOTS, max_size=NUM_SLOTS))
    @precondition(lambda self: len(self.in_flight) < 4)
    def launch(self, slots: list[tuple[str, list[int]]]) -> None:
        batch = Batch(self.steps, [])
        for slot, (action, blocks) in enumerate(slots):
            first = self.held[slot]
            if action == "new":
                batch.freed_slots.append(slot)
                first = 0
            elif action == "exchange":
                first = max(0, first - len(blocks))
            if action != "rest":
                blocks = blocks[: MAX_BLOCKS - first]
                batch.maps.extend(BlockMap(slot, first + i, b) for i, b in enumerate(blocks))
                self.held[slot] = max(
                    0 if action == "new" else self.held[slot], first + len(blocks)
                )
                batch.rows.append(BatchRow(slot, self.held[slot] * BLOCK_TOKENS - 1, 1, True))
        if batch.rows:
            self.steps += 1
            self.in_flight.append(batch)
            self.ahead.launched(batch)
            self.ahead.fetch()

    @rule(count=st.integers(1, 6))
    @precondition(lambda self: self.ahead.pending)
    def map_ahead(self, count: int) -> None:
        for _ in range(min(count, len(self.ahead.pending))):
            step, m = self.ahead.pending.popleft()
            self.ahead.map_one(step, m)

    @rule()
    def next_step(self) -> None:
        """The step under way ends, and the next one starts if there is one."""
        if self.running is not None:
            self.in_flight.popleft()
            self.ahead.ended()
            self.running = None
        if self.in_flight:
            self.running = batch = self.in_flight[0]
            self.ahead.starts(batch)
            for m in batch.maps:
                self.oracle[m.slot, m.index] = m.block
                self.table.places[m.slot, m.index] = m.block

    @invariant()
    def the_step_under_way_sees_its_own_blocks(self) -> None:
        for row in self.running.rows if self.running else []:
            for index in range(-(-(row.start + row.num_tokens) // BLOCK_TOKENS)):
                place = row.slot, index
                assert self.table.places[place] == self.oracle[place], place


PremapMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestPremapMachine = PremapMachine.TestCase


def decode(step: int, slot: int, start: int, *maps: BlockMap, freed: list[int] | None = None):
    return Batch(step, [BatchRow(slot, start, 1, True)], freed or [], maps=list(maps))


@pytest.fixture
def memory():
    layout = kv_layout(2, 2, 64, "bfloat16")
    made = XTensorMemory(layout, num_blocks=12, num_slots=3, max_blocks_per_slot=6)
    yield made
    made.close()


def wait_until(condition) -> None:
    ticks = threading.Event()
    for _ in range(2000):
        if condition():
            return
        ticks.wait(0.005)
    raise AssertionError("it never happened")


def test_a_block_is_laid_while_the_step_before_computes(memory) -> None:
    ahead = Premapper(memory, 16)
    first = decode(0, 0, 15, BlockMap(0, 0, 3))
    ahead.launched(first)
    ahead.starts(first)
    memory.map(0, 0, 3)
    ahead.launched(decode(1, 0, 16, BlockMap(0, 1, 4)))
    wait_until(lambda: memory.maps.ahead == 1)
    before = memory.num_syscalls
    memory.map(0, 1, 4)  # what step 1 does at its start
    assert memory.num_syscalls == before and memory.maps.at_start == 1
    memory.check()
    ahead.close()


def test_a_place_in_use_is_left_to_the_start_of_the_step(memory) -> None:
    ahead = Premapper(memory, 16)
    first = decode(0, 0, 15, BlockMap(0, 0, 3))
    ahead.launched(first)
    ahead.starts(first)
    memory.map(0, 0, 3)
    # The slot is freed and taken by another sequence while step 0 still reads it.
    again = BlockMap(0, 0, 7), BlockMap(0, 1, 8)
    ahead.launched(decode(1, 0, 31, *again, freed=[0]))
    wait_until(lambda: memory.maps.ahead == 1)
    mapped = {place: block for place, (_, _, block) in memory._actual_mappings().items()}
    assert mapped == {(0, 0): 3, (0, 1): 8}
    ahead.close()


def test_nothing_is_laid_for_a_step_that_has_started(memory) -> None:
    ahead = Premapper(memory, 16)
    step = decode(1, 0, 16, BlockMap(0, 1, 4))
    ahead.starts(step)
    ahead.map_one(1, step.maps[0])
    assert memory.num_syscalls == 0
    ahead.close()


def test_scarce_mappings_are_not_spent_ahead() -> None:
    layout = kv_layout(2, 2, 64, "bfloat16")
    memory = XTensorMemory(layout, 12, 3, 6, max_mappings=3 + 2)
    memory.map(0, 0, 0)
    memory.map(0, 1, 1)
    memory.map_ahead(0, 2, 2)
    assert memory.num_mapped == 2
    memory.check()
    memory.close()


def test_a_refused_mapping_is_tried_again_by_the_step(memory, monkeypatch) -> None:
    from penstock.engine.memory import xtensor

    def refuse(*_: object) -> int:
        raise EngineFailed("the kernel has no room for another mapping")

    memory.map(0, 0, 5)
    with monkeypatch.context() as patched:
        patched.setattr(xtensor, "_mmap", refuse)
        memory.map_ahead(0, 0, 6)
        memory.map_ahead(0, 1, 7)
    memory.map(0, 0, 6)
    memory.map(0, 1, 7)
    memory.check()


def test_a_mapping_that_fails_halfway_leaves_no_hole(memory, monkeypatch) -> None:
    """The kernel may have taken the old mapping down before it found that the new one cannot be."""
    from penstock.engine.memory import xtensor

    lay, calls = xtensor._mmap, []

    def fail_once(address: int, size: int, *others: int) -> int:
        calls.append(address)
        if len(calls) > 1:
            return lay(address, size, *others)
        xtensor._libc.munmap(address, size)
        raise EngineFailed("the kernel has no room for another mapping")

    memory.map(0, 0, 5)
    memory.map(0, 1, 6)
    place = memory.base(0) + memory.block_stride_bytes
    with monkeypatch.context() as patched:
        patched.setattr(xtensor, "_mmap", fail_once)
        memory.map_ahead(0, 1, 7)
    assert calls == [place, place]
    assert protection(place) == "---p"
    memory.map(0, 1, 7)
    memory.check()


def protection(address: int) -> str | None:
    """What the kernel says of an address of this process; None: nothing is there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, *_ = line.split()
        start, end = (int(part, 16) for part in addresses.split("-"))
        if start <= address < end:
            return rights
    return None


def test_a_mapping_thread_that_fails_is_done_without(caplog) -> None:
    class Broken:
        def map_ahead(self, slot: int, index: int, block: int) -> None:
            raise AssertionError("slot out of range")

    ahead = Premapper(Broken(), 16)
    ahead.launched(decode(0, 0, 0, BlockMap(0, 0, 0)))
    ahead.launched(decode(1, 1, 0, BlockMap(1, 0, 1)))
    ahead._thread.join(10)
    for step in range(2, 20):
        ahead.launched(decode(step, step, 0, BlockMap(step, 0, step)))
    assert ahead._waiting.empty()
    assert [r.message for r in caplog.records if r.exc_info] == [
        "mapping ahead stops; from now on blocks are mapped as steps start"
    ]
    ahead.close()


def test_a_step_may_end_while_the_next_is_launched() -> None:
    ahead = ByHand(Table())

    class Interrupted(deque):
        """Whoever walks through it is overtaken by the compute thread."""

        def __iter__(self):
            walk = super().__iter__()
            yield next(walk)
            ends.start()
            ends.join(0.05)
            yield from walk

    ahead._in_flight = Interrupted([decode(0, 0, 0), decode(1, 0, 1)])
    ends = threading.Thread(target=ahead.ended)
    ahead.launched(decode(2, 0, 2))
    ends.join(10)
    assert [batch.step for batch in deque.__iter__(ahead._in_flight)][:1] == [1]
