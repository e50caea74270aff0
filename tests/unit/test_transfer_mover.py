"""The data plane by itself: jobs end once, whatever happens, and nothing runs after `close`."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.tiers.data import Tiers
from penstock.engine.memory.tiers.host import HostTier
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.transfer import tcp
from penstock.engine.transfer.jobs import (
    Abandon,
    Import,
    Incoming,
    Job,
    LetGo,
    Load,
    Moved,
    Peer,
    Store,
)
from penstock.engine.transfer.mover import DataPlane, MoverConfig
from penstock.engine.transfer.pages import PoolHeader, PoolIdentity
from penstock.protocol.kv import BlockHandle

LAYOUT = kv_layout(2, 2, 64, "float32")
NUM_BLOCKS = 16
KEY = b"k" * 16


class Node:
    def __init__(self, incarnation: int, **config: Any) -> None:
        self.memory = XTensorMemory(LAYOUT, NUM_BLOCKS, 2, 8)
        stride = self.memory.block_stride_bytes
        self.header = PoolHeader(PoolIdentity(LAYOUT.digest(), incarnation, NUM_BLOCKS, stride))
        tiers = Tiers({"host": HostTier(4, LAYOUT.block_bytes)}, LAYOUT.block_bytes)
        self.plane = DataPlane(self.memory, self.header, MoverConfig(**config), tiers)
        self.plane.offer(lambda block: KEY)
        self.incarnation = incarnation
        self.ended: SimpleQueue[Moved] = SimpleQueue()

    def run(self, job: Job) -> Moved:
        self.plane.start(job, self.ended.put)
        return self.ended.get(timeout=20)

    def peer(self, means: Any) -> Peer:
        return Peer("peer", self.incarnation, means, self.plane.endpoints[means])

    def close(self) -> None:
        self.plane.close()
        self.plane.close()
        self.memory.close()


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    made = Node(5), Node(6)
    made[0].memory.bytes[:] = np.arange(NUM_BLOCKS, dtype=np.uint8)[:, None]
    yield made
    for node in made:
        node.close()


def incoming(*pairs: tuple[int, int], generation: int = 0) -> tuple[Incoming, ...]:
    return tuple(Incoming(BlockHandle(there, generation, KEY), here) for there, here in pairs)


def test_pages_and_bytes_come_as_they_were_offered(nodes: tuple[Node, Node]) -> None:
    owner, ours = nodes
    owner.header.generations[3] = 1
    blocks = incoming((2, 16), (3, 17), (99, 18), (4, 19))
    moved = ours.run(Import(1, owner.peer("map"), blocks))
    assert moved.ok == (True, False, False, True) and moved.num_bytes == 0 and moved.reason
    ours.memory.map(0, 0, 19)
    assert (ours.memory.slot_blocks(0, 1)[0] == owner.memory.pool_blocks()[4]).all()
    moved = ours.run(Import(2, owner.peer("tcp"), incoming((2, 8), (3, 9))))
    assert moved.ok == (True, False) and moved.num_bytes == LAYOUT.block_bytes
    assert (ours.memory.bytes[8] == 2).all()


def test_window_ids_serve_again_as_soon_as_they_are_let_go(nodes: tuple[Node, Node]) -> None:
    owner, ours = nodes
    for number in range(50):
        there = number % NUM_BLOCKS
        assert ours.run(Import(number, owner.peer("map"), incoming((there, 16)))).ok == (True,)
        ours.memory.map(0, 0, 16)
        assert (
            ours.memory.slot_blocks(0, 1).view(-1)
            == owner.memory.pool_blocks()[there, 0, 0, 0, 0, 0]
        ).all()
        ours.memory.free_slot(0)
        ours.plane.start(LetGo((16,)), ours.ended.put)
    assert ours.ended.empty()


def test_the_wrong_peer_and_no_peer(nodes: tuple[Node, Node]) -> None:
    owner, ours = nodes
    for means in ("map", "tcp"):
        endpoint = owner.plane.endpoints[means]
        other = Peer("peer", 99, means, endpoint)  # type: ignore[arg-type]
        assert ours.run(Import(1, other, incoming((1, 16 if means == "map" else 1)))).ok == (False,)
        nowhere = Peer("peer", 5, means, "nowhere")  # type: ignore[arg-type]
        moved = ours.run(Import(2, nowhere, incoming((1, 17 if means == "map" else 1))))
        assert moved.ok == (False,) and moved.reason


def test_tiers_store_and_load(nodes: tuple[Node, Node]) -> None:
    node = nodes[0]
    assert node.run(Store(1, "host", ((KEY, 7),))).ok == (True,)
    assert node.run(Load(2, "host", ((KEY, 1), (b"x" * 16, 2)))).ok == (True, False)
    assert (node.memory.bytes[1] == 7).all()
    assert node.run(Load(3, "disk", ((KEY, 1),))).ok == (False,)


def test_closing_ends_what_waits_for_a_peer() -> None:
    node = Node(5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        for number in range(20):
            job = Import(number, Peer("peer", 1, "tcp", endpoint), incoming((1, 1)))
            node.plane.start(job, node.ended.put)
        began_s = time.monotonic()
        node.close()
        assert time.monotonic() - began_s < 10
    numbers = sorted(node.ended.get_nowait().number for _ in range(20))
    assert numbers == list(range(20))


@pytest.fixture
def silent() -> Iterator[Peer]:
    """It can be connected to, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Peer("silent", 9, "tcp", f"tcp://127.0.0.1:{listener.getsockname()[1]}")


