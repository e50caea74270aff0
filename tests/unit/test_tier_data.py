"""The bytes of the host and disk tiers, and what spoils them."""

from __future__ import annotations

import logging
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.tiers.data import Block, TierData, Tiers
from penstock.engine.memory.tiers.disk import DiskTier
from penstock.engine.memory.tiers.header import HEADER_BYTES
from penstock.engine.memory.tiers.host import HostTier
from penstock.engine.memory.tiers.index import MAX_FAILURES_IN_A_ROW
from penstock.engine.memory.tiers.open import TierConfig, open_tiers
from penstock.engine.memory.tiers.slots import Slots
from penstock.engine.transfer.jobs import Demotion
from penstock.protocol.errors import ConfigError, NotEnoughMemory
from penstock.protocol.kv import KEY_BYTES

BLOCK_BYTES = 5000  # not a multiple of a page
DIGEST = bytes(32)


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def block(number: int) -> Block:
    return np.random.default_rng(number).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)


def store(tier: TierData, *numbers: int) -> list[bool]:
    return tier.store([(key(n), block(n)) for n in numbers])


def loads(tier: TierData, number: int) -> bool:
    """Is it there? Then it must be what was stored."""
    destination = np.zeros(BLOCK_BYTES, np.uint8)
    (ok,) = tier.load([(key(number), destination)])
    assert not ok or (destination == block(number)).all(), "wrong bytes"
    return ok


def disk_at(folder: Path, num_blocks: int = 4, digest: bytes = DIGEST) -> DiskTier:
    return DiskTier(folder, "engine-0", num_blocks, BLOCK_BYTES, digest)


