"""What it costs to bring a prefix back from a slower tier, against computing it.

    python -m benchmarks.kv_tiers [--tokens 1024] [--folder DIR] [--store mooncake://host:port]

Blocks have the size that Qwen3-0.6B gives them in bfloat16. A disk is read twice: with its pages in
the system's cache, and after they have been dropped from it (which ext4 and xfs honour). Prefill of
the same model stands in docs/design/tiers.md beside these figures: loading layer by layer
could hide at most the smaller one of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.tiers.data import Block, TierData
from penstock.engine.memory.tiers.disk import DiskTier
from penstock.engine.memory.tiers.host import HostTier
from penstock.engine.memory.tiers.store import StoreConfig, StoreTier
from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES

LAYOUT = kv_layout(28, 8, 128, "bfloat16")  # Qwen3-0.6B


def tiers(folder: Path, num_blocks: int, store: str | None) -> Iterator[tuple[str, TierData]]:
    yield "host", HostTier(num_blocks, LAYOUT.block_bytes)
    yield "disk", DiskTier(folder, "benchmark", num_blocks, LAYOUT.block_bytes, bytes(32))
    if store is not None:
        yield "store", StoreTier(StoreConfig.parse(store), LAYOUT.block_bytes, "benchmark")


def drop_pages(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(act: Callable[[], list[bool]]) -> float:
    started_s = time.perf_counter()
    ok = act()
    assert all(ok), f"{ok.count(False)} blocks failed"
    return time.perf_counter() - started_s


def measure(
    name: str, tier: TierData, blocks: list[tuple[bytes, Block]], folder: Path, rounds: int
) -> dict[str, float]:
    """Medians in ms for all blocks together, and GB/s."""
    stores, loads, cold = [], [], []
    for _ in range(rounds):
        for key, _ in blocks:
            tier.drop(key)
        stores.append(timed(lambda: tier.store(blocks)))
        loads.append(timed(lambda: tier.load(blocks)))
        if name == "disk":
            drop_pages(folder)
            cold.append(timed(lambda: tier.load(blocks)))
    num_bytes = sum(block.nbytes for _, block in blocks)
    found = {"store_ms": stores, "load_ms": loads} | ({"load_cold_ms": cold} if cold else {})
    medians = {what: statistics.median(times_s) for what, times_s in found.items()}
    result = {what: round(1e3 * s, 2) for what, s in medians.items()}
    rates = {what[:-3] + "_gb_per_s": num_bytes / s / 1e9 for what, s in medians.items()}
    return result | {what: round(rate, 2) for what, rate in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="of the disk tier; a temporary one by default")
    parser.add_argument("--store", help="mooncake://host:port")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    blocks = [
        (rng.bytes(KEY_BYTES), rng.integers(0, 256, LAYOUT.block_bytes, dtype=np.uint8))
        for _ in range(options.tokens // BLOCK_TOKENS)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        results: dict[str, object] = {"tokens": options.tokens, "block_bytes": LAYOUT.block_bytes}
        for name, tier in tiers(folder, len(blocks), options.store):
            results[name] = measure(name, tier, blocks, folder, options.rounds)
            tier.close()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
