"""Two instances' tiers over one real Mooncake Store: `mooncake_master` as a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.engine.memory.tiers.store import StoreConfig, StoreTier, connect
from penstock.protocol.kv import KEY_BYTES
from tests.helpers import mooncake_master
from tests.integration.test_tiers import ask, conversations, engine, stats

mooncake_master.require()

BLOCK_BYTES = 64 << 10


@pytest.fixture
def master(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = mooncake_master.free_port()
    with mooncake_master.running(port, tmp_path) as process:
        yield process, port


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def block(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)


def tier_at(port: int, namespace: str = "n", segment_mib: int = 64) -> StoreTier:
    config = StoreConfig("127.0.0.1", port, segment_bytes=segment_mib << 20, retry_s=0.0)
    return StoreTier(config, BLOCK_BYTES, namespace)


def load(tier: StoreTier, *numbers: int) -> list[bool]:
    destinations = [np.zeros(BLOCK_BYTES, np.uint8) for _ in numbers]
    ok = tier.load([(key(n), d) for n, d in zip(numbers, destinations)])
    for number, destination, there in zip(numbers, destinations, ok):
        assert not there or (destination == block(number)).all(), "wrong bytes"
    return ok


def store(tier: StoreTier, *numbers: int) -> list[bool]:
    return tier.store([(key(n), block(n)) for n in numbers])


#: Another instance: a process that stores, says so, and stays until it is told to go.
OTHER = f"""
import sys
sys.path[:0] = {sys.path!r}
from tests.integration.test_mooncake_store import store, tier_at
tier = tier_at(int(sys.argv[1]))
print(store(tier, *range(40)) == [True] * 40, flush=True)
sys.stdin.read()
tier.close()
"""


def test_what_one_process_stores_another_loads(
    master: tuple[subprocess.Popen[bytes], int],
) -> None:
    _, port = master
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"True\n"
        mine = tier_at(port)
        assert load(mine, *range(40)) == [True] * 40
        assert load(mine, 0, 1, 99, 2) == [True, True, False, False]
        stranger = tier_at(port, "another model")
        assert load(stranger, 1) == [False]
        stranger.close()
        mine.close()
    finally:
        other.communicate(timeout=60)


def test_objects_of_others_under_our_names(
    master: tuple[subprocess.Popen[bytes], int],
) -> None:
    """Empty, short and spoilt values, put by the library itself."""
    _, port = master
    tier = tier_at(port)
    store(tier, 1)
    stranger = connect(StoreConfig("127.0.0.1", port, segment_bytes=16 << 20))
    for number, value in [(2, b"x"), (3, bytes(BLOCK_BYTES)), (4, bytes(BLOCK_BYTES + 48))]:
        assert stranger.put(tier._name(key(number)), value) == 0  # type: ignore[attr-defined]
    assert [load(tier, n) for n in (1, 2, 3, 4, 5)] == [[True]] + [[False]] * 4
    stranger.close()
    tier.close()


def test_a_store_without_room_evicts_or_refuses_and_never_lies(
    master: tuple[subprocess.Popen[bytes], int],
) -> None:
    _, port = master
    tier = tier_at(port, segment_mib=16)
    for number in range(400):  # 25 MiB
        store(tier, number)
    there = [load(tier, number) == [True] for number in range(400)]
    assert any(there) and not all(there)
    tier.close()


def test_the_master_dies_and_comes_back(
    master: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    process, port = master
    tier = tier_at(port)
    assert store(tier, 1) == [True]
    process.kill()
    process.wait()
    started_s = time.monotonic()
    assert load(tier, 1) == [False] and store(tier, 2) == [False]
    assert time.monotonic() - started_s < 30
    with mooncake_master.running(port, tmp_path):
        deadline_s = time.monotonic() + 60
        while store(tier, 3) != [True]:
            assert time.monotonic() < deadline_s, "it never came back"
            time.sleep(0.2)
        assert load(tier, 3) == [True]
        tier.close()


def test_what_one_engine_stored_another_finds_in_the_store(
    master: tuple[subprocess.Popen[bytes], int],
) -> None:
    """Engines with small device pools; the second one has never seen the prompts."""
    prompts = conversations(8)
    url = f"mooncake://127.0.0.1:{master[1]}?segment_bytes={256 << 20}"
    with engine(kv_store=url) as first, engine(kv_store=url) as second:
        expected, _ = ask(first, prompts)
        assert stats(first)["store"].stored > 30
        tokens, cached = ask(second, prompts)
        assert tokens == expected
        loaded = stats(second)["store"].loaded
        assert loaded > 30 and cached == 16 * loaded