@pytest.fixture(params=["host", "disk"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TierData]:
    made = HostTier(4, BLOCK_BYTES) if request.param == "host" else disk_at(tmp_path)
    yield made
    made.close()


def test_what_was_stored_is_loaded(tier: TierData) -> None:
    assert store(tier, 1, 2, 3) == [True] * 3
    assert [loads(tier, n) for n in (3, 1, 2, 4)] == [True, True, True, False]


def test_a_full_tier_takes_no_more_until_something_is_dropped(tier: TierData) -> None:
    assert store(tier, 1, 2, 3, 4, 5) == [True] * 4 + [False]
    tier.drop(key(2))
    tier.drop(key(2))
    assert store(tier, 5, 6) == [True, False]
    assert [loads(tier, n) for n in (1, 2, 5, 6)] == [True, False, True, False]


def test_a_key_is_stored_once(tier: TierData) -> None:
    assert store(tier, 1, 1, 1, 1, 1, 1) == [True] * 6
    assert store(tier, 2, 3, 4) == [True] * 3


def test_many_threads(tier: TierData) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            number = int(rng.integers(0, 8))
            try:
                store(tier, number)
                loads(tier, int(rng.integers(0, 8)))
                tier.drop(key(int(rng.integers(0, 8))))
            except AssertionError as exc:
                wrong.append(str(exc))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for number in range(8):
        tier.drop(key(number))
    assert store(tier, 1, 2, 3, 4) == [True] * 4, "a slot was lost"


def test_a_slot_that_is_read_is_not_written_to() -> None:
    slots = Slots(1)
    first = slots.take()
    assert first == 0
    slots.publish(key(1), first)
    with slots.reading(key(1)) as slot:
        assert slot == 0
        slots.drop(key(1))
        assert slots.take() is None
    assert slots.take() == 0


def test_a_host_tier_that_never_fits_is_refused() -> None:
    with pytest.raises(NotEnoughMemory, match="--kv-host-cache-bytes"):
        HostTier(1 << 40, BLOCK_BYTES)


# ---- demotion -------------------------------------------------------------------------------


def test_demotions_make_room_before_the_store(tmp_path: Path) -> None:
    host, disk = HostTier(1, BLOCK_BYTES), disk_at(tmp_path)
    tiers = Tiers({"host": host, "disk": disk}, BLOCK_BYTES)
    assert tiers.store("host", [(key(1), block(1))]) == ([True], [])
    down = [Demotion(key(1), "host", "disk"), Demotion(key(7), "disk", None)]
    assert tiers.store("host", [(key(2), block(2))], down) == ([True], [True, True])
    assert loads(host, 2) and loads(disk, 1) and not loads(host, 1)
    lost = [Demotion(key(5), "host", "disk")]
    assert tiers.store("host", [(key(3), block(3))], lost) == ([False], [False])
    assert tiers.load("store", [(key(3), block(3))]) == [False], "no such tier"
    tiers.close()


# ---- a disk that fails ----------------------------------------------------------------------


def the_file(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def overwrite(folder: Path, number: int, offset: int, data: bytes) -> None:
    """Into the block of `number` (its header included), wherever in the file it is."""
    content = the_file(folder).read_bytes()
    start = content.index(key(number), 4096)
    with the_file(folder).open("r+b") as file:
        file.seek(start + offset)
        file.write(data)


def test_a_flipped_bit_is_a_miss_and_the_slot_is_used_again(tmp_path: Path) -> None:
    disk = disk_at(tmp_path)
    store(disk, 1, 2, 3, 4)
    flipped = bytes([block(1)[100] ^ 1])
    overwrite(tmp_path, 1, HEADER_BYTES + 100, flipped)
    overwrite(tmp_path, 2, 3, b"\xff")  # in the key
    assert not loads(disk, 1) and not loads(disk, 2) and loads(disk, 3)
    assert not loads(disk, 1), "spoilt once, gone for good"
    assert store(disk, 5, 1) == [True, True] and loads(disk, 1)
    disk.close()


def test_a_block_of_another_key_in_the_slot_is_a_miss(tmp_path: Path) -> None:
    disk = disk_at(tmp_path)
    store(disk, 1, 2)
    content = the_file(tmp_path).read_bytes()
    first, second = content.index(key(1), 4096), content.index(key(2), 4096)
    size = HEADER_BYTES + BLOCK_BYTES
    with the_file(tmp_path).open("r+b") as file:  # whole and unspoilt, but stale
        file.seek(first)
        file.write(content[second : second + size])
    assert not loads(disk, 1) and loads(disk, 2)
    disk.close()


def test_a_file_cut_short_is_all_misses_and_then_no_tier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = disk_at(tmp_path, 32)
    store(disk, *range(32))
    os.truncate(the_file(tmp_path), 0)
    with caplog.at_level(logging.WARNING):
        assert not any(loads(disk, n) for n in range(32))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # first and last
    assert "used no more" in caplog.text
    assert store(disk, 40) == [False]
    disk.close()


def test_a_disk_that_fills_up_while_in_use(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for the full disk: a write beyond it fails."""
    disk = disk_at(tmp_path, 64)
    store(disk, 1)
    os.truncate(the_file(tmp_path), 32 << 10)  # what was preallocated is no more
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, limits[1]))
    try:
        results = [store(disk, n)[0] for n in range(2, 40)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert results[0] and not any(results[-MAX_FAILURES_IN_A_ROW:])
    disk.close()


def test_a_disk_without_room_at_the_start_is_no_tier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, limits[1]))
    try:
        disk = disk_at(tmp_path, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert disk.num_blocks == 0 and "no room" in caplog.text
    assert store(disk, 1) == [False] and not loads(disk, 1)
    disk.close()


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--kv-disk-path"):
        disk_at(tmp_path / "file")


# ---- another life ---------------------------------------------------------------------------


def test_a_restart_finds_the_blocks_oldest_first(tmp_path: Path) -> None:
    disk = disk_at(tmp_path)
    store(disk, 3, 1, 2)
    disk.drop(key(3))
    store(disk, 4)
    disk.close()
    again = disk_at(tmp_path)
    assert again.recovered == [key(1), key(2), key(4)]
    assert loads(again, 1) and loads(again, 4) and not loads(again, 3)
    assert store(again, 5, 6) == [True, False]
    again.close()
    assert disk_at(tmp_path).recovered == [key(1), key(2), key(4), key(5)]


@pytest.mark.parametrize("change", ["digest", "blocks", "garbage"])
def test_what_does_not_fit_is_not_taken_over(tmp_path: Path, change: str) -> None:
    disk = disk_at(tmp_path)
    store(disk, 1, 2)
    disk.close()
    if change == "garbage":
        size = the_file(tmp_path).stat().st_size
        the_file(tmp_path).write_bytes(np.random.default_rng(0).bytes(size))
    again = disk_at(
        tmp_path, 5 if change == "blocks" else 4, b"x" * 32 if change == "digest" else DIGEST
    )
    assert again.recovered == [] and not loads(again, 1)
    assert store(again, 1, 3) == [True, True]
    again.close()


def test_spoilt_blocks_of_another_life_are_misses(tmp_path: Path) -> None:
    disk = disk_at(tmp_path)
    store(disk, 1, 2, 3)
    disk.close()
    overwrite(tmp_path, 1, HEADER_BYTES + 7, bytes([block(1)[7] ^ 128]))  # seen when it is read
    overwrite(tmp_path, 2, 20, b"\xff\xff")  # seen at once
    again = disk_at(tmp_path)
    assert again.recovered == [key(1), key(3)]
    assert not loads(again, 1) and loads(again, 3)
    again.close()


def test_two_processes_of_one_name_do_not_share_a_file(tmp_path: Path) -> None:
    first, second = disk_at(tmp_path), disk_at(tmp_path)
    store(first, 1)
    store(second, 2)
    assert not loads(second, 1) and not loads(first, 2) and loads(second, 2)
    assert len(list(tmp_path.iterdir())) == 1, "the second file has no name"
    second.close()
    first.close()


def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    disk_at(tmp_path).close()
    assert the_file(tmp_path).stat().st_mode & 0o077 == 0


# ---- from flags -----------------------------------------------------------------------------

LAYOUT = kv_layout(2, 1, 8, "float32")


def test_tiers_of_a_configuration(tmp_path: Path) -> None:
    config = TierConfig(LAYOUT.block_bytes * 3, LAYOUT.block_bytes * 5 + 1, str(tmp_path))
    tiers, index = open_tiers(config, LAYOUT, "model", "engine-0")
    assert index.tiers == ["host", "disk"]
    assert [index.stats[t].capacity for t in index.tiers] == [3, 5]
    source = np.arange(LAYOUT.block_bytes, dtype=np.uint32).astype(np.uint8)
    assert tiers.store("disk", [(key(1), source)])[0] == [True]
    tiers.close()
    tiers, index = open_tiers(config, LAYOUT, "model", "engine-0")
    assert index.match([key(1)]) == ["disk"]
    tiers.close()
    tiers, index = open_tiers(config, LAYOUT, "another model", "engine-0")
    assert index.match([key(1)]) == []
    tiers.close()


def test_no_flags_no_tiers() -> None:
    tiers, index = open_tiers(TierConfig(), LAYOUT, "model", "engine-0")
    assert not index.enabled
    tiers.close()


@pytest.mark.parametrize(
    "config",
    [
        TierConfig(host_cache_bytes=1),
        TierConfig(disk_cache_bytes=1 << 20),
        TierConfig(disk_path="/tmp"),
        TierConfig(store="redis://host:1"),
        TierConfig(store="mooncake://host:port"),
        TierConfig(store="mooncake://host:1?segment_bytes=x"),
        TierConfig(store="mooncake://host:1?speed=fast"),
    ],
)
def test_settings_that_cannot_work(config: TierConfig) -> None:
    with pytest.raises(ConfigError, match="--kv-"):
        open_tiers(config, LAYOUT, "model", "engine-0")
