"""Three memories, one history: mapped, plain and paged KV must hold the same after any sequence.

The machine obeys the engine's rule: a block that several sequences share is no longer written.
"""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.engine.memory.contiguous import ContiguousMemory
from penstock.engine.memory.paged import PagedMemory
from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.xtensor import XTensorMemory

NUM_BLOCKS, NUM_SLOTS, MAX_BLOCKS = 8, 4, 5
LAYOUT = kv_layout(2, 2, 16, "float32", block_tokens=16)
BLOCK = LAYOUT.block_tokens
HEADS, DIM = LAYOUT.num_kv_heads, LAYOUT.head_dim

slots = st.integers(0, NUM_SLOTS - 1)


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        sizes = (LAYOUT, NUM_BLOCKS, NUM_SLOTS, MAX_BLOCKS)
        # A bound so low that old mappings have to go now and then.
        self.mapped = XTensorMemory(*sizes, max_mappings=NUM_SLOTS + 7)
        self.memories = [self.mapped, ContiguousMemory(*sizes), PagedMemory(*sizes)]
        self.held: list[list[int]] = [[] for _ in range(NUM_SLOTS)]
        self.content: dict[int, torch.Tensor] = {}
        self.stamp = 0.0
        self.syscalls_seen = self.live_then = 0

    def teardown(self) -> None:
        for memory in self.memories:
            memory.close()

    def users(self, block: int) -> int:
        return sum(held.count(block) for held in self.held)

    def extend(self, slot: int, block: int) -> None:
        for memory in self.memories:
            memory.map(slot, len(self.held[slot]), block)
        self.held[slot].append(block)

    @rule(slot=slots, block=st.integers(0, NUM_BLOCKS - 1))
    def map_unused(self, slot: int, block: int) -> None:
        if self.users(block) == 0 and len(self.held[slot]) < MAX_BLOCKS:
            self.extend(slot, block)

    @rule(slot=slots, other=slots)
    def share_next_block_of(self, slot: int, other: int) -> None:
        index = len(self.held[slot])
        if index < min(MAX_BLOCKS, len(self.held[other])):
            self.extend(slot, self.held[other][index])

    @rule(slot=slots, data=st.data())
    def map_again(self, slot: int, data: st.DataObject) -> None:
        if self.held[slot]:
            index = data.draw(st.integers(0, len(self.held[slot]) - 1))
            for memory in self.memories:
                memory.map(slot, index, self.held[slot][index])

    @rule(slot=slots, layer=st.integers(0, 1), data=st.data())
    def write_tokens(self, slot: int, layer: int, data: st.DataObject) -> None:
        own = [i for i, block in enumerate(self.held[slot]) if self.users(block) == 1]
        if not own:
            return
        index = data.draw(st.sampled_from(own))
        first = data.draw(st.integers(0, BLOCK - 1))
        count = data.draw(st.integers(1, BLOCK - first))
        self.stamp += 1
        k_TGD = torch.arange(count * HEADS * DIM).view(count, HEADS, DIM) / 1e4 + self.stamp
        for memory in self.memories:
            memory.write(slot, index * BLOCK + first, layer, k_TGD, -k_TGD)
        kept = self.content.setdefault(self.held[slot][index], torch.zeros(2, 2, HEADS, BLOCK, DIM))
        kept[layer, 0, :, first : first + count] = k_TGD.transpose(0, 1)
        kept[layer, 1, :, first : first + count] = -k_TGD.transpose(0, 1)

    @rule(slot=slots)
    @precondition(lambda self: any(self.held))
    def free(self, slot: int) -> None:
        for memory in self.memories:
            memory.free_slot(slot)
        self.held[slot].clear()

    @invariant()
    def all_hold_what_was_written(self) -> None:
        for memory in self.memories:
            memory.check()
            for block, expected in self.content.items():
                assert torch.equal(memory.pool_blocks()[block], expected), type(memory)
            for slot, held in enumerate(self.held):
                blocks = memory.slot_blocks(slot, len(held))
                for i, block in enumerate(held):
                    if block in self.content:
                        assert torch.equal(blocks[i], self.content[block]), type(memory)

    @invariant()
    def mappings_stay_below_the_bound(self) -> None:
        live = sum(len(held) for held in self.held)
        # What has ended since the last map may still be mapped: only a map takes it down.
        if self.mapped.num_syscalls != self.syscalls_seen:
            self.syscalls_seen, self.live_then = self.mapped.num_syscalls, live
        assert self.mapped.num_mapped <= max(7, live, self.live_then)


MemoryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMemoryMachine = MemoryMachine.TestCase
