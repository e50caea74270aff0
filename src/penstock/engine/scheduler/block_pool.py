"""Physical KV blocks: who holds them, which can be reused by key, which one goes next.

A block is in exactly one of three places: *free* (no key), *reusable* (a key, nobody holds it; in
LRU order) or *held* (by one or more holders, with or without a key). Holders are sequences, and
the pins and imports of `imports.py`.

Invariant: if a key is cached, so is the key before it; a chain has no hole before its tail. It
holds because everybody holds whole prefixes of the blocks that carry the keys, names blocks in
order and releases the last block first, so that in the LRU a block is always older than the one
before it in its chain. Two things follow: a lookup can bisect, and eviction takes leaves.

*Windows* are the ids from `num_blocks` on: each stands for a page of another instance's pool. They
are held and matched like blocks, but nobody may write to them and nothing keeps them once their
last holder has let go. What stands behind a window in a chain goes with its last holder too (who
holds it holds the window), so it is never in the LRU and the chain has no hole.

*Storing*: a block that is being copied to a slower tier keeps its place and its order, but is not
evicted before the copy has ended. Should memory be so short that what stands before it is evicted
meanwhile, it loses its key, and is free when the copy has ended.

`generations[block]` moves on before a block's content may change, and `holders[block]` counts its
holders. Both arrays may be memory that other processes see; where nobody wants `holders` there are
none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.engine.scheduler.reusable import Reusable
from penstock.protocol.kv import KvChange, KvOp

Generations = npt.NDArray[np.uint64]
Holders = npt.NDArray[np.uint32]

#: From so many blocks on arrays are written to at once.
_MANY = 8


@lru_cache
def _descending(num_blocks: int) -> tuple[int, ...]:
    """All of them, the last one first: pools of one process share the numbers."""
    return tuple(range(num_blocks - 1, -1, -1))


class BlockPool:
    """`num_blocks` blocks, named 0 ... num_blocks - 1, never more; then `num_windows` windows."""

    def __init__(
        self,
        num_blocks: int,
        num_windows: int = 0,
        generations: Generations | None = None,
        holders: Holders | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_windows = num_windows
        self.generations = _zeros(num_blocks, np.uint64) if generations is None else generations
        self._holders = holders
        num_ids = num_blocks + num_windows
        self._refs = [0] * num_ids
        self._keys: list[bytes | None] = [None] * num_ids
        self._parents: list[bytes] = [b""] * num_ids
        self._public = bytearray(num_ids)
        # Windows that carry a key, and what stands behind them.
        self._fleeting = bytearray(num_ids)
        self._free_windows = list(range(num_ids - 1, num_blocks - 1, -1))
        self._let_go: list[int] = []  # windows without holders, not free before they are taken
        self._storing: dict[int, bytes] = {}  # with the key before each
        self._storing_behind: dict[bytes, dict[int, None]] = {}  # the same by that key
        self._block_of: dict[bytes, int] = {}
        # A stack, so that the block that was written last (and is in the CPU's caches) goes first.
        self._free = list(_descending(num_blocks))
        self._ids = _descending(num_blocks)  # one object for each number, wherever it is kept
        self._reusable = Reusable(num_blocks)
        self._changes: list[tuple[KvOp, list[bytes]]] = []  # runs of one kind

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones and, by eviction, reusable ones."""
        return len(self._free) + self._reusable.num_evictable

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_free_windows(self) -> int:
        return len(self._free_windows)

    @property
    def num_reusable(self) -> int:
        return len(self._reusable)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free) - len(self._reusable)

    @property
    def num_keys(self) -> int:
        return len(self._block_of)

    def keys(self) -> list[bytes]:
        """Every key that others may match, in the order in which the keys were stored. Not those
        of windows and of what stands behind them, which nobody can count on."""
        return [key for key, block in self._block_of.items() if self._is_told(block)]

    def has(self, key: bytes) -> bool:
        return key in self._block_of

    def block_of(self, key: bytes) -> int | None:
        return self._block_of.get(key)

    def key_of(self, block: int) -> bytes | None:
        return self._keys[block]

    def is_window(self, block: int) -> bool:
        return block >= self.num_blocks

    def is_kept(self, block: int) -> bool:
        """Does the cache keep it, if it has a key, once nobody holds it? Not windows, nor what
        stands behind one."""
        return block < self.num_blocks and not self._fleeting[block]

    def num_holders(self, block: int) -> int:
        return self._refs[block]

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `keys`. Takes no reference."""
        return [self._block_of[key] for key in keys[: self.num_cached(keys, len(keys))]]

    def num_cached(self, keys: Sequence[bytes], end: int) -> int:
        """How many of keys[:end] can be matched."""
        block_of = self._block_of
        return bisect_left(keys, True, hi=end, key=lambda key: key not in block_of)

    def num_reusable_in(self, prefix: Sequence[int]) -> int:
        """How many blocks of a matched prefix nobody holds (they are at its end)."""
        return len(prefix) - bisect_left(prefix, True, key=lambda block: not self._refs[block])

    def allocate(self) -> int:
        """A block for one holder, without a key. Evicts the least recently used leaf if needed."""
        if self._free:
            block = self._free.pop()
        else:
            assert self.num_available, "allocate() needs num_available > 0"
            block = self._evict()
        self.generations[block] += 1
        self._refs[block] = 1
        if self._holders is not None:
            self._holders[block] = 1
        return block

    def allocate_many(self, count: int) -> list[int]:
        """So many times `allocate`, in that order."""
        num_evicted = max(0, count - len(self._free))
        if count < _MANY or (num_evicted and self._storing):
            return [self.allocate() for _ in range(count)]
        assert num_evicted <= self._reusable.num_evictable, "allocate() needs num_available > 0"
        blocks = self._free[: num_evicted - count - 1 : -1]
        del self._free[num_evicted - count :]
        if num_evicted:
            blocks += self._evict_many(num_evicted)
        self.generations[blocks] += 1
        refs = self._refs
        for block in blocks:
            refs[block] = 1
        if self._holders is not None:
            self._holders[blocks] = 1
        return blocks

    def take_window(self) -> int:
        """A window for one holder, without a key. There must be a free one."""
        window = self._free_windows.pop()
        self._refs[window] = 1
        return window

    def take_released_windows(self) -> list[int]:
        """Windows that have lost their last holder since the last call. The caller gives them back
        to who owns the pages, and then here (`free_windows`)."""
        released, self._let_go = self._let_go, []
        return released

    def free_windows(self, windows: Iterable[int]) -> None:
        self._free_windows.extend(windows)

    def share(self, block: int) -> None:
        """One more holder for a block that has a key."""
        assert self._keys[block] is not None, "only blocks with a key are shared"
        if not self._refs[block]:
            self._reusable.remove(block)
        self._refs[block] += 1
        if self._holders is not None and block < self.num_blocks:
            self._holders[block] += 1

    def release(self, blocks: Sequence[int], keep: bool = True) -> None:
        """One holder less for each of `blocks` (a sequence's, in order). Without `keep` the
        content is of no further use, even where it has a key (a private one: what others may
        match is always kept)."""
        if self._holders is not None:
            ours = [block for block in blocks if block < self.num_blocks]
            self._holders[ours] = [self._refs[block] - 1 for block in ours]
        refs, keys, fleeting, storing = self._refs, self._keys, self._fleeting, self._storing
        plain: list[int] = []  # next to all of them: the cache takes them as they are
        for block in reversed(blocks):
            left = refs[block] = refs[block] - 1
            if left:
                assert left > 0, "a block was released twice"
            elif keep and keys[block] is not None and not fleeting[block] and block not in storing:
                plain.append(block)
            else:
                self._reusable.extend(plain)
                plain.clear()
                self._let_go_of(block, keep)
        self._reusable.extend(plain)

    def _let_go_of(self, block: int, keep: bool) -> None:
        """It has lost its last holder."""
        if not keep or self._fleeting[block]:
            self._forget(block)
        if block >= self.num_blocks:
            self._let_go.append(block)
        elif self._keys[block] is not None:
            self._reusable.add(block, detained=block in self._storing)
        elif block not in self._storing:
            self._free.append(block)

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
        self._fleeting[block] = block >= self.num_blocks or (
            parent != b"" and self._fleeting[self._block_of[parent]]
        )
        if self._is_told(block):
            self._tell("stored", (key,))
        return block

    def register_many(
        self, blocks: Sequence[int], keys: Sequence[bytes], parent: bytes, public: bool
    ) -> list[int]:
        """`register` for each, one behind the other; the first one's parent is `parent`."""
        block_of = self._block_of
        fleeting = parent != b"" and self._fleeting[block_of[parent]]
        if (
            fleeting
            or not block_of.keys().isdisjoint(keys)
            or (self.num_windows and max(blocks) >= self.num_blocks)
        ):
            parents = (parent, *keys)
            return [self.register(b, k, p, public) for b, k, p in zip(blocks, keys, parents)]
        block_of.update(zip(keys, blocks))
        own_keys, parents_of, is_public = self._keys, self._parents, self._public
        for block, key in zip(blocks, keys):
            own_keys[block] = key
            parents_of[block] = parent
            is_public[block] = public
            parent = key
        if public:
            self._tell("stored", keys)
        return list(blocks)

    def forget_windows(self, windows: Iterable[int]) -> list[int]:
        """The pages behind these windows are not theirs any more: they, and what stands behind
        them, cannot be matched from now on. Returns the blocks that have lost their keys; whoever
        holds them goes on holding them."""
        lost = [w for w in windows if self._keys[w] is not None]
        gone = {self._keys[w] for w in lost}
        for key, block in list(self._block_of.items()):  # in the order of naming: parents first
            if key in gone or self._parents[block] in gone:
                gone.add(key)
                if block not in lost:
                    lost.append(block)
        for block in lost:
            self._forget(block)
        return lost

    # ---- copies to slower tiers ---------------------------------------------------------------

    def oldest(self, num_blocks: int) -> list[int]:
        """The blocks that others may match and that will be evicted next, first ones first; not
        those that are being stored."""
        found: list[int] = []
        for block in self._reusable.evictable():
            if len(found) == num_blocks:
                break
            if self._public[block]:
                found.append(block)
        return found

    def begin_store(self, blocks: Iterable[int]) -> None:
        """The content of these blocks, which have keys, must stay as it is until `end_store`."""
        for block in blocks:
            assert self._keys[block] is not None and block not in self._storing
            parent = self._storing[block] = self._parents[block]
            self._storing_behind.setdefault(parent, {})[block] = None
            if block in self._reusable:
                self._reusable.detain(block)

    def end_store(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        for block in blocks:
            parent = self._storing.pop(block)
            behind = self._storing_behind[parent]
            del behind[block]
            if not behind:
                del self._storing_behind[parent]
            if not self._refs[block] and self._keys[block] is None:
                self._free.append(block)
        self._reusable.let_go(blocks)

    def freed_by(self, holdings: Iterable[Sequence[int]], besides: Sequence[int]) -> Iterator[int]:
        """How many blocks become available, other than `besides`, if the first holder lets go, if
        the first two do, and so on. What is being stored does not before its copy has ended."""
        kept = frozenset(besides) | self._storing.keys()
        released: Counter[int] = Counter()
        num_freed = 0
        for blocks in holdings:
            released.update(blocks)
            num_freed += sum(
                released[b] == self._refs[b] and b not in kept and b < self.num_blocks
                for b in blocks
            )
            yield num_freed

    def clear_keys(self) -> None:
        """No block can be matched from now on; held blocks stay held."""
        self._free.extend(reversed(self._reusable.clear()))
        self._block_of.clear()
        self._keys = [None] * len(self._keys)
        self._fleeting = bytearray(len(self._keys))
        self._tell("cleared", (b"",))

    def take_changes(self) -> list[KvChange]:
        """What happened to public keys since the last call, in order; runs of one kind merged."""
        if not self._changes:
            return []
        changes, self._changes = self._changes, []
        return [KvChange(op, b"".join(keys)) for op, keys in changes]

    def check(self, holdings: Iterable[Sequence[int]], let_go: Sequence[int] = ()) -> None:
        """Assert that every block is accounted for once, given what each holder holds, and which
        windows (`let_go`) have been taken but not freed."""
        held = Counter(block for blocks in holdings for block in blocks)
        assert all(refs == held[b] for b, refs in enumerate(self._refs)), "reference counts"
        if self._holders is not None:
            told = self._holders.tolist()
            assert told == self._refs[: self.num_blocks], "counts that others see"
        limbo = [b for b in self._storing if not self._refs[b] and self._keys[b] is None]
        stored = [(b, key) for key, blocks in self._storing_behind.items() for b in blocks]
        assert sorted(stored) == sorted(self._storing.items()), "who is being stored behind whom"
        reusable = self._reusable.in_order()
        detained = Counter(reusable) - Counter(self._reusable.evictable())
        assert all(b in self._storing for b in detained), "detained for nothing"
        assert len(detained) == sum(b in self._reusable for b in self._storing), "not detained"
        windows = [*self._free_windows, *self._let_go, *let_go]
        places = Counter([*self._free, *reusable, *limbo, *windows, *held])
        assert places == Counter(range(len(self._refs))), "a block is lost or in two places"
        assert all(w >= self.num_blocks for w in windows), "a block among the windows"
        assert all(self._keys[b] is None for b in [*self._free, *windows]), "a free block has a key"
        keyed = {b: key for b, key in enumerate(self._keys) if key is not None}
        assert {key: b for b, key in keyed.items()} == self._block_of, "keys and blocks disagree"
        assert all(b in keyed for b in reusable), "a reusable block has no key"
        age = {b: i for i, b in enumerate(reusable)}
        for block in keyed:
            parent = self._block_of.get(self._parents[block])
            behind = parent is not None and self._fleeting[parent]
            assert self._fleeting[block] == (behind or block >= self.num_blocks), "fleeting"
            assert not (self._fleeting[block] and block in age), "kept behind a window"
            if parent is None:
                assert self._parents[block] == b"", "a chain has a hole"
            elif block in held:
                assert parent in held, "a held block has a parent that nobody holds"
            else:
                assert parent in held or age[parent] > age[block], "a parent would go first"

    def _is_told(self, block: int) -> bool:
        """Do others hear of it?"""
        return bool(self._public[block]) and not self._fleeting[block]

    def _evict(self) -> int:
        """Forget the oldest reusable block. What is being stored behind it goes with it: everything
        else behind it was older, and is gone."""
        evicted = self._ids[~self._reusable.take_oldest()]
        gone = [evicted]
        for block in gone:  # it grows
            key = self._keys[block]
            assert key is not None, "a reusable block has no key"
            for orphan in self._storing_behind.get(key, ()):
                if orphan in self._reusable:
                    self._reusable.remove(orphan)
                    gone.append(orphan)
            self._forget(block)
        return evicted

    def _evict_many(self, count: int) -> list[int]:
        """So many times `_evict`, while nothing is being stored."""
        ids, keys, block_of, public = self._ids, self._keys, self._block_of, self._public
        blocks = [ids[~block] for block in self._reusable.take_oldest_ones(count)]
        told: list[bytes] = []
        for block in blocks:
            key = keys[block]
            assert key is not None, "a reusable block has no key"
            del block_of[key]
            keys[block] = None
            if public[block]:
                told.append(key)
        if told:
            self._tell("removed", told)
        return blocks

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is None:
            return
        del self._block_of[key]
        self._keys[block] = None
        told = self._is_told(block)
        self._fleeting[block] = False
        if told:
            self._tell("removed", (key,))

    def _tell(self, op: KvOp, keys: Sequence[bytes]) -> None:
        if self._changes and self._changes[-1][0] == op:
            self._changes[-1][1].extend(keys)
        else:
            self._changes.append((op, list(keys)))


def _zeros(num_blocks: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.zeros(num_blocks, dtype)
