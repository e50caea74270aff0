"""Blocks that nobody holds and that have a key: what eviction takes next, and what it must leave.

Blocks that are being stored are *detained*: they keep their place in the order, but are not taken.
They stand apart, so that neither counting nor taking has to look past them: there may be hundreds
of them, and they are the oldest.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import takewhile


class Reusable:
    """Of `num_blocks` blocks those that can be reused, the least recently used one first."""

    def __init__(self, num_blocks: int) -> None:
        self._lru: OrderedDict[int, None] = OrderedDict()  # those that are not detained
        self._detained: dict[int, None] = {}
        self._since = array(
            "q", bytes(8 * num_blocks)
        )  # when a block came here; says which one is older
        self._now = 0

    def __len__(self) -> int:
        return len(self._lru) + len(self._detained)

    def __contains__(self, block: int) -> bool:
        return block in self._lru or block in self._detained

    @property
    def num_evictable(self) -> int:
        return len(self._lru)

    def evictable(self) -> Iterator[int]:
        """Those that are not detained, oldest first."""
        return iter(self._lru)

    def in_order(self) -> list[int]:
        """All of them, oldest first."""
        return sorted((*self._lru, *self._detained), key=self._since.__getitem__)

    def add(self, block: int, detained: bool) -> None:
        """As the youngest."""
        self._now += 1
        self._since[block] = self._now
        (self._detained if detained else self._lru)[block] = None

    def remove(self, block: int) -> None:
        if block in self._detained:
            del self._detained[block]
        else:
            del self._lru[block]

    def take_oldest(self) -> int:
        """There must be an evictable one."""
        return self._lru.popitem(last=False)[0]

    def detain(self, block: int) -> None:
        del self._lru[block]
        self._detained[block] = None

    def let_go(self, blocks: Iterable[int]) -> None:
        """Those of `blocks` that are detained are so no longer; each goes back to its place."""
        freed = [b for b in blocks if b in self._detained]
        if not freed:
            return
        for block in freed:
            del self._detained[block]
        last = max(self._since[b] for b in freed)
        freed += takewhile(lambda b: self._since[b] < last, self._lru)
        for block in sorted(freed, key=self._since.__getitem__, reverse=True):
            self._lru[block] = None
            self._lru.move_to_end(block, last=False)

    def clear(self) -> list[int]:
        """Forget all of them; returns those that were not detained."""
        evictable = list(self._lru)
        self._lru.clear()
        self._detained.clear()
        return evictable
