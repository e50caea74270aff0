"""Which instance has which KV block, and in which tier: fed by numbered `KvEvents`, no I/O.

Each key has a mask with one bit for each instance (`masks.py`): who has it on the device, and,
where somebody has slower tiers, who has it there. What the index does not know (evicted over its
own cap, not heard of yet) counts as absent, so what it answers is at most what is there; only
removals that are still on their way make it too much.

Dictionaries and integers, not arrays: most events name one block and most prompts miss early, and
what is small should cost little.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from operator import or_
from typing import get_args

import numpy as np
import numpy.typing as npt

from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES, KvChange, KvEvents, Tier
from penstock.service.kv_index.masks import Columns, leading
from penstock.service.policies.view import Floats

TIERS: tuple[Tier, ...] = get_args(Tier)
_SLOW = TIERS[1:]
#: Over the cap, so many blocks go at once: finding the oldest ones costs less for many together.
_EVICTED_AT_ONCE = 1 / 32
#: A bit of no instance: the block was asked for, or stored once more.
_USED = 1
#: Keys looked through at each event while columns that were given up are swept.
_SWEPT_AT_ONCE = 64
#: Of a key of 16 bytes.
_KEY_OBJECT_BYTES = sys.getsizeof(bytes(KEY_BYTES))
_SAMPLED = 256


@dataclass(slots=True)
class _Source:
    """An instance's bit in the masks, and how far its events have been taken in."""

    bit: int
    incarnation: int
    number: int
    #: False: events are missing, and nothing is taken in until a snapshot comes.
    synced: bool = True
    #: Whether its bit was ever set.
    marked: bool = False


@dataclass(frozen=True, slots=True)
class IndexStats:
    num_blocks: int
    #: What it may hold; beyond, the blocks that were used longest ago are forgotten.
    capacity: int
    num_bytes: int
    num_evicted: int
    num_instances: int
    #: Instances whose events have a gap, so that a snapshot is waited for.
    num_unsynced: int
    num_gaps: int
    num_snapshots: int


