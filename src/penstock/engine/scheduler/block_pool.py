"""Physical KV blocks: who holds them, which can be reused by key, which one goes next.

A block is in exactly one of three places: *free* (no key), *reusable* (a key, nobody holds it; in
LRU order) or *held* (by one or more sequences, with or without a key).

Invariant: if a key is cached, so is the key before it; a chain has no hole before its tail. It
holds because sequences hold whole prefixes of the blocks that carry the keys, name blocks in
order and release the last block first, so that in the LRU a block is always older than the one
before it in its chain. Two things follow: a lookup can bisect, and eviction takes leaves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from penstock.protocol.kv import KvChange


class BlockPool:
    """`num_blocks` blocks, named 0 ... num_blocks - 1. Never more."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._parents: list[bytes] = [b""] * num_blocks
        self._public = [False] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # A stack, so that the block that was written last (and is in the CPU's caches) goes first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._changes: list[tuple[str, bytes]] = []

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones and, by eviction, reusable ones."""
        return len(self._free) + len(self._reusable)

    @property
    def num_reusable(self) -> int:
        return len(self._reusable)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_keys(self) -> int:
        return len(self._block_of)

    def keys(self) -> list[bytes]:
        """Every key that others may match, in the order in which the keys were stored."""
        return [key for key, block in self._block_of.items() if self._public[block]]

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `keys`. Takes no reference."""
        num_hits = bisect_left(keys, True, key=lambda key: key not in self._block_of)
        return [self._block_of[key] for key in keys[:num_hits]]

    def num_reusable_in(self, prefix: Sequence[int]) -> int:
        """How many blocks of a matched prefix nobody holds (they are at its end)."""
        return len(prefix) - bisect_left(prefix, True, key=lambda block: not self._refs[block])

    def allocate(self) -> int:
        """A block for one holder, without a key. Evicts the least recently used leaf if needed."""
        if self._free:
            block = self._free.pop()
        else:
            assert self._reusable, "allocate() needs num_available > 0"
            block, _ = self._reusable.popitem(last=False)
            self._forget(block)
        self._refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder for a block that has a key."""
        assert self._keys[block] is not None, "only blocks with a key are shared"
        if not self._refs[block]:
            del self._reusable[block]
        self._refs[block] += 1

    def release(self, blocks: Sequence[int], keep: bool = True) -> None:
        """One holder less for each of `blocks` (a sequence's, in order). Without `keep` the
        content is of no further use, even where it has a key (a private one: what others may
        match is always kept)."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0, "a block was released twice"
            if self._refs[block]:
                continue
            if not keep:
                self._forget(block)
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._reusable[block] = None

    def register(self, block: int, key: bytes, parent: bytes, public: bool) -> int:
        """`block`, held by the caller, now contains what `key` says; `parent` is the key before
        it, empty for the first block of a sequence.

        Returns the block that carries the key. If that is another one, then two sequences have
        computed the same; the caller's reference has moved to it and `block` is released.
        """
        existing = self._block_of.get(key)
        if existing is not None:
            assert existing != block, "a block is registered once"
            self.share(existing)
            self.release([block])
            return existing
        self._block_of[key] = block
        self._keys[block] = key
        self._parents[block] = parent
        self._public[block] = public
        if public:
            self._changes.append(("stored", key))
        return block

    def freed_by(self, holdings: Iterable[Sequence[int]], besides: Sequence[int]) -> Iterator[int]:
        """How many blocks become available, other than `besides`, if the first holder lets go, if
        the first two do, and so on."""
        kept = frozenset(besides)
        released: Counter[int] = Counter()
        num_freed = 0
        for blocks in holdings:
            released.update(blocks)
            num_freed += sum(released[b] == self._refs[b] and b not in kept for b in blocks)
            yield num_freed

    def clear_keys(self) -> None:
        """No block can be matched from now on; held blocks stay held."""
        self._free.extend(reversed(self._reusable))
        self._reusable.clear()
        self._block_of.clear()
        self._keys = [None] * self.num_blocks
        self._changes.append(("cleared", b""))

    def take_changes(self) -> list[KvChange]:
        """What happened to public keys since the last call, in order; runs of one kind merged."""
        merged: list[tuple[str, bytearray]] = []
        for op, key in self._changes:
            if not merged or merged[-1][0] != op:
                merged.append((op, bytearray()))
            merged[-1][1].extend(key)
        self._changes.clear()
        return [KvChange(op, bytes(keys)) for op, keys in merged]  # type: ignore[arg-type]

    def check(self, holdings: Iterable[Sequence[int]]) -> None:
        """Assert that every block is accounted for once, given what each sequence holds."""
        held = Counter(block for blocks in holdings for block in blocks)
        assert all(refs == held[b] for b, refs in enumerate(self._refs)), "reference counts"
        places = Counter([*self._free, *self._reusable, *held])
        assert places == Counter(range(self.num_blocks)), "a block is lost or in two places"
        assert all(self._keys[b] is None for b in self._free), "a free block has a key"
        keyed = {b: key for b, key in enumerate(self._keys) if key is not None}
        assert {key: b for b, key in keyed.items()} == self._block_of, "keys and blocks disagree"
        assert all(b in keyed for b in self._reusable), "a reusable block has no key"
        age = {b: i for i, b in enumerate(self._reusable)}
        for block in keyed:
            parent = self._block_of.get(self._parents[block])
            if parent is None:
                assert self._parents[block] == b"", "a chain has a hole"
            elif block in held:
                assert parent in held, "a held block has a parent that nobody holds"
            else:
                assert parent in held or age[parent] > age[block], "a parent would go first"

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is None:
            return
        del self._block_of[key]
        self._keys[block] = None
        if self._public[block]:
            self._changes.append(("removed", key))
