"""Blocks that are held by no sequence: pinned for a peer, or on their way here.

A `Hold` is a holder like a sequence: of leading blocks of a chain, so that a chain never gets a
hole. An `Import` is a hold that grows at its end. It begins with the blocks that are here already,
and *claims* the keys it is to bring, as a running sequence claims what it will store; whoever needs
one of them waits for it (`Claims`). Room is taken when a peer (or a tier) has the blocks ready and
a job is about to fill them, not before: nothing is held that nobody fills. What has come whole is
named, in order, up to the first that has not; then it is in the prefix cache.

Nobody waits for ever:

* Whoever waits for a claim waits for an import, and an import ends: `exchange.py` gives it up when
  it makes no progress, which settles its claims at once, even while a job still runs.
* A job's blocks cannot be taken away while it runs, but jobs end by themselves.
* What an import takes must fit beside what running sequences still need (`room`), and imports and
  pins stop at a share of the pool (`Holds`). Holds that may be given up (`soft`) are, youngest
  first, as soon as a running sequence is short, and when nothing runs and the first in the queue
  does not fit.
* Pins for peers cannot be given up; they end with their lease. While somebody is `starved` because
  of them no new ones are made and leases are not renewed.

`promise` sets room aside for a sequence that is announced but not here yet: newcomers leave it
alone while anything runs. It holds nothing, so it stands in nobody's way either.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.sequence import Key
from penstock.engine.scheduler.step import Claims


@dataclass(slots=True, eq=False)
class Hold:
    """Leading blocks of the chain `keys`, one more holder each. `soft`: given up if need be."""

    number: int
    keys: list[bytes]
    blocks: list[int]
    soft: bool = False
    released: bool = False
    trusted: bool = True  # false after a cache reset, or when a part of the chain has gone
    #: So many leading blocks may be windows: they are held, and not offered to anybody.
    foreign: int = 0
    #: Of a pin: it is over as soon as its blocks have been copied.
    brief: bool = False


@dataclass(slots=True, eq=False)
class Import(Hold):
    """keys[:first] were here when it began. blocks[:num_named] carry their keys; the rest are
    being filled, or have been filled behind one that has failed."""

    first: int = 0
    num_named: int = 0
    #: What has become of blocks that are not named yet, by index.
    came: dict[int, bool] = field(default_factory=dict)
    claiming: bool = True
    num_running: int = 0  # blocks that jobs are filling


_H = TypeVar("_H", bound=Hold)


class Holds:
    """All holds of one pool.

    Blocks that peers have mapped stay pinned as long as their sequences run. That is work which the
    cluster wants, but it must leave room here for the prompts that are still to be computed: once
    all holds together have `max_share` of the pool there is nothing for further imports and
    lasting pins. Who would map is then better served with a copy (`Offers`): it is over in
    milliseconds, lives in the peer's memory from then on, and its pins may go on to
    `max_brief_share`.
    """

    def __init__(
        self,
        pool: BlockPool,
        claims: Claims,
        max_share: float = 0.5,
        max_brief_share: float = 0.75,
    ) -> None:
        self._pool = pool
        self._claims = claims
        self._max_blocks = int(max_share * pool.num_blocks)
        self._max_brief_blocks = int(max_brief_share * pool.num_blocks)
        self._holds: dict[int, Hold] = {}
        #: How many holds each block is in; not of windows, which are other people's memory.
        self._num_holds: dict[int, int] = {}
        #: And in how many soft ones, of which there are few.
        self._num_soft: Counter[int] = Counter()
        self._promises: dict[Key, int] = {}
        self._number = 0
        #: Somebody cannot be let in although nothing runs: holds of peers are in the way.
        self.starved = False

    # ---- pins -----------------------------------------------------------------------------

    def hold(self, keys: Sequence[bytes], soft: bool) -> Hold:
        """One more holder for the cached leading blocks of `keys`, windows included."""
        hold = self._new(Hold, list(keys), soft)
        for block in self._pool.match(hold.keys):
            self._share(hold, block)
        return hold

    def pin(self, keys: Sequence[bytes], first: int = 0, brief: bool = False) -> Hold:
        """The same for what is to be offered to a peer (`pin_more`): blocks of our own alone, from
        `first` on, which is what the peer lacks. `brief`: it ends when they have been copied."""
        hold = self._new(Hold, list(keys), soft=False)
        hold.foreign = first
        hold.brief = brief
        self.pin_more(hold)
        return hold

    def pin_more(self, hold: Hold) -> int:
        """Hold what has been cached of its chain since; returns how many blocks."""
        before = len(hold.blocks)
        limit = self._max_brief_blocks if hold.brief else self._max_blocks
        while hold.trusted and (block := self._next_of(hold)) is not None:
            if self._pool.is_window(block):
                if len(hold.blocks) >= hold.foreign:
                    break
            elif block not in self._num_holds and self.num_held >= limit:
                break
            self._share(hold, block)
        return len(hold.blocks) - before

    def is_stuck(self, hold: Hold) -> bool:
        """After `pin_more`: is the next block here, and yet not to be had?"""
        return self._next_of(hold) is not None

    def has_room_for_pin(self, keys: Sequence[bytes], besides: int) -> bool:
        """Could all of `keys`, here already or still to come, be pinned for long, and so many
        blocks `besides`?"""
        pinned = sum(
            block in self._num_holds or self._pool.is_window(block)
            for block in self._pool.match(keys)
        )
        return self.num_held + len(keys) - pinned + besides <= self._max_blocks

    def release(self, hold: Hold) -> None:
        """One holder less for each; what has a key stays in the cache. Once is enough."""
        if hold.released:
            return
        hold.released = True
        del self._holds[hold.number]
        self._discount(hold.blocks)
        if hold.soft:
            for block in hold.blocks:
                self._num_soft[block] -= 1
                if not self._num_soft[block]:
                    del self._num_soft[block]
        self._pool.release(hold.blocks)
        hold.blocks = []

    # ---- imports --------------------------------------------------------------------------

    def begin_import(self, keys: Sequence[bytes]) -> Import | None:
        """Hold what is here of `keys` and claim the rest, up to the first that somebody else has
        claimed. None if that leaves nothing."""
        hits = self._pool.match(keys)
        end = len(hits)
        while end < len(keys) and self._claims.owner(keys[end]) is None:
            end += 1
        if end == len(hits):
            return None
        imp = self._new(Import, list(keys[:end]), soft=False)
        for block in hits:
            self._share(imp, block)
        imp.first = imp.num_named = len(hits)
        self._claims.claim(imp, imp.keys[imp.first :])
        return imp

    def take_room(self, imp: Import, num_blocks: int, windows: bool, room: int) -> list[int]:
        """Blocks (or windows) for the next keys of the import, to be filled by a job: as many as
        there are. `room`: how many blocks running sequences can spare."""
        assert not imp.released
        if windows:
            num_blocks = min(num_blocks, self._pool.num_free_windows)
            taken = [self._pool.take_window() for _ in range(num_blocks)]
        else:
            num_blocks = min(num_blocks, room, self._max_blocks - self.num_held)
            taken = [self._pool.allocate() for _ in range(num_blocks)]
        imp.blocks += taken
        self._count(taken)
        imp.num_running += len(taken)
        return taken

    def filled(self, imp: Import, start: int, ok: Sequence[bool]) -> int:
        """A job on blocks [start, start + len(ok)) has ended. Names what stands whole behind what
        has been named; returns how many blocks."""
        imp.num_running -= len(ok)
        imp.came.update(enumerate(ok, start))
        before = imp.num_named
        while imp.claiming and imp.came.get(imp.num_named):
            index = imp.num_named
            key, parent = imp.keys[index], imp.keys[index - 1] if index else b""
            if not imp.trusted:
                break
            block = self._pool.register(imp.blocks[index], key, parent, public=True)
            if block != imp.blocks[index]:  # somebody else has stored it meanwhile
                self._discount([imp.blocks[index]])
                self._count([block])
                imp.blocks[index] = block
            imp.num_named += 1
            self._claims.settle(imp, [key])
        return imp.num_named - before

    def give_up(self, imp: Import) -> None:
        """Nothing more is named, and nobody waits for it any longer. Its blocks stay held until
        its jobs have ended and `release` is called."""
        if imp.claiming:
            imp.claiming = False
            self._claims.settle(imp, imp.keys[imp.first :])

    # ---- room -----------------------------------------------------------------------------

    @property
    def num_held(self) -> int:
        """Blocks in holds, without windows; one that is in several counts once."""
        return len(self._num_holds)

    def make_room(self) -> bool:
        """Give up the youngest soft hold that has a block which soft holds alone have: it is freed
        with the last of them. False if there is none."""
        if not self._num_soft:
            return False
        for hold in reversed(self._holds.values()):
            # What a chain shares with others is its beginning.
            if hold.soft and any(map(self._is_softly_held, reversed(hold.blocks))):
                self.release(hold)
                return True
        return False

    def _is_softly_held(self, block: int) -> bool:
        """And by nobody else."""
        num_soft = self._num_soft[block]
        return not self._pool.is_window(block) and self._pool.num_holders(block) == num_soft

    def promise(self, key: Key, num_blocks: int) -> bool:
        """Set room aside for the sequence `key`, unless too much is set aside already."""
        if num_blocks + self.promised(key) > self._max_blocks:
            return False
        self._promises[key] = num_blocks
        return True

    def withdraw(self, key: Key) -> None:
        self._promises.pop(key, None)

    def promised(self, besides: Key) -> int:
        return sum(n for key, n in self._promises.items() if key != besides)

    # ---- the whole cache ------------------------------------------------------------------

    def distrust(self) -> None:
        """The cache is reset: what is on its way belongs to the past."""
        for hold in self._holds.values():
            hold.trusted = False

    def distrust_holders(self, blocks: Sequence[int]) -> None:
        """These blocks have lost their keys: who holds one names nothing behind it."""
        lost = frozenset(blocks)
        for hold in self._holds.values():
            hold.trusted = hold.trusted and lost.isdisjoint(hold.blocks)

    def holdings(self) -> list[list[int]]:
        return [hold.blocks for hold in self._holds.values()]

    def __len__(self) -> int:
        return len(self._holds)

    def check(self) -> None:
        held = Counter(b for h in self._holds.values() for b in h.blocks)
        blocks = {b: n for b, n in held.items() if not self._pool.is_window(b)}
        assert blocks == self._num_holds, "how many holds a block is in"
        soft = Counter(b for h in self._holds.values() if h.soft for b in h.blocks)
        assert soft == self._num_soft, "and how many soft ones"
        for hold in self._holds.values():
            assert not hold.released and len(hold.blocks) <= len(hold.keys)
            if isinstance(hold, Import):
                assert hold.first <= hold.num_named <= len(hold.blocks)
                assert hold.num_running + len(hold.came) == len(hold.blocks) - hold.first

    def _new(self, kind: type[_H], keys: list[bytes], soft: bool) -> _H:
        self._number += 1
        hold = kind(self._number, keys, [], soft)
        self._holds[hold.number] = hold
        return hold

    def _next_of(self, hold: Hold) -> int | None:
        """The cached block behind those it has."""
        index = len(hold.blocks)
        return self._pool.block_of(hold.keys[index]) if index < len(hold.keys) else None

    def _share(self, hold: Hold, block: int) -> None:
        self._pool.share(block)
        hold.blocks.append(block)
        if hold.soft:
            self._num_soft[block] += 1
        self._count((block,))

    def _count(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if not self._pool.is_window(block):
                self._num_holds[block] = self._num_holds.get(block, 0) + 1

    def _discount(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if not self._pool.is_window(block):
                self._num_holds[block] -= 1
                if not self._num_holds[block]:
                    del self._num_holds[block]


class WindowReturns:
    """Windows that nobody holds any more go back once no step in flight reads them."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._waiting: deque[tuple[int, int]] = deque()  # (fence, window)

    def take(self, fence: int, passed: Callable[[int], bool]) -> list[int]:
        """Those that may go now; their ids may stand for other pages from now on."""
        self._waiting.extend((fence, w) for w in self._pool.take_released_windows())
        windows = []
        while self._waiting and passed(self._waiting[0][0]):
            windows.append(self._waiting.popleft()[1])
        self._pool.free_windows(windows)
        return windows

    def waiting(self) -> list[int]:
        return [window for _, window in self._waiting]
