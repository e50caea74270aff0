"""Hits where an instance says nothing of its cache: guessed from what was sent there.

For each instance an LRU of the keys of what it was given, with the capacity that it is believed to
have. It is an estimate, too high when the instance evicts sooner than we think, too low when others
use it too; `audit.py` measures how far off it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from penstock.protocol.kv import BLOCK_TOKENS, split_keys
from penstock.service.policies.routing import Floats

#: What explanations say of hits from here.
NOTE = "hits are estimated from what was sent there"


class SentKeys:
    """What one instance was sent: at most `capacity` keys, the least recently used go first."""

    __slots__ = ("_keys", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def sent(self, keys: Sequence[bytes]) -> None:
        """In the order of the prompt. Its end goes first when room is needed."""
        for key in reversed(keys[: self.capacity]):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self.capacity:
            self._keys.popitem(last=False)

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are there."""
        known = self._keys
        return next((i for i, key in enumerate(keys) if key not in known), len(keys))

    def clear(self) -> None:
        self._keys.clear()


class ApproximateIndex:
    """The same question as `KvIndex.hits`, answered by guessing. Keys are any 16 bytes that name a
    block and all before it; `block_tokens` is what one stands for."""

    def __init__(self, block_tokens: int = BLOCK_TOKENS) -> None:
        self._block_tokens = block_tokens
        self._sent: dict[str, SentKeys] = {}

    def add(self, instance: str, capacity: int) -> None:
        """Know `instance`, with room for so many blocks; what it was sent before is forgotten."""
        self._sent[instance] = SentKeys(capacity)

    def drop(self, instance: str) -> None:
        self._sent.pop(instance, None)

    def sent(self, instance: str, keys: bytes) -> None:
        """`instance` computes (or has computed) these blocks. Unknown instances are fine."""
        if instance in self._sent:
            self._sent[instance].sent(split_keys(keys))

    def hits(self, keys: bytes, names: Sequence[str]) -> tuple[Floats, Floats]:
        """Estimated leading tokens on each of `names`; nothing is known of tiers, so both arrays
        are the same."""
        wanted = split_keys(keys)
        counts = [self._sent[n].leading(wanted) if n in self._sent else 0 for n in names]
        tokens = np.array(counts, dtype=np.float64) * self._block_tokens
        return tokens, tokens

    def num_blocks(self, instance: str) -> int:
        return len(self._sent[instance]) if instance in self._sent else 0
