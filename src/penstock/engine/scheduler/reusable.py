"""Blocks that nobody holds and that have a key: what eviction takes next, and what it must leave.

Blocks that are being stored are *detained*: they keep their place in the order, but are not taken.
They stand apart, so that neither counting nor taking has to look past them: there may be hundreds
of them, and they are the oldest.

The order is a queue of entries. An entry is a number that has the block in it and grows with time,
so the queue is sorted. Who goes elsewhere leaves an entry behind that counts for nothing; it goes
when it has come to the front, or when half of the queue is such. So nothing is kept for each block
but 8 bytes, and 8 to 16 more where it can be reused.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

#: A queue is made anew when so many of its entries count for nothing, and half of it.
_STALE = 1024


class Reusable:
    """Of `num_blocks` blocks those that can be reused, the least recently used one first."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._entry_of = array("q", bytes(8 * num_blocks))  # by block; 0: it is not here
        self._queue = array("q")  # sorted; those before `_head` have been taken out
        self._head = 0
        self._detained: dict[int, None] = {}
        self._num_evictable = 0
        self._now = 0  # a multiple of `num_blocks`

    def __len__(self) -> int:
        return self._num_evictable + len(self._detained)

    def __contains__(self, block: int) -> bool:
        return self._entry_of[block] != 0

    @property
    def num_evictable(self) -> int:
        return self._num_evictable

    def evictable(self) -> Iterator[int]:
        """Those that are not detained, oldest first."""
        for place in range(self._head, len(self._queue)):
            block = self._block_at(place)
            if block is not None:
                yield block

    def in_order(self) -> list[int]:
        """All of them, oldest first."""
        return sorted((*self.evictable(), *self._detained), key=self._entry_of.__getitem__)

    def add(self, block: int, detained: bool) -> None:
        """As the youngest."""
        if detained:
            self._now += self._num_blocks
            self._entry_of[block] = self._now + block
            self._detained[block] = None
        else:
            self.extend((block,))

    def extend(self, blocks: Iterable[int]) -> None:
        """As the youngest, the last one youngest of all; none is detained."""
        entry_of, queue, now, step = self._entry_of, self._queue, self._now, self._num_blocks
        before = len(queue)
        for block in blocks:
            now += step
            entry_of[block] = entry = now + block
            queue.append(entry)
        self._now = now
        self._num_evictable += len(queue) - before

    def remove(self, block: int) -> None:
        if block in self._detained:
            del self._detained[block]
        else:
            self._num_evictable -= 1
        self._entry_of[block] = 0
        self._tidy()

    def take_oldest(self) -> int:
        """There must be an evictable one."""
        while True:
            block = self._block_at(self._head)
            self._head += 1
            if block is not None:
                self._entry_of[block] = 0
                self._num_evictable -= 1
                self._tidy()
                return block

    def take_oldest_ones(self, count: int) -> list[int]:
        """So many times `take_oldest`; there must be as many."""
        entry_of, queue, step, place = self._entry_of, self._queue, self._num_blocks, self._head
        self._num_evictable -= count
        found: list[int] = []
        while count:
            entry = queue[place]
            block = entry % step
            place += 1
            if entry_of[block] == entry:
                entry_of[block] = 0
                found.append(block)
                count -= 1
        self._head = place
        self._tidy()
        return found

    def detain(self, block: int) -> None:
        self._detained[block] = None
        self._num_evictable -= 1
        del self._queue[bisect_left(self._queue, self._entry_of[block], lo=self._head)]

    def let_go(self, blocks: Iterable[int]) -> None:
        """Those of `blocks` that are detained are so no longer; each goes back to its place."""
        for block in blocks:
            if block in self._detained:
                del self._detained[block]
                insort(self._queue, self._entry_of[block], lo=self._head)
                self._num_evictable += 1

    def clear(self) -> list[int]:
        """Forget all of them; returns those that were not detained."""
        evictable = list(self.evictable())
        for block in (*evictable, *self._detained):
            self._entry_of[block] = 0
        self._detained.clear()
        self._num_evictable = 0
        del self._queue[:]
        self._head = 0
        return evictable

    def _block_at(self, place: int) -> int | None:
        """None: what stood there went elsewhere."""
        entry = self._queue[place]
        block = entry % self._num_blocks
        return block if self._entry_of[block] == entry else None

    def _tidy(self) -> None:
        if len(self._queue) - self._num_evictable <= max(_STALE, self._num_evictable):
            return
        entry_of, step = self._entry_of, self._num_blocks
        entries = self._queue[self._head :]
        self._queue = array("q", [e for e in entries if entry_of[e % step] == e])
        self._head = 0
