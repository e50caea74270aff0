"""A shared store that misbehaves, behind the tier that stands before it."""

from __future__ import annotations

import ctypes
import logging
import threading

import numpy as np
import pytest

from penstock.engine.memory.tiers.data import Block
from penstock.engine.memory.tiers.store import ObjectStore, StoreConfig, StoreTier
from penstock.protocol.kv import KEY_BYTES

BLOCK_BYTES = 3000
CONFIG = StoreConfig("master", timeout_s=0.2, retry_s=0.0)


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def block(number: int) -> Block:
    return np.random.default_rng(number).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)


class FakeStore:
    """What `MooncakeDistributedStore` does with raw addresses, in a dict."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked = 0
        self.got = 0
        self.hang: threading.Event | None = None
        self.dead = False

    def register_buffer(self, address: int, size: int) -> int:
        return 0

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        self.asked += 1
        if self.hang is not None:
            self.hang.wait()
        return [-900 if self.dead else int(k in self.objects) for k in keys]

    def batch_put_from(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        for k, address, size in zip(keys, addresses, sizes):
            self.objects.setdefault(k, ctypes.string_at(address, size))
        return [-900 if self.dead else 0] * len(keys)

    def batch_get_into(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        found = []
        for k, address, size in zip(keys, addresses, sizes):
            data = self.objects.get(k)
            self.got += 1
            if data is None:
                found.append(-704)
            elif len(data) > size:
                found.append(-600)
            else:
                ctypes.memmove(address, data, len(data))
                found.append(len(data))
        return found

    def remove(self, key: str) -> int:
        self.objects.pop(key, None)
        return 0

    def close(self) -> int:
        return 0


def tier_over(fake: FakeStore, namespace: str = "n", config: StoreConfig = CONFIG) -> StoreTier:
    def connect(_: StoreConfig) -> ObjectStore:
        return fake

    return StoreTier(config, BLOCK_BYTES, namespace, connect)


def load(tier: StoreTier, *numbers: int) -> list[bool]:
    destinations = [np.zeros(BLOCK_BYTES, np.uint8) for _ in numbers]
    ok = tier.load([(key(n), d) for n, d in zip(numbers, destinations)])
    for number, destination, there in zip(numbers, destinations, ok):
        assert not there or (destination == block(number)).all(), "wrong bytes"
    return ok


def store(tier: StoreTier, *numbers: int) -> list[bool]:
    return tier.store([(key(n), block(n)) for n in numbers])


def test_more_blocks_than_are_staged_at_once() -> None:
    tier = tier_over(FakeStore())
    assert all(store(tier, *range(150)))
    assert load(tier, *range(150)) == [True] * 150


def test_behind_a_miss_nothing_is_moved() -> None:
    fake = FakeStore()
    tier = tier_over(fake)
    store(tier, 1, 2, 4, 5)
    assert load(tier, 1, 2, 3, 4, 5) == [True, True, False, False, False]
    assert fake.got == 2
    assert load(tier, 9, 1) == [False, False] and fake.got == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "short", "long", "bit of the block", "bit of the key", "zeros"],
)  # fmt: skip
def test_whatever_is_not_the_block_is_a_miss(spoil) -> None:  # type: ignore[no-untyped-def]
    fake = FakeStore()
    tier = tier_over(fake)
    store(tier, 1, 2)
    first = next(iter(fake.objects))
    fake.objects[first] = spoil(fake.objects[first])
    assert load(tier, 1) == [False]
    assert load(tier, 2) == [True]


def test_a_spoilt_object_is_removed_so_that_a_whole_one_can_be_put() -> None:
    fake = FakeStore()
    tier = tier_over(fake)
    store(tier, 1)
    name = next(iter(fake.objects))
    fake.objects[name] = fake.objects[name][:-1] + b"\0\0"[:1]
    if load(tier, 1) == [True]:  # it was a zero before
        fake.objects[name] = fake.objects[name][:-1] + b"\1"
        assert load(tier, 1) == [False]
    assert store(tier, 1) == [True] and load(tier, 1) == [True]


def test_models_and_layouts_do_not_see_each_others_blocks() -> None:
    fake = FakeStore()
    store(tier_over(fake, "a"), 1)
    assert load(tier_over(fake, "b"), 1) == [False]
    assert load(tier_over(fake, "a"), 1) == [True]


def test_a_store_that_hangs_is_a_miss_and_is_not_waited_for_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = FakeStore()
    tier = tier_over(fake)
    store(tier, 1)
    fake.hang = threading.Event()
    with caplog.at_level(logging.INFO):
        assert load(tier, 1) == [False]
        asked = fake.asked
        assert load(tier, 1) == [False] and store(tier, 2) == [False]
        assert fake.asked == asked, "it was asked although its last answer is still due"
        assert "away" in caplog.text
        fake.hang.set()
        fake.hang = None
        while tier._worker.busy:
            threading.Event().wait(0.01)
        assert load(tier, 1) == [True]
        assert "there again" in caplog.text
    tier.close()


def test_a_master_that_is_gone_is_left_alone_for_a_while() -> None:
    fake = FakeStore()
    tier = tier_over(fake, config=StoreConfig("master", retry_s=3600.0))
    store(tier, 1)
    fake.dead = True
    assert load(tier, 1) == [False]
    asked = fake.asked
    assert load(tier, 1) == [False] and store(tier, 2) == [False] and fake.asked == asked


def test_a_master_that_is_not_there_at_the_start_is_tried_again() -> None:
    fake, up = FakeStore(), []

    def connect(_: StoreConfig) -> ObjectStore:
        if not up:
            raise ConnectionRefusedError("nobody listens")
        return fake

    tier = StoreTier(CONFIG, BLOCK_BYTES, "n", connect)
    assert store(tier, 1) == [False]
    up.append(True)
    assert store(tier, 1) == [True] and load(tier, 1) == [True]


def test_urls() -> None:
    assert StoreConfig.parse("mooncake://m:7") == StoreConfig("m", 7)
    assert StoreConfig.parse("mooncake://10.0.0.1") == StoreConfig("10.0.0.1", 50051)
    url = "mooncake://m:7?segment_bytes=1024&protocol=rdma&device=mlx5_0&host=a"
    assert StoreConfig.parse(url) == StoreConfig("m", 7, 1024, "rdma", "mlx5_0", "a")
