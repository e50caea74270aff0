"""What is in which tier: the books of the slower tiers. No I/O, no clock, deterministic.

Tiers stand in one order, device > host > disk, and a key that is in several counts for the fastest:
there it is *own*, and every slower copy is *spare*. A spare copy costs nothing to give up, so it is
the first to go; while it stays, a key that leaves the faster tier need not be written again.

Each tier evicts its least recently used own key, into the next tier if there is one. As a key
leaves the device it becomes the youngest own key of the tier below, and so on down. So the own keys
of all tiers, one tier after the other, are one LRU list whose length is the sum of the capacities
(`tests/unit/test_tier_index_trace.py` holds the production structures to that).

**Chains.** The device evicts leaves first (`BlockPool`), so in that one list a child always stands
behind its parent: a chain loses its end, never its middle, and a prefix is found as device blocks,
then host blocks, then disk blocks. Failures may break that (a store that failed, a spoilt block, a
victim passed over because it was just being loaded); then what stands behind the hole is not found
by `match`, which goes from the front, and ages away.

**Ahead.** A block must be copied out before the device needs its room. What is stored while the
device still has it is *ahead*: spare, but not given up for others, since it is needed soon. Its
room is taken from spare and own keys, so the list above is shorter by as many blocks as are ahead.

**Plans under way** run on several threads and end in any order, so none may count on what another
has yet to do: a key that one carries out (*leaving*) is not stored there by another before it has
ended, and bytes that are of no use (*dead*) hold their room until a plan drops them to use it.

The shared store ("store") is not in the books, since others fill and empty it: `match` offers it
for what no tier here has, and the data plane finds out. What it did not have is not asked for again
until it has been here.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from penstock.engine.transfer.jobs import Demotion
from penstock.protocol.kv import KvChange, KvOp, Tier, split_keys

#: A tier that fails so often without a success in between is given up.
MAX_FAILURES_IN_A_ROW = 8
#: Keys that the shared store is known to have, and known not to have.
_REMEMBERED = 1 << 16


@dataclass(frozen=True, slots=True)
class TierSizes:
    """Capacities in blocks; 0: there is no such tier. `store`: is there a shared store?"""

    host_blocks: int = 0
    disk_blocks: int = 0
    store: bool = False


@dataclass(frozen=True, slots=True)
class StorePlan:
    """Store device blocks under `keys` in `tier`, after carrying out `before`, in order.

    The room is reserved from now until `TierIndex.end_store`, which must come.
    """

    tier: Tier
    keys: tuple[bytes, ...]
    before: tuple[Demotion, ...] = ()
    generation: int = 0


@dataclass(slots=True)
class TierStats:
    """Of one tier since the start, in blocks."""

    capacity: int
    used: int = 0
    loaded: int = 0
    not_loaded: int = 0
    stored: int = 0
    not_stored: int = 0
    #: Into the next slower tier, and lost for want of room.
    demoted: int = 0
    evicted: int = 0


@dataclass(slots=True)
class _Shelf:
    """One tier. Each key is in one of the first five at most; the first of each goes next."""

    tier: Tier
    stats: TierStats
    own: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    spare: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    ahead: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    #: Room taken for what is being written; not there yet.
    arriving: dict[bytes, None] = field(default_factory=dict)
    #: Their bytes may be there, but are not to be found; they go before all others.
    dead: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    #: What plans under way carry out. True: on its way down, and followers see it here till then.
    leaving: dict[bytes, bool] = field(default_factory=dict)
    #: How many loads are under way of a key.
    pins: Counter[bytes] = field(default_factory=Counter)
    failures_in_a_row: int = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self.own or key in self.spare or key in self.ahead

    @property
    def num_used(self) -> int:
        return sum(map(len, (self.own, self.spare, self.ahead, self.arriving, self.dead)))

    def held(self) -> Iterator[bytes]:
        for place in (self.own, self.spare, self.ahead):
            yield from place

    def remove(self, key: bytes) -> bool:
        """Was it there?"""
        for place in (self.own, self.spare, self.ahead):
            if key in place:
                del place[key]
                return True
        return False

    def bury(self, key: bytes) -> None:
        """It is not to be found any more, but its bytes may be there."""
        if self.stats.capacity:
            self.dead[key] = None

    def may_take(self, key: bytes) -> bool:
        """Does no job under way read, write or drop the bytes of `key`, which is not there?"""
        return not (key in self.arriving or key in self.leaving or key in self.pins)

    def first_unpinned(self, place: OrderedDict[bytes, None]) -> bytes | None:
        return next((key for key in place if key not in self.pins), None)

    def unpin(self, key: bytes) -> None:
        self.pins[key] -= 1
        assert self.pins[key] >= 0, "a load ended twice"
        if not self.pins[key]:
            del self.pins[key]


class TierIndex:
    """The slower tiers of one instance.

    Whoever owns the device's blocks tells what enters and leaves the device (`follow`), what is
    used there (`touch`), asks where the rest of a prefix is (`match`), brackets each load
    (`begin_load`, `end_load`) and each store (`plan_store`, `end_store`).
    """

    def __init__(
        self, sizes: TierSizes, recovered: Mapping[Tier, Sequence[bytes]] | None = None
    ) -> None:
        """`recovered`: what tiers hold from an earlier life, oldest first."""
        capacities: dict[Tier, int] = {"host": sizes.host_blocks, "disk": sizes.disk_blocks}
        self._shelves = [_Shelf(t, TierStats(n)) for t, n in capacities.items() if n]
        self._by_tier = {shelf.tier: shelf for shelf in self._shelves}
        self._store = TierStats(0) if sizes.store else None
        #: Is there anything to load from or store to? If not, every method does nothing.
        self.enabled = bool(self._shelves) or self._store is not None
        #: Keys the device has; only asked, never iterated.
        self._device: set[bytes] = set()
        self._in_store: OrderedDict[bytes, None] = OrderedDict()
        self._not_in_store: OrderedDict[bytes, None] = OrderedDict()
        self._generation = 0
        self._changes: list[tuple[KvOp, bytes, Tier]] = []
        for tier, keys in (recovered or {}).items():
            shelf = self._by_tier[tier]
            shelf.own.update(dict.fromkeys(keys[-shelf.stats.capacity :]))

    # ---- finding and loading --------------------------------------------------------------

    def match(self, keys: Sequence[bytes]) -> list[Tier]:
        """Where the leading ones of `keys` (those behind what the device has) can be had: the tier
        of keys[0], of keys[1], and so on to the first that is nowhere."""
        found: list[Tier] = []
        for key in keys:
            shelf = next((shelf for shelf in self._shelves if key in shelf), None)
            if shelf is not None:
                found.append(shelf.tier)
            elif self._store is not None and key not in self._not_in_store:
                found.append("store")
            else:
                break
        return found

    def begin_load(self, tier: Tier, keys: Sequence[bytes]) -> None:
        """A `Load` of what `match` has found: it stays where it is until `end_load`."""
        if tier != "store":
            self._by_tier[tier].pins.update(keys)

    def end_load(self, tier: Tier, keys: Sequence[bytes], ok: Sequence[bool]) -> None:
        """What a `Load` has come to. What could not be loaded counts as lost, whether or not the
        job has run. That the others are on the device now is for `follow` to say."""
        if tier == "store":
            self._end_store_load(keys, ok)
            return
        shelf = self._by_tier[tier]
        for key, loaded in zip(keys, ok, strict=True):
            shelf.unpin(key)
            if loaded:
                shelf.stats.loaded += 1
                self._succeeded(shelf)
                continue
            shelf.stats.not_loaded += 1
            if shelf.remove(key):
                shelf.bury(key)
                self._changed("removed", key, tier)
                self._settle(key)
            self._failed(shelf)

    def _end_store_load(self, keys: Sequence[bytes], ok: Sequence[bool]) -> None:
        assert self._store is not None
        for key, loaded in zip(keys, ok, strict=True):
            self._store.loaded += loaded
            self._store.not_loaded += not loaded
            self._in_store.pop(key, None)
            _remember(self._in_store if loaded else self._not_in_store, key)

    # ---- storing --------------------------------------------------------------------------

    def plan_store(self, keys: Sequence[bytes]) -> list[StorePlan]:
        """Which of these device blocks should be copied out, and what must go for it, given in the
        order in which the device will evict them (or has evicted them, with their bytes still
        there). Fewer than asked for where there is no room. One plan a tier, each a `Store`."""
        plans = [self._plan_for(shelf, keys) for shelf in self._usable()[:1]]
        if self._store is not None:
            new = [k for k in dict.fromkeys(keys) if k not in self._in_store]
            for key in new:  # if it fails, that is forgotten again
                _remember(self._in_store, key)
            plans.append(StorePlan("store", tuple(new)))
        return [plan for plan in plans if plan.keys]

    def _plan_for(self, shelf: _Shelf, keys: Sequence[bytes]) -> StorePlan:
        chosen: list[bytes] = []
        before: list[Demotion] = []
        for key in keys:
            if key in shelf:
                if key in self._device and key in shelf.spare:
                    del shelf.spare[key]
                    shelf.ahead[key] = None
                continue
            if not shelf.may_take(key):
                continue
            shelf.arriving[key] = None
            self._settle(key)  # a copy below is spare from now on, and its room may be had
            room = self._make_room(shelf, key)
            if room is None:
                del shelf.arriving[key]
                self._settle(key)
                break
            before += room
            chosen.append(key)
        for step in before:
            leaving = self._by_tier[step.tier].leaving
            assert step.key not in leaving, "two plans carry out one key"
            leaving[step.key] = step.to is not None
        return StorePlan(shelf.tier, tuple(chosen), tuple(before), self._generation)

    def _make_room(self, shelf: _Shelf, key: bytes) -> list[Demotion] | None:
        """What to carry out for `key`, which has just been promised room; None: nothing may go."""
        if key not in shelf.dead and shelf.num_used <= shelf.stats.capacity:
            return []
        victim = key if key in shelf.dead else shelf.first_unpinned(shelf.dead)
        if victim is not None:
            del shelf.dead[victim]
            return [Demotion(victim, shelf.tier, None)]
        victim = shelf.first_unpinned(shelf.spare)
        if victim is not None:
            del shelf.spare[victim]
            self._changed("removed", victim, shelf.tier)
            return [Demotion(victim, shelf.tier, None)]
        victim = shelf.first_unpinned(shelf.own)
        if victim is None:
            return None
        del shelf.own[victim]
        return self._demote(shelf, victim)

    def _demote(self, shelf: _Shelf, victim: bytes) -> list[Demotion]:
        """`victim` has left the books of `shelf`: where it goes."""
        usable = self._usable()
        below = next(iter(usable[usable.index(shelf) + 1 :]), None)
        if below is not None and victim not in below and below.may_take(victim):
            below.arriving[victim] = None
            room = self._make_room(below, victim)
            if room is not None:
                return [*room, Demotion(victim, shelf.tier, below.tier)]
            del below.arriving[victim]
        self._changed("removed", victim, shelf.tier)
        self._settle(victim)
        if below is None or victim not in below:
            shelf.stats.evicted += 1
        return [Demotion(victim, shelf.tier, None)]

    def end_store(self, plan: StorePlan, ok: Sequence[bool], demoted: Sequence[bool] = ()) -> None:
        """What a plan has come to: `ok` for its keys, `demoted` for each of `plan.before`; missing
        ones count as failed (an empty `demoted` where the job never ran)."""
        if plan.tier == "store":
            self._end_store_store(plan, ok)
            return
        done: list[bool | None] = [*demoted, *[None] * (len(plan.before) - len(demoted))]
        for step, went_well in zip(plan.before, done, strict=True):
            self._carried_out(step, went_well, plan)
        shelf = self._by_tier[plan.tier]
        for key, went_well in zip(plan.keys, ok, strict=True):
            del shelf.arriving[key]
            shelf.stats.stored += went_well
            shelf.stats.not_stored += not went_well
            if went_well:
                self._put(shelf, key, plan, "stored")
                self._succeeded(shelf)
            else:
                self._settle(key)
                self._failed(shelf)

    def _carried_out(self, step: Demotion, went_well: bool | None, plan: StorePlan) -> None:
        """A key has gone, down or for good, or been lost on the way. None: nothing was done."""
        above = self._by_tier[step.tier]
        is_seen_above = above.leaving.pop(step.key)
        if went_well is None:
            above.bury(step.key)
        if step.to is None:
            return
        below = self._by_tier[step.to]
        del below.arriving[step.key]
        if went_well and self._put(below, step.key, plan, "moved" if is_seen_above else "stored"):
            above.stats.demoted += 1
        else:
            above.stats.evicted += 1
            if is_seen_above:
                self._changed("removed", step.key, step.tier)
        (self._succeeded if went_well else self._failed)(below)

    def _put(self, shelf: _Shelf, key: bytes, plan: StorePlan, op: KvOp) -> bool:
        """The bytes of `key` have been written: may it be found from now on?"""
        if plan.generation != self._generation or not shelf.stats.capacity:
            shelf.bury(key)
            self._settle(key)  # slower copies were spare for its sake
            return False
        shelf.dead.pop(key, None)
        self._changed(op, key, shelf.tier)
        is_ahead = key in self._device and shelf.tier == plan.tier
        (shelf.ahead if is_ahead else shelf.spare)[key] = None
        self._settle(key)
        return True

    def _end_store_store(self, plan: StorePlan, ok: Sequence[bool]) -> None:
        assert self._store is not None
        for key, went_well in zip(plan.keys, ok, strict=True):
            self._store.stored += went_well
            self._store.not_stored += not went_well
            if went_well:
                self._not_in_store.pop(key, None)
            else:
                self._in_store.pop(key, None)

    # ---- the device -----------------------------------------------------------------------

    def follow(self, changes: Sequence[KvChange]) -> None:
        """What `BlockPool.take_changes` says of the device."""
        if not self.enabled:
            return
        for change in changes:
            if change.op == "cleared":
                self.clear()
            elif change.op == "stored":
                for key in split_keys(change.keys):
                    self._entered_device(key)
            else:
                for key in split_keys(change.keys):
                    self._device.discard(key)
                    self._settle(key)

    def _entered_device(self, key: bytes) -> None:
        self._device.add(key)
        self._not_in_store.pop(key, None)
        self._settle(key)

    def touch(self, keys: Sequence[bytes]) -> None:
        """A sequence has used these (leading keys of a prefix): the device will not evict them
        soon, and those in a tier are young again."""
        for shelf in self._shelves:
            for key in reversed(keys):
                if key in shelf.ahead:
                    del shelf.ahead[key]
                    shelf.spare[key] = None
                elif key in shelf.own:
                    shelf.own.move_to_end(key)

    def _settle(self, key: bytes) -> None:
        """Own in the fastest place that has it or is about to, spare in every slower one."""
        has_faster = key in self._device
        for shelf in self._shelves:
            if key in shelf:
                if has_faster and key in shelf.own:
                    del shelf.own[key]
                    shelf.spare[key] = None
                elif not has_faster and key not in shelf.own:
                    shelf.remove(key)
                    shelf.own[key] = None
                has_faster = True
            elif key in shelf.arriving:
                has_faster = True

    # ---- the end of a tier ----------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything (the weights have changed). Plans to come drop it from the tiers."""
        self._generation += 1
        self._device.clear()
        self._in_store.clear()
        self._not_in_store.clear()
        for shelf in self._shelves:
            for key in self._empty(shelf):
                shelf.bury(key)

    def _usable(self) -> list[_Shelf]:
        return [shelf for shelf in self._shelves if shelf.stats.capacity]

    def _empty(self, shelf: _Shelf) -> list[bytes]:
        """What was there to be found."""
        held = list(shelf.held())
        for place in (shelf.own, shelf.spare, shelf.ahead):
            place.clear()
        shelf.leaving = dict.fromkeys(shelf.leaving, False)
        self._changed("cleared", b"", shelf.tier)
        return held

    def _succeeded(self, shelf: _Shelf) -> None:
        shelf.failures_in_a_row = 0

    def _failed(self, shelf: _Shelf) -> None:
        shelf.failures_in_a_row += 1
        if shelf.failures_in_a_row == MAX_FAILURES_IN_A_ROW:
            shelf.stats.capacity = 0
            shelf.dead.clear()
            for key in self._empty(shelf):
                self._settle(key)

    # ---- looking in -----------------------------------------------------------------------

    def keys(self, tier: Tier) -> list[bytes]:
        """Every key in a tier, for a `Snapshot`."""
        shelf = self._by_tier.get(tier)
        return list(shelf.held()) if shelf is not None else []

    @property
    def tiers(self) -> list[Tier]:
        """Those with books, fastest first."""
        return [shelf.tier for shelf in self._shelves]

    def take_changes(self) -> list[KvChange]:
        """What happened in the tiers since the last call, in order; runs of one kind merged.
        "moved" says that a key has left the host for `tier`."""
        merged: list[tuple[KvOp, Tier, bytearray]] = []
        for op, key, tier in self._changes:
            if not merged or merged[-1][:2] != (op, tier):
                merged.append((op, tier, bytearray()))
            merged[-1][2].extend(key)
        self._changes.clear()
        return [KvChange(op, bytes(keys), tier) for op, tier, keys in merged]

    @property
    def stats(self) -> dict[Tier, TierStats]:
        found: dict[Tier, TierStats] = {}
        for shelf in self._shelves:
            shelf.stats.used = shelf.num_used - len(shelf.dead)
            found[shelf.tier] = shelf.stats
        if self._store is not None:
            found["store"] = self._store
        return found

    def check(self) -> None:
        """Assert the invariants: no tier is overfull, every key is own in exactly one place."""
        faster: set[bytes] = set(self._device)
        for shelf in self._shelves:
            assert shelf.num_used <= max(shelf.stats.capacity, len(shelf.arriving)), "overfull"
            held = Counter(shelf.held())
            assert not held or max(held.values()) == 1, "a key is twice in a tier"
            assert not shelf.arriving.keys() & held.keys(), "a key arrives where it is"
            assert not shelf.leaving.keys() & held.keys(), "a key is found while it is dropped"
            assert not shelf.dead.keys() & (held.keys() | shelf.arriving.keys()), "dead and alive"
            assert not shelf.own.keys() & faster, "own, though a faster place has it"
            assert not (shelf.spare.keys() | shelf.ahead.keys()) - faster, "spare, and the only one"
            faster |= held.keys() | shelf.arriving.keys()

    def _changed(self, op: KvOp, key: bytes, tier: Tier) -> None:
        self._changes.append((op, key, tier))


def _remember(memory: OrderedDict[bytes, None], key: bytes) -> None:
    memory[key] = None
    memory.move_to_end(key)
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)


#: Over no tiers every method does nothing: the null object.
NO_TIERS = TierIndex(TierSizes())
