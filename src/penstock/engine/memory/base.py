"""KV memory as the rest of the engine sees it.

Each slot owns a contiguous virtual range; block `i` of a sequence stands at
`base(slot) + i * block_stride_bytes`. Inside a block the order is
`[layer][k|v][kv_head][token][dim]`, so a kernel needs (base, block stride, layer offset), no table.
"""

from __future__ import annotations

from typing import Protocol

import torch

from penstock.protocol.kv import KvLayout


class KvMemory(Protocol):
    layout: KvLayout
    num_blocks: int
    #: Bytes from one block of a sequence to the next: layout.block_bytes rounded up to the page.
    block_stride_bytes: int

    def map(self, slot: int, index: int, block: int) -> None:
        """Put physical `block` at position `index` of the slot's range (idempotent)."""

    def free_slot(self, slot: int) -> None:
        """The slot's sequence has ended. Mappings may be kept for reuse; contents may not be read."""

    def base(self, slot: int) -> int:
        """Address of the slot's range."""

    def slot_blocks(self, slot: int, num_blocks: int) -> torch.Tensor:
        """The first blocks of a slot as a view [num_blocks, layer, 2, kv_head, token, dim]."""

    def check(self) -> None:
        """Assert that what is mapped is what was asked for."""

    def close(self) -> None: ...
