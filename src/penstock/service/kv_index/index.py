"""Which instance has which KV block, and in which tier: fed by numbered `KvEvents`, no I/O.

Each key has one bit for each instance and tier, in words of 64 instances. What the index does not
know (evicted over its own cap, not heard of yet) counts as absent, so what it answers is at most
what is there; only removals that are still on their way make it too much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES, KvChange, KvEvents, Tier
from penstock.service.kv_index.table import KeyTable, Slots, Words, key_words
from penstock.service.policies.routing import Floats

TIERS: tuple[Tier, ...] = get_args(Tier)
_WORD = 64
#: Keys looked up at first; most prompts miss early, and a long chain pays little for the steps.
_FIRST_KEYS = 256


@dataclass(slots=True)
class _Source:
    """An instance's place in the masks, and how far its events have been taken in."""

    column: int
    incarnation: int
    number: int
    #: False: events are missing, and nothing is taken in until a snapshot comes.
    synced: bool = True

    @property
    def word(self) -> int:
        return self.column // _WORD

    @property
    def bit(self) -> np.uint64:
        return np.uint64(1 << self.column % _WORD)


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
    """About `capacity` different blocks, whoever holds them (up to 1.4 times that where they fall
    well). Memory is taken at the start: 69 bytes a block for up to 64 instances, and 34 more for
    each further 64."""

    def __init__(self, capacity: int = 1 << 20, block_tokens: int = BLOCK_TOKENS) -> None:
        self.capacity = capacity
        self._block_tokens = block_tokens
        self._table = KeyTable(capacity)
        self._masks: dict[Tier, Words] = {tier: self._columns(1) for tier in TIERS}
        self._sources: dict[str, _Source] = {}
        self._num_gaps = 0
        self._num_snapshots = 0

    # --- what instances say --------------------------------------------------------------------

    def apply(self, instance: str, events: KvEvents) -> bool:
        """Take in what changed. False: events are missing, or it is another incarnation than we
        know; ask for a snapshot and hand it to `replace`."""
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
        if events.number != source.number + 1:
            source.synced = False
            self._num_gaps += 1
            return False
        source.number = events.number
        for change in events.changes:
            self._change(source, change)
        return True

    def replace(
        self, instance: str, incarnation: int, number: int, keys: Mapping[Tier, bytes]
    ) -> None:
        """What `instance` holds after event `number` is exactly this."""
        source = self._sources.get(instance)
        if source is None:
            source = self._sources[instance] = _Source(self._free_column(), incarnation, number)
        else:
            self._clear(source, TIERS)
        source.incarnation, source.number, source.synced = incarnation, number, True
        self._num_snapshots += 1
        for tier, packed in keys.items():
            self._store(source, packed, tier)

    def distrust(self, instance: str) -> None:
        """Its numbers may begin anew (it has attached again): take nothing in until `replace`."""
        if instance in self._sources:
            self._sources[instance].synced = False

    def drop(self, instance: str) -> None:
        """It is gone, and so is what it held."""
        source = self._sources.pop(instance, None)
        if source is not None:
            self._clear(source, TIERS)

    # --- what the service asks -----------------------------------------------------------------

    def hits(self, keys: bytes, names: Sequence[str]) -> tuple[Floats, Floats]:
        """Leading tokens of a prompt with these block keys that each of `names` holds: on its
        device, and in any tier. Instances that are not known hold none. Shapes (len(names),)."""
        slots = self._chain(keys)
        columns = [self._sources[n].column if n in self._sources else -1 for n in names]
        self._table.touch(slots)
        device = self._masks["device"][slots]
        anywhere = device.copy()
        for tier in TIERS[1:]:
            anywhere |= self._masks[tier][slots]
        on_device = self._leading_tokens(device)[columns]
        in_any = self._leading_tokens(anywhere)[columns]
        return on_device, in_any

    def blocks_of(self, instance: str) -> dict[Tier, int]:
        """Blocks known of one instance, by tier; reads the whole table."""
        source = self._sources.get(instance)
        if source is None:
            return {tier: 0 for tier in TIERS}
        return {
            tier: int(np.count_nonzero(masks[:, source.word] & source.bit))
            for tier, masks in self._masks.items()
        }

    @property
    def instances(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def stats(self) -> IndexStats:
        return IndexStats(
            num_blocks=self._table.num_keys,
            capacity=self.capacity,
            num_bytes=self._table.nbytes + sum(m.nbytes for m in self._masks.values()),
            num_evicted=self._table.num_evicted,
            num_instances=len(self._sources),
            num_unsynced=sum(not s.synced for s in self._sources.values()),
            num_gaps=self._num_gaps,
            num_snapshots=self._num_snapshots,
        )

    # --- lookups -------------------------------------------------------------------------------

    def _chain(self, keys: bytes) -> Slots:
        """Slots of the leading keys that somebody holds."""
        low, high = key_words(keys)
        parts: list[Slots] = []
        start, size = 0, _FIRST_KEYS
        while start < len(low):
            found = self._table.find(low[start : start + size], high[start : start + size])
            absent = found < 0
            if absent.any():
                parts.append(found[: int(absent.argmax())])
                break
            parts.append(found)
            start, size = start + size, 4 * size
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _leading_tokens(self, masks: Words) -> Floats:
        """By column: tokens before the first block whose bit is missing; and a last 0, which the
        column -1 of unknown instances reads. `masks` has shape (blocks, words)."""
        num_words = self._masks["device"].shape[1]
        counts = np.zeros(num_words * _WORD + 1)
        if not len(masks):
            return counts
        still = np.bitwise_and.accumulate(masks, axis=0)
        # Bits only ever go out on the way, so few rows differ from the next one: count by runs.
        last = np.append(np.flatnonzero((still[1:] != still[:-1]).any(axis=1)), len(still) - 1)
        lengths = np.diff(last, prepend=-1)
        rows = np.ascontiguousarray(still[last].astype("<u8")).view(np.uint8)
        counts[:-1] = lengths @ np.unpackbits(rows, axis=1, bitorder="little")
        counts *= self._block_tokens
        return counts

    # --- changes -------------------------------------------------------------------------------

    def _change(self, source: _Source, change: KvChange) -> None:
        match change.op:
            case "stored":
                self._store(source, change.keys, change.tier)
            case "removed":
                self._remove(source, change.keys, (change.tier,))
            case "moved":
                self._store(source, change.keys, change.tier)
                # Between slower tiers; what leaves the device says so by itself.
                self._remove(source, change.keys, [t for t in TIERS[1:] if t != change.tier])
            case "cleared":
                self._clear(source, (change.tier,))

    def _store(self, source: _Source, keys: bytes, tier: Tier) -> None:
        step = self.capacity * KEY_BYTES  # more at once would only push itself out
        for start in range(0, len(keys), step):
            slots, taken = self._table.claim(*key_words(keys[start : start + step]))
            for masks in self._masks.values():
                masks[taken] = 0
            self._masks[tier][slots, source.word] |= source.bit

    def _remove(self, source: _Source, keys: bytes, tiers: Iterable[Tier]) -> None:
        slots = self._table.find(*key_words(keys))
        self._take_bits(source, slots[slots >= 0], tiers)

    def _clear(self, source: _Source, tiers: Iterable[Tier]) -> None:
        tiers = tuple(tiers)
        held = np.zeros(self._table.num_slots, np.uint64)
        for tier in tiers:
            held |= self._masks[tier][:, source.word]
        self._take_bits(source, np.flatnonzero(held & source.bit), tiers)

    def _take_bits(self, source: _Source, slots: Slots, tiers: Iterable[Tier]) -> None:
        for tier in tiers:
            self._masks[tier][slots, source.word] &= ~source.bit
        held = self._masks["device"][slots]
        for tier in TIERS[1:]:
            held = held | self._masks[tier][slots]
        self._table.release(np.unique(slots[~held.any(axis=1)]))

    def _free_column(self) -> int:
        """The first column that nobody has; the masks grow by a word when there is none."""
        taken = {source.column for source in self._sources.values()}
        num_words = self._masks["device"].shape[1]
        column = next(c for c in range(len(taken) + 1) if c not in taken)
        if column >= num_words * _WORD:
            self._masks = {
                tier: np.concatenate([masks, self._columns(1)], axis=1)
                for tier, masks in self._masks.items()
            }
        return column

    def _columns(self, num_words: int) -> Words:
        return np.zeros((self._table.num_slots, num_words), np.uint64)
