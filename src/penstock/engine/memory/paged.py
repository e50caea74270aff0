"""KV memory for devices whose address space we do not map: a pool tensor and a block table.

Plain torch, any device. A sequence is not contiguous here, so `slot_blocks` is a gathered copy and
there is no base address: attention on it reads and writes through `pool_blocks` and `block_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.engine.memory.base import tokens_in_order
from penstock.engine.memory.codec import encode
from penstock.engine.memory.sizing import block_shape, torch_dtype
from penstock.protocol.errors import NotEnoughMemory
from penstock.protocol.instance import NO_MAPS
from penstock.protocol.kv import KvLayout


class PagedMemory:
    """See `KvMemory`. Raises `NotEnoughMemory` when the device cannot hold the pool."""

    maps = NO_MAPS

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        num_slots: int,
        max_blocks_per_slot: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        self.block_stride_bytes = layout.block_bytes
        shape = (num_blocks, *block_shape(layout))
        try:
            self._pool = torch.zeros(shape, dtype=torch_dtype(layout.dtype), device=self.device)
        except (torch.OutOfMemoryError, RuntimeError) as exc:
            raise NotEnoughMemory(
                f"{num_blocks} blocks of {layout.block_bytes} bytes do not fit {device}: {exc}"
            ) from exc
        # On the host: what a step needs of it goes over in one copy, made by `plan`.
        self._table = torch.full((num_slots, max_blocks_per_slot), -1, dtype=torch.int64)
        self._live = [0] * num_slots

    def map(self, slot: int, index: int, block: int) -> None:
        assert 0 <= block < self.num_blocks, f"block {block} of {self.num_blocks}"
        self._table[slot, index] = block
        self._live[slot] = max(self._live[slot], index + 1)

    def free_slot(self, slot: int) -> None:
        self._table[slot, : self._live[slot]] = -1
        self._live[slot] = 0

    def base(self, slot: int, num_blocks: int = 0) -> int:
        raise NotImplementedError("paged memory has no contiguous ranges")

    def block_ids(self, slot: int, num_blocks: int) -> torch.Tensor:
        """Physical blocks of a slot, int64 [num_blocks], on the host."""
        return self._table[slot, :num_blocks]

    def slot_blocks(self, slot: int, num_blocks: int) -> torch.Tensor:
        """A copy: writes to it do not reach the pool."""
        return self._pool[self.block_ids(slot, num_blocks).to(self.device)]

    def pool_blocks(self) -> torch.Tensor:
        return self._pool

    def write(
        self, slot: int, start: int, layer: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> None:
        positions = torch.arange(start, start + len(k_TGD))
        offset = (positions % self.layout.block_tokens).to(self.device)
        block = self._table[slot, positions // self.layout.block_tokens].to(self.device)
        encode(self.layout, self._pool[:, layer, 0], block, offset, k_TGD)
        encode(self.layout, self._pool[:, layer, 1], block, offset, v_TGD)

    def read(self, slot: int, num_tokens: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        num_blocks = -(-num_tokens // self.layout.block_tokens)
        blocks = self.block_ids(slot, num_blocks).to(self.device)
        return tokens_in_order(self.layout, self._pool[:, layer][blocks], num_tokens)

    def moved_on(self, rows: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
        return {}

    def check(self) -> None:
        for slot, live in enumerate(self._live):
            held = self._table[slot]
            assert (held[:live] >= 0).all(), f"slot {slot} has a hole"
            assert (held[live:] == -1).all(), f"slot {slot} holds blocks past its end"

    def close(self) -> None:
        del self._pool
