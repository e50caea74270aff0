"""A fixed-size hash table of 16-byte keys whose every operation takes many keys at once.

Buckets of eight slots; a key may stand in either of two buckets and goes into the emptier one (the
"power of two choices": Mitzenmacher, 2001), so the table can be filled to seven tenths before more
than a key in thousands is let go. Nothing chains over buckets: a removal empties a slot and leaves
no trace that would have to be swept up later, and a lookup looks at sixteen slots, no more.

Keys are two little-endian 64-bit words. What stands beside a slot (who holds the key) is the
caller's.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BUCKET_SLOTS = 8
#: Beyond this share of slots in use, buckets begin to run over.
FILL = 0.7

#: A slot of zeros is empty, so the key of zeros is kept under another name.
_NAME_OF_ZERO = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0xD6E8FEB86659FD93))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def key_words(keys: bytes) -> tuple[Words, Words]:
    """Packed 16-byte keys as two columns of words, shape (n,) each."""
    assert len(keys) % 16 == 0, "keys are 16 bytes each"
    words = np.frombuffer(keys, dtype="<u8").reshape(-1, 2)
    low, high = words[:, 0].copy(), words[:, 1].copy()
    high[(low | high) == 0] = _NAME_OF_ZERO
    return low, high


class KeyTable:
    """Room for `capacity` keys, and a few more. When both buckets of a new key are full, the key in
    them that was used longest ago goes."""

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self.num_buckets = max(2, math.ceil(capacity / (BUCKET_SLOTS * FILL)))
        self.num_slots = self.num_buckets * BUCKET_SLOTS
        shape = (self.num_buckets, BUCKET_SLOTS)
        self._low = np.zeros(shape, np.uint64)
        self._high = np.zeros(shape, np.uint64)
        #: When each slot was last used, by a clock that ticks with each key; 0: empty.
        self._used = np.zeros(shape, np.uint64)
        self._clock = 0
        self.num_keys = 0
        self.num_evicted = 0

    @property
    def nbytes(self) -> int:
        return self._low.nbytes + self._high.nbytes + self._used.nbytes

    def find(self, low: Words, high: Words) -> Slots:
        """The slot of each key, -1 where it is absent."""
        buckets = self._buckets(low, high)
        same = (self._low[buckets] == low[:, None, None]) & (
            self._high[buckets] == high[:, None, None]
        )
        flat = same.reshape(len(low), 2 * BUCKET_SLOTS)
        place = flat.argmax(axis=1)
        rows = np.arange(len(low))
        slots = buckets[rows, place // BUCKET_SLOTS] * BUCKET_SLOTS + place % BUCKET_SLOTS
        return np.where(flat[rows, place], slots, -1)

    def touch(self, slots: Slots) -> None:
        """These were used now. The first counts as the newest: of a chain, the end goes first."""
        self._used.reshape(-1)[slots] = self._ticks(len(slots))

    def claim(self, low: Words, high: Words) -> tuple[Slots, Slots]:
        """A slot for each key, which is where it stands already if it does; and those slots that
        have been taken, from nothing or from a key that had to go."""
        slots = np.full(len(low), -1, np.int64)
        taken: list[Slots] = []
        pending = np.arange(len(low))
        used = self._used.reshape(-1)
        while len(pending):
            found = self.find(low[pending], high[pending])
            known = found >= 0
            slots[pending[known]] = found[known]
            used[found[known]] = self._ticks(int(known.sum()))
            pending = pending[~known]
            # Several may want one slot: whose stamp is there in the end has got it, the others
            # look again (and find it taken, or their own key in it).
            wanted = self._room_for(low[pending], high[pending])
            before = used[wanted]
            stamps = self._ticks(len(pending))
            used[wanted] = stamps
            won = used[wanted] == stamps
            self._put(wanted[won], low[pending[won]], high[pending[won]], before[won])
            taken.append(wanted[won])
            slots[pending[won]] = wanted[won]
            pending = pending[~won]
        return slots, np.concatenate(taken) if taken else np.empty(0, np.int64)

    def release(self, slots: Slots) -> None:
        """Empty these (each named once)."""
        self._used.reshape(-1)[slots] = 0
        self._low.reshape(-1)[slots] = 0
        self._high.reshape(-1)[slots] = 0
        self.num_keys -= len(slots)

    # --- inside --------------------------------------------------------------------------------

    def _buckets(self, low: Words, high: Words) -> Slots:
        """Shape (n, 2). Keys are hashes as a rule; mixed, they need not be."""
        mixed = (low * _MIX[0]) ^ (high * _MIX[1])
        mixed = (mixed ^ (mixed >> _HALF)) * _MIX[2]
        size = np.uint64(self.num_buckets)
        both = np.stack([(mixed >> _HALF) * size >> _HALF, (mixed & _LOW) * size >> _HALF], axis=1)
        return both.astype(np.int64)

    def _room_for(self, low: Words, high: Words) -> Slots:
        """A free slot in the emptier bucket of each key, or the one that was used longest ago."""
        buckets = self._buckets(low, high)
        used = self._used[buckets]  # (n, 2, BUCKET_SLOTS)
        oldest = used.min(axis=2)
        load = np.count_nonzero(used, axis=2)
        full = load.min(axis=1) == BUCKET_SLOTS
        second = np.where(full, oldest[:, 1] < oldest[:, 0], load[:, 1] < load[:, 0]).astype(int)
        rows = np.arange(len(low))
        place = used[rows, second].argmin(axis=1)
        return np.asarray(buckets[rows, second] * BUCKET_SLOTS + place)

    def _put(self, slots: Slots, low: Words, high: Words, before: Words) -> None:
        self._low.reshape(-1)[slots] = low
        self._high.reshape(-1)[slots] = high
        fresh = int((before == 0).sum())
        self.num_keys += fresh
        self.num_evicted += len(slots) - fresh

    def _ticks(self, count: int) -> Words:
        self._clock += count
        return np.arange(self._clock, self._clock - count, -1, dtype=np.int64).astype(np.uint64)
