"""Sequences that wait for their first token, by how their prompts begin: what an instance is about
to compute for one, it will have for another."""

from __future__ import annotations

from collections import Counter

from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES
from penstock.service.journal import Entry

#: Waiting sequences of an instance, the newest, whose prompts are compared with a new one's.
_LOOKED_AT = 8


class Waiting:
    def __init__(self) -> None:
        self._by_first: dict[bytes, dict[str, Entry]] = {}
        self._first: dict[str, bytes] = {}

    def add(self, entry: Entry, keys: bytes) -> None:
        """It has been placed; `keys` are those of its blocks."""
        if first := keys[:KEY_BYTES]:
            self._first[entry.key] = first
            self._by_first.setdefault(first, {})[entry.key] = entry

    def remove(self, entry: Entry) -> None:
        """It has begun, or waits there no more. (Nothing happens if that is known.)"""
        first = self._first.pop(entry.key, b"")
        if first:
            alike = self._by_first[first]
            del alike[entry.key]
            if not alike:
                del self._by_first[first]

    def soon_there(self, keys: bytes, digest: str) -> dict[str, int]:
        """By instance: leading tokens of a prompt with these keys that it is about to compute for
        others, where there are any."""
        found: dict[str, int] = {}
        looked_at: Counter[str] = Counter()
        for entry in reversed(self._by_first.get(keys[:KEY_BYTES], {}).values()):
            name = entry.instance
            assert name is not None, "who waits has been placed"
            looked_at[name] += 1
            if looked_at[name] <= _LOOKED_AT:
                same = BLOCK_TOKENS * _same_blocks(keys, entry.block_keys(digest))
                found[name] = max(found.get(name, 0), same)
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
