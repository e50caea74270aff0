"""The cache on a recorded load, against a plain LRU that knows nothing of chains."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from benchmarks.cluster_hits import plain_lru_hits

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.protocol.kv import KEY_BYTES

HERE = Path(__file__).parents[1]
SLICE = HERE / "data" / "mooncake_slice.jsonl.gz"
WHOLE = Path(
    os.environ.get(
        "PENSTOCK_MOONCAKE_TRACE",
        HERE.parents[1] / "shared" / "data" / "traces" / "mooncake_conversation.jsonl.gz",
    )
)


def read(path: Path) -> list[list[int]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["hash_ids"] if isinstance(row, dict) else row for row in rows]


def pool_hits(trace: list[list[int]], num_blocks: int) -> int:
    """The same through a pool, one request after the other, as the scheduler uses it. The trace's
    ids are chained hashes already, so they are keys as they stand."""
    pool = BlockPool(num_blocks)
    num_hits = 0
    for ids in trace:
        keys = [block_id.to_bytes(KEY_BYTES, "little") for block_id in ids]
        blocks = pool.match(keys)
        num_hits += len(blocks)
        for block in blocks:
            pool.share(block)
        for i in range(len(blocks), len(keys)):
            parent = keys[i - 1] if i else b""
            blocks.append(pool.register(pool.allocate(), keys[i], parent, True))
        pool.release(blocks)
    pool.check([])
    return num_hits


@pytest.mark.parametrize(
    ("num_blocks", "expected_hits"), [(300, 599), (2_000, 742), (5_000, 1105), (16_000, 2130)]
)
def test_a_slice_of_the_trace(num_blocks: int, expected_hits: int) -> None:
    trace = read(SLICE)
    assert plain_lru_hits(trace, num_blocks) == expected_hits
    assert pool_hits(trace, num_blocks) == expected_hits


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE.exists(), reason="needs PENSTOCK_MOONCAKE_TRACE (Mooncake, FAST'25)")
@pytest.mark.parametrize(
    ("num_blocks", "published_percent"),
    [(1_000, 4.5), (10_000, 21.1), (30_000, 32.6), (50_000, 35.5)],
)
def test_the_whole_trace(num_blocks: int, published_percent: float) -> None:
    trace = read(WHOLE)
    hits = pool_hits(trace, num_blocks)
    assert hits == plain_lru_hits(trace, num_blocks)
    assert 100 * hits / sum(map(len, trace)) == pytest.approx(published_percent, abs=0.1)
