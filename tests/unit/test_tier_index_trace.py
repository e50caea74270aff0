"""Device, host and disk together on a recorded load: one LRU of their added capacities."""

from __future__ import annotations

import pytest
from tests.unit.test_prefix_cache_trace import SLICE, WHOLE, read

from penstock.engine.memory.tiers.index import TierIndex, TierSizes
from penstock.engine.scheduler.block_pool import BlockPool
from penstock.protocol.kv import KEY_BYTES, Tier, split_keys


class Instance:
    """The production structures, one request after the other: what is not on the device is loaded
    from where it is, and what the device evicts is stored at once, with its bytes still there."""

    def __init__(self, device_blocks: int, host_blocks: int, disk_blocks: int) -> None:
        self.pool = BlockPool(device_blocks)
        self.index = TierIndex(TierSizes(host_blocks, disk_blocks))
        self.hits: dict[Tier, int] = {"device": 0, "host": 0, "disk": 0}

    def serve(self, keys: list[bytes]) -> None:
        blocks = self.pool.match(keys)
        self.hits["device"] += len(blocks)
        for block in blocks:
            self.pool.share(block)
        rest = keys[len(blocks) :]
        tiers = self.index.match(rest)
        for key, tier in zip(rest, tiers):
            self.index.begin_load(tier, [key])
            self.hits[tier] += 1
        for i in range(len(blocks), len(keys)):
            parent = keys[i - 1] if i else b""
            blocks.append(self.pool.register(self.pool.allocate(), keys[i], parent, True))
        for key, tier in zip(rest, tiers):
            self.index.end_load(tier, [key], [True])
        self.pool.release(blocks)
        self._evict()

    def _evict(self) -> None:
        changes = self.pool.take_changes()
        self.index.follow([change for change in changes if change.op == "stored"])
        for change in changes:
            if change.op == "removed":
                self.index.follow([change])
                for key in split_keys(change.keys):
                    for plan in self.index.plan_store([key]):
                        self.index.end_store(plan, [True], [True] * len(plan.before))

    def run(self, trace: list[list[int]]) -> int:
        for ids in trace:
            self.serve([block_id.to_bytes(KEY_BYTES, "little") for block_id in ids])
        self.index.check()
        self.index.take_changes()
        return sum(self.hits.values())


@pytest.mark.parametrize(
    ("device", "host", "disk", "expected_hits"),
    [
        (2_000, 0, 0, 742),
        (500, 1_500, 0, 742),
        (500, 500, 1_000, 742),
        (500, 0, 1_500, 742),
        (1_000, 1_000, 3_000, 1105),
        (300, 4_700, 0, 1105),
        (4_000, 1, 999, 1105),
        (1_000, 5_000, 10_000, 2130),
    ],
)
def test_a_slice_of_the_trace(device: int, host: int, disk: int, expected_hits: int) -> None:
    """The expected hits are those of a plain LRU (test_prefix_cache_trace.py)."""
    instance = Instance(device, host, disk)
    assert instance.run(read(SLICE)) == expected_hits


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE.exists(), reason="needs PENSTOCK_MOONCAKE_TRACE (Mooncake, FAST'25)")
@pytest.mark.parametrize(
    ("device", "host", "disk", "published_percent"),
    [
        (1_000, 0, 0, 4.5),
        (1_000, 3_000, 6_000, 21.1),
        (1_000, 9_000, 20_000, 32.6),
        (1_000, 49_000, 0, 35.5),
        (5_000, 15_000, 30_000, 35.5),
    ],
)
def test_the_whole_trace(device: int, host: int, disk: int, published_percent: float) -> None:
    trace = read(WHOLE)
    whole = Instance(device + host + disk, 0, 0).run(trace)
    assert Instance(device, host, disk).run(trace) == whole
    assert 100 * whole / sum(map(len, trace)) == pytest.approx(published_percent, abs=0.1)