def test_a_silent_peer_holds_up_nobody_else(
    nodes: tuple[Node, Node], silent: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the order in which jobs end: those of the silent peer come after all others."""
    owner, ours = nodes
    stall = threading.Event()
    connect = tcp.Connection.__init__

    def until_told(self: tcp.Connection, endpoint: str, *args: Any) -> None:
        if endpoint == silent.endpoint:
            assert stall.wait(20)
            raise tcp.TransferFailed("nothing came for 2 s")
        connect(self, endpoint, *args)

    monkeypatch.setattr(tcp.Connection, "__init__", until_told)
    for number in range(8):
        ours.plane.start(Import(number, silent, incoming((1, number))), ours.ended.put)
    for number in range(100, 110):
        there = number % NUM_BLOCKS
        moved = ours.run(Import(number, owner.peer("map"), incoming((there, 16))))
        assert (moved.number, moved.ok) == (number, (True,))
        moved = ours.run(Import(number, owner.peer("tcp"), incoming((there, 9))))
        assert (moved.number, moved.ok) == (number, (True,))
        ours.plane.start(LetGo((16,)), ours.ended.put)
    stall.set()
    ended = [ours.ended.get(timeout=20) for _ in range(8)]
    assert sorted(moved.number for moved in ended) == list(range(8))
    assert {moved.reason for moved in ended} == {"nothing came for 2 s"}


def test_what_is_queued_behind_a_failure_fails_with_it_and_what_comes_later_is_tried(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, ours = nodes
    peer, tried, stall = owner.peer("tcp"), [], threading.Event()
    connect = tcp.Connection.__init__

    def fails(self: tcp.Connection, *args: Any) -> None:
        tried.append(args)
        assert stall.wait(20)
        raise tcp.TransferFailed("it hangs")

    monkeypatch.setattr(tcp.Connection, "__init__", fails)
    for number in range(20):
        ours.plane.start(Import(number, peer, incoming((1, 1))), ours.ended.put)
    stall.set()
    ended = [ours.ended.get(timeout=20) for _ in range(20)]
    assert {(moved.ok, moved.reason) for moved in ended} == {((False,), "it hangs")}
    assert len(tried) <= 2 * 3  # those at work, and what they took before the first had failed
    monkeypatch.setattr(tcp.Connection, "__init__", connect)
    assert ours.run(Import(30, peer, incoming((1, 1)))).ok == (True,)


def test_jobs_that_nobody_waits_for_are_not_begun(
    nodes: tuple[Node, Node], silent: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = nodes
    tried, begun, stall = [], threading.Semaphore(0), threading.Event()

    def waits(self: tcp.Connection, *args: Any) -> None:
        tried.append(args)
        begun.release()
        assert stall.wait(20)
        raise RuntimeError("not the peer's fault, so that what is queued is tried")

    monkeypatch.setattr(tcp.Connection, "__init__", waits)
    for number in range(3):
        ours.plane.start(Import(number, silent, incoming((1, 1))), ours.ended.put)
        assert begun.acquire(timeout=20)
    for number in range(3, 9):
        ours.plane.start(Import(number, silent, incoming((1, 1))), ours.ended.put)
    ours.plane.start(Abandon((*range(8), 77)), ours.ended.put)
    stall.set()
    reasons = {
        moved.number: moved.reason for moved in (ours.ended.get(timeout=20) for _ in range(9))
    }
    assert len(tried) == 4 and "not the peer" in reasons[8]
    assert {reasons[number] for number in range(3, 8)} == {"nobody waits for it any more"}


def test_without_means_nothing_listens() -> None:
    node = Node(5, means=())
    assert node.plane.endpoints == {} and node.plane.means == {}
    node.close()
