"""Sequences that wait for their first token, by how their prompts begin: what an instance is about
to compute for one, it will have for another."""

from __future__ import annotations

from itertools import islice

from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES
from penstock.service.journal import Entry

#: Waiting sequences of an instance, the newest, whose prompts are compared with a new one's.
_LOOKED_AT = 8


class Waiting:
    def __init__(self) -> None:
        #: Keys of those who wait, by their first block, instance and sequence.
        self._by_first: dict[bytes, dict[str, dict[str, bytes]]] = {}
        self._places: dict[str, tuple[bytes, str]] = {}

    def add(self, entry: Entry, keys: bytes) -> None:
        """It has been placed; `keys` are those of its blocks."""
        assert entry.instance is not None, "who waits has been placed"
        if first := keys[:KEY_BYTES]:
            self._places[entry.key] = first, entry.instance
            alike = self._by_first.setdefault(first, {})
            alike.setdefault(entry.instance, {})[entry.key] = keys

    def remove(self, entry: Entry) -> None:
        """It has begun, or waits there no more. (Nothing happens if that is known.)"""
        if entry.key in self._places:
            first, instance = self._places.pop(entry.key)
            alike = self._by_first[first]
            del alike[instance][entry.key]
            if not alike[instance]:
                del alike[instance]
            if not alike:
                del self._by_first[first]

    def soon_there(self, keys: bytes) -> dict[str, int]:
        """By instance: leading tokens of a prompt with these keys that it is about to compute for
        others, where there are any."""
        found: dict[str, int] = {}
        for instance, waiting in self._by_first.get(keys[:KEY_BYTES], {}).items():
            same = 0
            for others in islice(reversed(waiting.values()), _LOOKED_AT):
                next_key = slice(same * KEY_BYTES, (same + 1) * KEY_BYTES)
                if len(keys) > next_key.start and others[next_key] == keys[next_key]:
                    same = _same_blocks(keys, others)
            found[instance] = BLOCK_TOKENS * same
        return found


def _same_blocks(keys: bytes, others: bytes) -> int:
    """Leading blocks, of which the first is the same. Keys are chained: where two agree, so does
    everything before them."""
    low, high = 1, min(len(keys), len(others)) // KEY_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        at = slice((middle - 1) * KEY_BYTES, middle * KEY_BYTES)
        low, high = (middle, high) if others[at] == keys[at] else (low, middle - 1)
    return low
