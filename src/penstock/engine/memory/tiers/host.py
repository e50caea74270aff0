"""Blocks in host memory: one anonymous mapping, a slot a block."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from penstock.engine.memory.sizing import GIB, available_memory_bytes
from penstock.engine.memory.tiers.data import Block
from penstock.engine.memory.tiers.slots import Slots
from penstock.protocol.errors import NotEnoughMemory


class HostTier:
    """See `TierData`. Pages come with their first use, so an unused tier costs nothing; low slots
    are used first. Raises `NotEnoughMemory` where the machine could never hold it all."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        num_bytes = num_blocks * block_bytes
        available = available_memory_bytes()
        if num_bytes > available:
            raise NotEnoughMemory(
                f"a host KV cache of {num_bytes / GIB:.2f} GiB does not fit: {available / GIB:.2f} "
                "GiB are available. Lower --kv-host-cache-bytes"
            )
        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._blocks = np.frombuffer(self._memory, np.uint8).reshape(num_blocks, block_bytes)
        self._slots = Slots(num_blocks)

    def load(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        return [self._load(key, destination) for key, destination in blocks]

    def _load(self, key: bytes, destination: Block) -> bool:
        with self._slots.reading(key) as slot:
            if slot is None:
                return False
            np.copyto(destination, self._blocks[slot])
        return True

    def store(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        return [self._store(key, source) for key, source in blocks]

    def _store(self, key: bytes, source: Block) -> bool:
        if key in self._slots:
            return True
        slot = self._slots.take()
        if slot is None:
            return False
        np.copyto(self._blocks[slot], source)
        self._slots.publish(key, slot)
        return True

    def drop(self, key: bytes) -> None:
        self._slots.drop(key)

    def close(self) -> None:
        del self._blocks
        self._memory.close()
