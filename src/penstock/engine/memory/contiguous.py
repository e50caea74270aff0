"""The null implementation: one plain tensor a slot, and sharing by copying.

It is the oracle for the mapped memory. A block's content travels: it lives in the slots that hold
the block while there are any, and in `_store` between two holders. The rule under which copies
cannot be told from shared pages is the engine's own: only whole blocks are shared, and a shared
block is no longer written.
"""

from __future__ import annotations

import torch

from penstock.engine.memory.base import ContiguousAccess
from penstock.engine.memory.sizing import block_shape, torch_dtype
from penstock.protocol.kv import KvLayout


class ContiguousMemory(ContiguousAccess):
    """See `KvMemory`. Costs slots × longest sequence: for tests and small models."""

    def __init__(
        self, layout: KvLayout, num_blocks: int, num_slots: int, max_blocks_per_slot: int
    ) -> None:
        shape, dtype = block_shape(layout), torch_dtype(layout.dtype)
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device("cpu")
        self.block_stride_bytes = layout.block_bytes
        self._slots = [
            torch.zeros((max_blocks_per_slot, *shape), dtype=dtype) for _ in range(num_slots)
        ]
        self._store = torch.zeros((num_blocks, *shape), dtype=dtype)
        self._blocks: list[dict[int, int]] = [{} for _ in range(num_slots)]  # index -> block

    def map(self, slot: int, index: int, block: int) -> None:
        assert 0 <= block < self.num_blocks, f"block {block} of {self.num_blocks}"
        held = self._blocks[slot].get(index)
        if held == block:
            return
        if held is not None:
            self._store[held] = self._slots[slot][index]
        self._slots[slot][index] = self._content(block)
        self._blocks[slot][index] = block

    def free_slot(self, slot: int) -> None:
        for index, block in self._blocks[slot].items():
            self._store[block] = self._slots[slot][index]
        self._blocks[slot].clear()

    def base(self, slot: int, num_blocks: int = 0) -> int:
        held = len(self._blocks[slot])
        assert num_blocks <= held, f"slot {slot} has {held} blocks mapped, {num_blocks} are needed"
        return self._slots[slot].data_ptr()

    def slot_blocks(self, slot: int, num_blocks: int) -> torch.Tensor:
        return self._slots[slot][:num_blocks]

    def pool_blocks(self) -> torch.Tensor:
        """A copy [num_blocks, layer, 2, kv_head, token, dim] of what each block holds now."""
        return torch.stack([self._content(block) for block in range(self.num_blocks)])

    def check(self) -> None:
        for block in range(self.num_blocks):
            holders = self._holders(block)
            for other in holders[1:]:
                same = torch.equal(holders[0].view(torch.uint8), other.view(torch.uint8))
                assert same, f"block {block} was written while it was shared"

    def close(self) -> None:
        self._slots.clear()

    def _content(self, block: int) -> torch.Tensor:
        holders = self._holders(block)
        return holders[0] if holders else self._store[block]

    def _holders(self, block: int) -> list[torch.Tensor]:
        return [
            self._slots[slot][index]
            for slot, held in enumerate(self._blocks)
            for index, found in held.items()
            if found == block
        ]
