"""The index against a dictionary of sets, over its cap, and against real pools on a real trace."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.protocol.instance import Snapshot
from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES, KvChange, KvEvents, Tier, split_keys
from penstock.service.cluster.finder import IndexFinder
from penstock.service.kv_index.index import TIERS, KvIndex

SLICE = Path(__file__).parents[1] / "data" / "mooncake_slice.jsonl.gz"
NAMES = tuple(f"engine-{n}" for n in range(3))
#: Few enough that they meet; the key of zeros is among them.
KEYS = [bytes(KEY_BYTES)] + [hashlib.sha256(bytes([n])).digest()[:KEY_BYTES] for n in range(11)]

key_lists = st.lists(st.sampled_from(KEYS), max_size=8)
tiers = st.sampled_from(TIERS)


class Model:
    """What the index should say: a set of keys for each instance and tier."""

    def __init__(self) -> None:
        self.held: dict[str, dict[Tier, set[bytes]]] = {
            name: {tier: set() for tier in TIERS} for name in NAMES
        }

    def change(self, name: str, op: str, keys: list[bytes], tier: Tier) -> None:
        held = self.held[name]
        if op in ("stored", "moved"):
            held[tier] |= set(keys)
        if op == "moved":
            for other in TIERS:
                if other not in (tier, "device"):
                    held[other] -= set(keys)
        if op == "removed":
            held[tier] -= set(keys)
        if op == "cleared":
            held[tier].clear()

    def hits(self, keys: list[bytes], name: str) -> tuple[int, int]:
        held = self.held[name]
        everywhere = set().union(*held.values())
        return _leading(keys, held["device"]), _leading(keys, everywhere)


def _leading(keys: list[bytes], held: set[bytes]) -> int:
    count = next((i for i, key in enumerate(keys) if key not in held), len(keys))
    return BLOCK_TOKENS * count


class IndexMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.index = KvIndex(capacity=64)
        self.model = Model()
        self.numbers = dict.fromkeys(NAMES, 0)
        self.incarnations = dict.fromkeys(NAMES, 1)
        for name in NAMES:
            self.index.replace(name, 1, 0, {})

    def _next(self, name: str, changes: list[KvChange]) -> KvEvents:
        self.numbers[name] += 1
        return KvEvents(name, self.incarnations[name], self.numbers[name], changes)

    def _snapshot(self, name: str) -> None:
        held = {tier: b"".join(sorted(keys)) for tier, keys in self.model.held[name].items()}
        self.index.replace(name, self.incarnations[name], self.numbers[name], held)

    @rule(
        name=st.sampled_from(NAMES),
        op=st.sampled_from(["stored", "removed", "moved", "cleared"]),
        keys=key_lists,
        tier=tiers,
        twice=st.booleans(),
    )
    def changed(self, name: str, op: str, keys: list[bytes], tier: Tier, twice: bool) -> None:
        packed = b"" if op == "cleared" else b"".join(keys)
        events = self._next(name, [KvChange(op, packed, tier)])  # type: ignore[arg-type]
        assert self.index.apply(name, events)
        if twice:
            assert self.index.apply(name, events), "a duplicate is no gap"
        self.model.change(name, op, keys, tier)

    @rule(name=st.sampled_from(NAMES), keys=key_lists, tier=tiers)
    def an_event_is_lost(self, name: str, keys: list[bytes], tier: Tier) -> None:
        self._next(name, [])
        self.model.change(name, "removed", keys, tier)
        assert not self.index.apply(name, self._next(name, []))
        assert not self.index.apply(name, self._next(name, [])), "not before a snapshot"
        assert self.index.stats().num_unsynced == 1
        self._snapshot(name)

    @rule(name=st.sampled_from(NAMES), keys=key_lists, in_a_snapshot=st.booleans())
    def keys_are_cut_short(self, name: str, keys: list[bytes], in_a_snapshot: bool) -> None:
        torn = b"".join(keys)[:-1] or b"torn"
        if in_a_snapshot:
            self.index.replace(name, self.incarnations[name], self.numbers[name], {"device": torn})
        else:
            changes = [KvChange("stored", KEYS[0]), KvChange("stored", torn)]
            assert not self.index.apply(name, self._next(name, changes))
        assert not self.index.apply(name, self._next(name, [])), "not before a snapshot"
        self._snapshot(name)

    @rule(name=st.sampled_from(NAMES))
    def restarted(self, name: str) -> None:
        old = self._next(name, [KvChange("stored", b"".join(KEYS))])
        self.incarnations[name] += 1
        self.numbers[name] = 0
        self.model.held[name] = {tier: set() for tier in TIERS}
        assert not self.index.apply(name, self._next(name, []))
        device, anywhere = self.index.hits(b"".join(KEYS), [name])
        assert not device.any() and not anywhere.any(), "the blocks of a dead process"
        self._snapshot(name)
        assert self.index.apply(name, old), "its last words change nothing"

    @rule(name=st.sampled_from(NAMES))
    def gone(self, name: str) -> None:
        self.index.drop(name)
        self.model.held[name] = {tier: set() for tier in TIERS}
        assert not self.index.apply(name, self._next(name, []))
        self._snapshot(name)

    @rule(keys=key_lists)
    def asked(self, keys: list[bytes]) -> None:
        names = [*reversed(NAMES), "nobody"]
        device, anywhere = self.index.hits(b"".join(keys), names)
        expected = [self.model.hits(keys, name) for name in names[:-1]] + [(0, 0)]
        assert [(int(d), int(a)) for d, a in zip(device, anywhere)] == expected

    @invariant()
    def counts(self) -> None:
        held = self.model.held
        for name in NAMES:
            found = self.index.blocks_of(name)
            assert found == {tier: len(keys) for tier, keys in held[name].items()}
        distinct = {key for tiers in held.values() for keys in tiers.values() for key in keys}
        assert self.index.stats().num_blocks == len(distinct)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def chain(seed: int, count: int) -> bytes:
    return b"".join(
        hashlib.sha256(f"{seed}/{n}".encode()).digest()[:KEY_BYTES] for n in range(count)
    )


def test_more_than_64_instances_widen_the_masks() -> None:
    index = KvIndex(capacity=2000)
    names = [f"engine-{n}" for n in range(150)]
    keys = chain(0, 150)
    for n, name in enumerate(names):
        index.replace(name, 1, 0, {"device": keys[: n * KEY_BYTES]})
    index.drop(names[70])
    index.replace("late", 1, 0, {"host": keys[:KEY_BYTES]})  # takes the column that is free again
    device, anywhere = index.hits(keys, [*names, "late"])
    expected = np.arange(150.0) * BLOCK_TOKENS
    expected[70] = 0
    assert device.tolist() == [*expected, 0]
    assert anywhere.tolist() == [*expected, BLOCK_TOKENS]


def test_over_the_cap_hits_are_a_lower_bound_and_chains_lose_their_ends() -> None:
    index = KvIndex(capacity=500)
    held: dict[str, set[bytes]] = defaultdict(set)
    chains = [chain(seed, 60) for seed in range(40)]  # 2,400 blocks
    for number, keys in enumerate(chains):
        name = NAMES[number % 3]
        held[name] |= set(split_keys(keys))
        index.replace(name, 1, 0, {"device": b"".join(sorted(held[name]))})
    for number, keys in enumerate(chains):
        device, anywhere = index.hits(keys, NAMES)
        for name, found, in_any in zip(NAMES, device, anywhere):
            assert found <= _leading(split_keys(keys), held[name])
            assert in_any == found
        del number
    stats = index.stats()
    assert 480 <= stats.num_blocks <= 500 and stats.num_evicted > 1000
    # What is asked for stays, and what was stored last is there but for its end.
    fresh = chain(99, 60)
    index.replace("engine-0", 1, 1, {"device": fresh})
    lengths = []
    for number in range(20):
        lengths.append(float(index.hits(fresh, ["engine-0"])[0][0]))
        index.replace(f"other-{number}", 1, 0, {"device": chain(1000 + number, 60)})
    assert lengths[0] == 60 * BLOCK_TOKENS
    assert all(later <= earlier for earlier, later in pairwise(lengths))
    assert lengths[-1] > 0.5 * lengths[0]


def test_a_snapshot_that_says_nothing_new_is_not_taken_in_again() -> None:
    finder = IndexFinder()
    keys = chain(5, 6)
    finder.snapshot("engine-0", Snapshot("engine-0", 1, [], 7, keys))
    assert finder.index.is_at("engine-0", 1, 7)
    finder.snapshot("engine-0", Snapshot("engine-0", 1, [], 7, keys))  # since a sequence waits
    assert finder.index.stats().num_snapshots == 1
    lost = KvEvents("engine-0", 1, 9, [KvChange("stored", KEYS[1])])
    assert not finder.events("engine-0", lost)
    assert not finder.index.is_at("engine-0", 1, 9)
    finder.snapshot("engine-0", Snapshot("engine-0", 1, [], 9, keys[:KEY_BYTES]))
    found = finder.hits(keys, ["engine-0"])
    assert found is not None and found[0].tolist() == [BLOCK_TOKENS]
    # A new incarnation begins with numbers of its own.
    assert not finder.index.is_at("engine-0", 2, 9) and not finder.index.is_at("engine-1", 1, 9)


def test_blocks_of_64_instances_take_less_than_200_bytes_each() -> None:
    count = 200_000
    keys = chain(3, count)
    index = KvIndex(capacity=count)
    tracemalloc.start()
    for n in range(64):
        held = keys[n * len(keys) // 64 : (n + 1) * len(keys) // 64]
        index.replace(f"engine-{n}", 1, 0, {"device": held})
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    stats = index.stats()
    assert stats.num_blocks == count
    assert taken <= 200 * count
    assert taken == pytest.approx(stats.num_bytes, rel=0.25)


def test_instances_that_come_and_go_leave_nothing_behind() -> None:
    """Columns are used again once they have been swept, and what only the dead held is gone."""
    index = KvIndex(capacity=5000)
    keys = chain(4, 400)
    index.replace("stays", 1, 0, {"device": keys[:KEY_BYTES]})
    for turn in range(200):
        index.replace("goes", turn + 1, 0, {"device": keys, "host": keys})
        assert index.apply("stays", KvEvents("stays", 1, turn + 1, []))
        index.drop("goes")
    assert index.hits(keys, ["stays", "goes"])[0].tolist() == [BLOCK_TOKENS, 0]
    assert index.stats().num_blocks == 1
    assert index._columns.width <= 8 and not index._columns.dead


@pytest.mark.parametrize("num_blocks", [300, 2_000, 16_000])
def test_on_a_trace_the_prediction_is_what_the_pools_find(num_blocks: int) -> None:
    """Four instances with real pools, each request on the one that the index likes best."""
    with gzip.open(SLICE, "rt", encoding="utf-8") as lines:
        trace = [json.loads(line) for line in lines]
    index = KvIndex(capacity=1 << 17)
    names = [f"engine-{n}" for n in range(4)]
    pools = {name: BlockPool(num_blocks) for name in names}
    numbers = dict.fromkeys(names, 0)
    for name in names:
        index.replace(name, 1, 0, {})
    total = 0
    for turn, ids in enumerate(trace):
        keys = [hashlib.sha256(b"%d" % i).digest()[:KEY_BYTES] for i in ids]
        device, anywhere = index.hits(b"".join(keys), names)
        predicted = {name: int(tokens) // BLOCK_TOKENS for name, tokens in zip(names, device)}
        assert predicted == {name: len(pool.match(keys)) for name, pool in pools.items()}
        assert (device == anywhere).all()
        chosen = max(names, key=lambda n: (predicted[n], n == names[turn % 4]))
        pool = pools[chosen]
        blocks = pool.match(keys)
        total += len(blocks)
        for block in blocks:
            pool.share(block)
        for i in range(len(blocks), len(keys)):
            parent = keys[i - 1] if i else b""
            blocks.append(pool.register(pool.allocate(), keys[i], parent, True))
        pool.release(blocks)
        numbers[chosen] += 1
        assert index.apply(chosen, KvEvents(chosen, 1, numbers[chosen], pool.take_changes()))
    assert total > 500
