"""Copies of KV share the links of those who send and of those who receive."""

from __future__ import annotations

import random

import pytest

from penstock.engine.transfer.jobs import Import, Incoming, Moved, Peer, Store
from penstock.protocol.kv import BlockHandle, Tier
from penstock.simulator.data_plane import DataFaults, SimulatedDataPlane
from penstock.simulator.events import Events
from penstock.simulator.kv import KvMemory

BLOCK_S, LATENCY_S = 0.001, 0.01


def ends(copies: list[tuple[str, str, int]]) -> list[float]:
    """When copies (from, to, blocks) that all begin at 0 s end."""
    memories = {name: KvMemory(64, 16) for name in "abcd"}
    events = Events()
    faults = DataFaults(latency_s=LATENCY_S, block_s=BLOCK_S)
    planes = {
        name: SimulatedDataPlane(
            memory, faults, random.Random(1), events.at, lambda: events.now, memories.get, 1
        )
        for name, memory in memories.items()
    }
    found = [0.0] * len(copies)
    for number, (source, target, count) in enumerate(copies):
        blocks = tuple(Incoming(BlockHandle(i, 0, bytes(16)), i) for i in range(count))

        def done(moved: Moved, number: int = number) -> None:
            assert all(moved.ok)
            found[number] = events.now

        planes[target].start(Import(number, Peer(source, 1, "tcp", source), blocks), done)
    events.run(10.0)
    return found


def test_one_copy_takes_the_links_rate() -> None:
    assert ends([("a", "b", 20)]) == [pytest.approx(0.02 + LATENCY_S)]


def test_copies_to_one_receiver_and_from_one_sender_come_one_after_the_other() -> None:
    expected = [pytest.approx(0.02 + LATENCY_S), pytest.approx(0.03 + LATENCY_S)]
    assert ends([("a", "d", 20), ("b", "d", 10)]) == expected
    assert ends([("a", "b", 20), ("a", "c", 10)]) == expected


def test_others_do_not_wait() -> None:
    assert ends([("a", "b", 20), ("c", "d", 20)]) == [pytest.approx(0.02 + LATENCY_S)] * 2


def test_each_tier_has_a_rate_of_its_own_and_its_jobs_share_it() -> None:
    events, memory, found = Events(), KvMemory(64, 16), dict[int, float]()
    faults = DataFaults(LATENCY_S, BLOCK_S, host_block_s=BLOCK_S / 2, disk_block_s=4 * BLOCK_S)
    plane = SimulatedDataPlane(
        memory, faults, random.Random(1), events.at, lambda: events.now, lambda _: None, 1
    )

    def done(moved: Moved) -> None:
        assert all(moved.ok)
        found[moved.number] = events.now

    tiers: list[Tier] = ["host", "disk", "store", "disk"]
    for number, tier in enumerate(tiers):
        blocks = tuple((bytes([number, i] * 8), i) for i in range(10))
        plane.start(Store(number, tier, blocks), done)
    events.run(10.0)
    wanted_s = [0.005, 0.04, 0.01, 0.08]
    assert [found[n] for n in range(4)] == [pytest.approx(s + LATENCY_S) for s in wanted_s]