class KvIndex:
    """At most `capacity` different blocks (and one in 32 more), whoever holds them. A block takes
    about 170 bytes with up to 64 instances, and up to 130 more for each 1,000."""

    def __init__(self, capacity: int = 1 << 20, block_tokens: int = BLOCK_TOKENS) -> None:
        self.capacity = capacity
        self._block_tokens = block_tokens
        #: Every block that is known, the oldest first: who has it on the device (nobody, where it
        #: is only in slower tiers), and whether it was used since it came to stand where it does.
        self._device: dict[bytes, int] = {}
        self._slow: dict[Tier, dict[bytes, int]] = {tier: {} for tier in _SLOW}
        self._columns = Columns(reserved=_USED)
        self._sources: dict[str, _Source] = {}
        self._version = 0  # of the columns
        self._places: tuple[Sequence[str], int, npt.NDArray[np.int64]] | None = None
        self._unswept: list[bytes] = []
        self._sweeping = 0
        self._num_gaps = 0
        self._num_snapshots = 0
        self._num_evicted = 0

    # --- what instances say --------------------------------------------------------------------

    def apply(self, instance: str, events: KvEvents) -> bool:
        """Take in what changed. False: events are missing or make no sense, or it is another
        incarnation than we know; ask for a snapshot and hand it to `replace`."""
        source = self._sources.get(instance)
        if source is None:
            return False
        if events.incarnation < source.incarnation:
            return True  # a word from the dead
        if events.incarnation > source.incarnation:
            self.drop(instance)  # its cache died with it
            return False
        if not source.synced:
            return False
        if events.number <= source.number:
            return True
        if events.number != source.number + 1 or not all(_is_whole(c.keys) for c in events.changes):
            source.synced = False
            self._num_gaps += 1
            return False
        source.number = events.number
        for change in events.changes:
            self._change(source, change)
        if self._columns.dead:
            self._sweep(_SWEPT_AT_ONCE)
        return True

    def replace(
        self, instance: str, incarnation: int, number: int, keys: Mapping[Tier, bytes]
    ) -> None:
        """What `instance` holds after event `number` is exactly this. Nothing is believed of one
        that makes no sense: `apply` will ask again."""
        source = self._sources.get(instance)
        if source is None:
            source = self._sources[instance] = _Source(self._columns.take(), incarnation, number)
        else:
            self._renew(source)
        self._version += 1
        source.incarnation, source.number = incarnation, number
        source.synced = all(map(_is_whole, keys.values()))
        self._num_snapshots += 1
        if not source.synced:
            return
        for tier, packed in keys.items():
            self._store(source, _split(packed), tier)

    def is_at(self, instance: str, incarnation: int, number: int) -> bool:
        """All up to event `number` has been taken in: a snapshot says nothing new."""
        source = self._sources.get(instance)
        if source is None or not source.synced:
            return False
        return (source.incarnation, source.number) == (incarnation, number)

    def distrust(self, instance: str) -> None:
        """Its numbers may begin anew (it has attached again): take nothing in until `replace`."""
        if instance in self._sources:
            self._sources[instance].synced = False

    def drop(self, instance: str) -> None:
        """It is gone, and so is what it held."""
        source = self._sources.pop(instance, None)
        if source is not None:
            self._columns.give_up(source.bit)
            self._version += 1

    # --- what the service asks -----------------------------------------------------------------

    def hits(self, keys: bytes, names: Sequence[str]) -> tuple[Floats, Floats]:
        """Leading tokens of a prompt with these block keys that each of `names` holds: on its
        device, and in any tier. Instances that are not known hold none. Shapes (len(names),)."""
        device, among, width = self._device, self._columns.live, self._columns.width
        wanted = _split(keys)
        masks = self._up_to_a_miss(wanted)
        on_device, reached = leading(masks, among, width)
        in_any, anywhere = on_device, masks
        for slower in filter(None, self._slow.values()):
            anywhere = list(map(or_, anywhere, map(slower.get, wanted, repeat(0))))
        if anywhere is not masks:
            in_any, reached = leading(anywhere, among, width)
        for key, mask in zip(wanted[:reached], masks):
            if not mask & _USED:
                device[key] = mask | _USED
        places = self._places_of(names)
        return self._block_tokens * on_device[places], self._block_tokens * in_any[places]

    def blocks_of(self, instance: str) -> dict[Tier, int]:
        """Blocks known of one instance, by tier; reads the whole table."""
        source = self._sources.get(instance)
        bit = 0 if source is None else source.bit
        return {tier: sum(1 for mask in self._masks(tier).values() if mask & bit) for tier in TIERS}

    @property
    def instances(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def stats(self) -> IndexStats:
        while self._columns.dead:
            self._sweep(len(self._device) + 1)
        return IndexStats(
            num_blocks=len(self._device),
            capacity=self.capacity,
            num_bytes=sum(_num_bytes(self._masks(tier)) for tier in TIERS),
            num_evicted=self._num_evicted,
            num_instances=len(self._sources),
            num_unsynced=sum(not s.synced for s in self._sources.values()),
            num_gaps=self._num_gaps,
            num_snapshots=self._num_snapshots,
        )

    def _up_to_a_miss(self, keys: list[bytes]) -> list[int]:
        """Masks of the leading keys; most prompts miss early, and the rest is not looked up."""
        if not keys or keys[0] not in self._device:
            return []
        return list(map(self._device.get, keys, repeat(0)))

    def _places_of(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """Columns of `names`, -1 for who is not known. Asked for the same tuple again and again, it
        does not look again while nobody has come or gone."""
        known = self._places
        if known is not None and known[0] is names and known[1] == self._version:
            return known[2]
        sources = self._sources
        places = np.array(
            [sources[n].bit.bit_length() - 1 if n in sources else -1 for n in names], np.int64
        )
        if isinstance(names, tuple):  # a list may have changed meanwhile
            self._places = names, self._version, places
        return places

    # --- changes -------------------------------------------------------------------------------

    def _change(self, source: _Source, change: KvChange) -> None:
        keys = _split(change.keys)
        match change.op:
            case "stored":
                self._store(source, keys, change.tier)
            case "removed":
                self._remove(source.bit, keys, (change.tier,))
            case "moved":
                self._store(source, keys, change.tier)
                # Between slower tiers; what leaves the device says so by itself.
                self._remove(source.bit, keys, [t for t in _SLOW if t != change.tier])
            case "cleared" if any(self._slow.values()) or change.tier != "device":
                self._remove(source.bit, list(self._masks(change.tier)), (change.tier,))
            case "cleared":
                self._renew(source)

    def _store(self, source: _Source, keys: list[bytes], tier: Tier) -> None:
        device, bit = self._device, source.bit
        source.marked = source.marked or bool(keys)
        if tier == "device" and device.keys().isdisjoint(keys):
            device.update(dict.fromkeys(reversed(keys), bit))  # most prompts are nobody else's
        elif tier == "device":
            for key in reversed(keys):  # of a chain, the end goes first
                mask = device.get(key)
                device[key] = bit if mask is None else mask | bit | _USED
        else:
            slow = self._slow[tier]
            for key in reversed(keys):
                device.setdefault(key, 0)
                slow[key] = slow.get(key, 0) | bit
        if len(device) > self.capacity:
            self._evict()

    def _remove(self, bit: int, keys: list[bytes], tiers: Iterable[Tier]) -> None:
        for tier in tiers:
            masks = self._masks(tier)
            nowhere_else = masks is self._device and not any(self._slow.values())
            for key in keys:
                mask = masks.get(key, 0)
                if not mask & bit:
                    continue
                if nowhere_else and mask | _USED == bit | _USED:
                    del masks[key]
                else:
                    self._set(tier, key, mask ^ bit)

    def _set(self, tier: Tier, key: bytes, mask: int) -> None:
        """`mask` is who still has it there; where nobody has it anywhere it is forgotten."""
        if mask or tier == "device":
            self._masks(tier)[key] = mask
        else:
            del self._masks(tier)[key]
        if not self._anywhere(key):
            del self._device[key]

    def _evict(self) -> None:
        """From the oldest on; who was used meanwhile is spared once (the CLOCK algorithm: Corbato,
        1968)."""
        device = self._device
        fewer = self.capacity - int(_EVICTED_AT_ONCE * self.capacity)
        while len(device) > fewer:
            for key in list(islice(device, len(device) - fewer)):
                mask = device.pop(key)
                if mask & _USED:
                    device[key] = mask ^ _USED
                    continue
                self._num_evicted += 1
                for masks in self._slow.values():
                    masks.pop(key, None)

    def _masks(self, tier: Tier) -> dict[bytes, int]:
        return self._device if tier == "device" else self._slow[tier]

    def _anywhere(self, key: bytes) -> int:
        mask = self._device.get(key, 0) & ~_USED
        for masks in self._slow.values():
            mask |= masks.get(key, 0)
        return mask

    # --- who is gone ---------------------------------------------------------------------------

    def _renew(self, source: _Source) -> None:
        """It holds nothing (as far as is known): a new column is a matter of a moment, while taking
        its bit out of every mask is not."""
        if not source.marked:
            return
        source.marked = False
        self._columns.give_up(source.bit)
        source.bit = self._columns.take()
        self._version += 1

    def _sweep(self, most: int) -> None:
        """Take the bits of columns that were given up out of up to so many masks."""
        if not self._unswept and self._columns.dead:
            self._unswept, self._sweeping = list(self._device), self._columns.dead
        gone, self._unswept[-most:] = self._unswept[-most:], []
        dead = self._sweeping
        for key in gone:
            if not self._anywhere(key) & dead:
                continue
            for tier in TIERS:
                mask = self._masks(tier).get(key, 0)
                if mask & dead:
                    self._set(tier, key, mask & ~dead)
        if not self._unswept:
            self._columns.swept(dead)
            self._sweeping = 0


def _is_whole(packed: bytes) -> bool:
    return len(packed) % KEY_BYTES == 0


def _split(packed: bytes) -> list[bytes]:
    assert _is_whole(packed), "keys are 16 bytes each"
    found: list[bytes] = np.frombuffer(packed, "V16").tolist()
    return found


def _num_bytes(masks: dict[bytes, int]) -> int:
    """As far as can be said without looking at all of them."""
    some = list(islice(masks.values(), _SAMPLED))
    a_mask = sum(map(sys.getsizeof, some)) / max(1, len(some))
    return sys.getsizeof(masks) + int(len(masks) * (_KEY_OBJECT_BYTES + a_mask))
