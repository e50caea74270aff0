"""The CPU as a platform."""

from __future__ import annotations

from penstock.engine.memory.base import KvMemory
from penstock.engine.memory.sizing import available_memory_bytes
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.platforms.base import Platform
from penstock.protocol.kv import KvLayout


class CpuPlatform(Platform):
    """Mapped KV memory, and kernels compiled for this machine where a compiler is at hand."""

    name = "cpu"

    def kv_memory(
        self, layout: KvLayout, num_blocks: int, num_slots: int, max_blocks_per_slot: int
    ) -> KvMemory:
        return XTensorMemory(layout, num_blocks, num_slots, max_blocks_per_slot)

    def available_bytes(self) -> int:
        return available_memory_bytes()
