"""KV memory as the rest of the engine sees it.

Each slot owns a contiguous virtual range; block `i` of a sequence stands at
`base(slot) + i * block_stride_bytes`. Inside a block the order is
`[layer][k|v][kv_head][token][dim]`, so a kernel needs (base, block stride, layer offset), no table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from penstock.engine.memory.codec import decode, encode
from penstock.protocol.instance import NO_MAPS, MapCounts
from penstock.protocol.kv import KvLayout


class KvMemory(Protocol):
    layout: KvLayout
    num_blocks: int
    #: Bytes from one block of a sequence to the next: layout.block_bytes rounded up to the page.
    block_stride_bytes: int
    device: torch.device
    #: What mapping has cost so far; nothing where it costs nothing.
    maps: MapCounts

    def map(self, slot: int, index: int, block: int) -> None:
        """Put physical `block` at position `index` of the slot's range (idempotent)."""

    def free_slot(self, slot: int) -> None:
        """The slot's sequence has ended. Its mappings may be kept, its contents not be read."""

    def base(self, slot: int, num_blocks: int = 0) -> int:
        """Address of the slot's range. Asserts that its first `num_blocks` blocks are mapped: a
        kernel that reads past them would take the process down."""

    def slot_blocks(self, slot: int, num_blocks: int) -> torch.Tensor:
        """The first blocks of a slot [num_blocks, layer, 2, kv_head, token, dim]: a view where the
        memory is virtually contiguous, otherwise a copy (then use `write` and `read`)."""

    def pool_blocks(self) -> torch.Tensor:
        """What every physical block holds [num_blocks, layer, 2, kv_head, token, dim]."""

    def write(
        self, slot: int, start: int, layer: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> None:
        """Store keys and values at positions [start, start + T). For the clear, not the fast."""

    def read(self, slot: int, num_tokens: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [0, num_tokens) as k_GSD, v_GSD."""

    def moved_on(self, rows: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
        """Given (slot, leading blocks read) of each row of a step that has just ended: which rows
        have read windows whose pages are not theirs any more, and those windows. Nothing where
        there are no windows."""

    def check(self) -> None:
        """Assert that what is mapped is what was asked for."""

    def close(self) -> None: ...


class ContiguousAccess(ABC):
    """`write` and `read` for memories whose `slot_blocks` is a view."""

    layout: KvLayout
    maps: MapCounts = NO_MAPS

    @abstractmethod
    def slot_blocks(self, slot: int, num_blocks: int) -> torch.Tensor: ...

    def moved_on(self, rows: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
        return {}

    def write(
        self, slot: int, start: int, layer: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> None:
        positions = torch.arange(start, start + len(k_TGD))
        blocks_NLCGBD = self._covering(slot, start + len(k_TGD))
        block_tokens = blocks_NLCGBD.shape[4]
        index, offset = positions // block_tokens, positions % block_tokens
        encode(self.layout, blocks_NLCGBD[:, layer, 0], index, offset, k_TGD)
        encode(self.layout, blocks_NLCGBD[:, layer, 1], index, offset, v_TGD)

    def read(self, slot: int, num_tokens: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens_in_order(self.layout, self._covering(slot, num_tokens)[:, layer], num_tokens)

    def _covering(self, slot: int, num_tokens: int) -> torch.Tensor:
        block_tokens = self.slot_blocks(slot, 1).shape[4]
        return self.slot_blocks(slot, -(-num_tokens // block_tokens))


def tokens_in_order(
    layout: KvLayout, blocks_NCGBX: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's blocks [n, 2, kv_head, token, dim] as k_GSD and v_GSD."""

    def in_order(blocks_NGBX: torch.Tensor) -> torch.Tensor:
        return decode(layout, blocks_NGBX).transpose(0, 1).flatten(1, 2)[:, :num_tokens]

    return in_order(blocks_NCGBX[:, 0]), in_order(blocks_NCGBX[:, 1])
