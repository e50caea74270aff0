"""Which slot of a tier holds which key, for several threads at once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Slots:
    """A key's slot is not reused while somebody reads it, and not found before it is written."""

    def __init__(self, num_slots: int, held: Mapping[bytes, int] | None = None) -> None:
        """`held`: keys that are there from the start, with their slots."""
        self._slot_of = dict(held or {})
        taken = set(self._slot_of.values())
        assert len(taken) == len(self._slot_of), "two keys in one slot"
        self._free = [slot for slot in range(num_slots - 1, -1, -1) if slot not in taken]
        self._readers: Counter[int] = Counter()
        self._dropped: set[int] = set()  # while they were read; only asked
        self._lock = threading.Lock()

    def __contains__(self, key: bytes) -> bool:
        return key in self._slot_of

    @contextmanager
    def reading(self, key: bytes) -> Iterator[int | None]:
        """The slot that holds `key`, or None."""
        with self._lock:
            slot = self._slot_of.get(key)
            if slot is not None:
                self._readers[slot] += 1
        try:
            yield slot
        finally:
            if slot is not None:
                self._end_reading(slot)

    def _end_reading(self, slot: int) -> None:
        with self._lock:
            self._readers[slot] -= 1
            if not self._readers[slot]:
                del self._readers[slot]
                if slot in self._dropped:
                    self._dropped.discard(slot)
                    self._free.append(slot)

    def take(self) -> int | None:
        """A free slot to write to, or None; then `publish` or `give_back` it."""
        with self._lock:
            return self._free.pop() if self._free else None

    def publish(self, key: bytes, slot: int) -> None:
        """The slot is written: from now on it is found under `key`."""
        with self._lock:
            if key in self._slot_of:  # somebody else was first
                self._free.append(slot)
            else:
                self._slot_of[key] = slot

    def give_back(self, slot: int) -> None:
        with self._lock:
            self._free.append(slot)

    def drop(self, key: bytes) -> None:
        with self._lock:
            slot = self._slot_of.pop(key, None)
            if slot is None:
                return
            if slot in self._readers:
                self._dropped.add(slot)
            else:
                self._free.append(slot)
