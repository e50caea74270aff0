"""Blocks over TCP: what comes is what was asked for, or does not count; nobody waits for ever."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.engine.transfer import tcp
from penstock.engine.transfer.server import BlockServer, Served
from penstock.engine.transfer.tcp import Connection, Expected, TransferFailed
from penstock.protocol.errors import ConfigError
from penstock.protocol.kv import BlockHandle

BLOCK_BYTES = 40_000
EXPECTED = Expected(incarnation=7, block_bytes=BLOCK_BYTES)
KEY = b"k" * 16
SHARED: Any = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def key_of(block: int) -> bytes | None:
    return KEY


class Owner:
    """A pool of 100 blocks, served."""

    def __init__(self, secret: bytes = b"") -> None:
        rng = np.random.default_rng(0)
        self.pool = rng.integers(0, 256, (100, BLOCK_BYTES)).astype(np.uint8)
        self.generations = np.full(100, 5, np.uint64)
        served = Served(self.pool.__getitem__, self.generations, 7, BLOCK_BYTES, key_of)
        self.server = BlockServer(served, secret=secret)

    def handles(self, *blocks: int) -> list[BlockHandle]:
        return [BlockHandle(block, int(self.generations[block]), KEY) for block in blocks]


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.server.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "STALL_S", 0.3)
    monkeypatch.setattr(tcp.Progress.__init__, "__defaults__", (0.3,))


def fetch(connection: Connection, handles: list[BlockHandle]) -> tuple[np.ndarray, list[bool]]:
    into = np.zeros((len(handles), BLOCK_BYTES), np.uint8)
    came = [False] * len(handles)
    connection.fetch(list(zip(handles, into)), came)
    return into, came


def test_blocks_come_whole_and_in_order_and_a_connection_serves_again(owner: Owner) -> None:
    connection = Connection(owner.server.endpoint, EXPECTED)
    for blocks in ([3], list(range(99, -1, -1)), [5, 5, 5]):
        into, came = fetch(connection, owner.handles(*blocks))
        assert all(came) and (into == owner.pool[blocks]).all()
        assert connection.is_quiet()
    handles = owner.handles(0, 99)
    assert connection.checksums(handles) == [tcp.checksum(owner.pool[h.block], h) for h in handles]
    connection.close()


def test_a_block_that_has_moved_on_or_is_none_does_not_come(owner: Owner) -> None:
    connection = Connection(owner.server.endpoint, EXPECTED)
    handles = [*owner.handles(1, 2), BlockHandle(1 << 31, 5, KEY), *owner.handles(3)]
    owner.generations[2] += 1
    into, came = fetch(connection, handles)
    assert came == [True, False, False, True]
    assert (into[3] == owner.pool[3]).all() and not into[1].any()
    assert [value is None for value in connection.checksums(handles)] == [not ok for ok in came]
    connection.close()


def test_who_does_not_say_its_key_gets_no_block(owner: Owner) -> None:
    owner.server.close()
    named = {1: KEY, 2: b"another's" + bytes(7)}
    served = Served(owner.pool.__getitem__, owner.generations, 7, BLOCK_BYTES, named.get)
    server = BlockServer(served)
    connection = Connection(server.endpoint, EXPECTED)
    into, came = fetch(connection, owner.handles(1, 2, 3))
    assert came == [True, False, False] and not into[1:].any()
    assert [value is None for value in connection.checksums(owner.handles(1, 2, 3))] == [
        False, True, True,
    ]  # fmt: skip
    connection.close()
    server.close()


def test_a_block_taken_back_while_it_is_read_does_not_count() -> None:
    owner = Owner()

    def taken_back(block: int) -> np.ndarray:
        owner.generations[block] += 1
        return owner.pool[block]

    owner.server.close()
    served = Served(taken_back, owner.generations, 7, BLOCK_BYTES, key_of)
    server = BlockServer(served)
    connection = Connection(server.endpoint, EXPECTED)
    assert fetch(connection, owner.handles(1))[1] == [False]
    assert connection.checksums(owner.handles(2)) == [None]
    connection.close()
    server.close()


def test_partners_that_differ_part_at_once(owner: Owner) -> None:
    for other in (Expected(8, BLOCK_BYTES), Expected(7, BLOCK_BYTES + 1)):
        with pytest.raises(TransferFailed, match="incarnation 7 and blocks of 40000 bytes, not"):
            Connection(owner.server.endpoint, other)
    for endpoint in ("tcp://127.0.0.1:1", "tcp://127.0.0.1", "abstract:x", "tcp://:9", ""):
        with pytest.raises(TransferFailed):
            Connection(endpoint, EXPECTED)


def test_the_secret_is_asked_for_on_both_sides() -> None:
    owner = Owner(secret=b"the cluster's")
    Connection(owner.server.endpoint, EXPECTED, b"the cluster's").close()
    for secret in (b"", b"another's"):
        with pytest.raises(TransferFailed):
            Connection(owner.server.endpoint, EXPECTED, secret)
    owner.server.close()
    impostor = tcp.GREETING.pack(tcp.MAGIC, bytes(32)) + bytes(56)
    unknown = pytest.raises(TransferFailed, match="does not know the cluster's secret")
    with lying(lambda peer: peer.sendall(impostor)) as endpoint, unknown:
        Connection(endpoint, EXPECTED, b"the cluster's")


def test_other_hosts_are_let_in_with_a_secret_only() -> None:
    owner = Owner()
    owner.server.close()
    served = Served(owner.pool.__getitem__, owner.generations, 7, BLOCK_BYTES, key_of)
    with pytest.raises(ConfigError, match="only with a cluster secret"):
        BlockServer(served, "0.0.0.0")
    BlockServer(served, "0.0.0.0", b"secret").close()
    with pytest.raises(ConfigError, match="nothing can listen"):
        BlockServer(served, "192.0.2.1", b"secret")


# --- peers that lie --------------------------------------------------------------------------


@contextmanager
def lying(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does `answer` with its first connection and then nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            try:
                answer(peer)
            except OSError:
                pass
            done.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    done.set()
    thread.join()
    listener.close()


def greet(peer: socket.socket) -> None:
    nonce = bytes(32)
    peer.sendall(tcp.GREETING.pack(tcp.MAGIC, nonce))
    theirs = peer.recv(1000)[8:40]
    mac = tcp.proof(b"", b"owner", nonce, theirs)
    peer.sendall(mac + tcp.WELCOME.pack(7, 100, BLOCK_BYTES))


def good(number: int, data: bytes, handle: BlockHandle) -> bytes:
    value = tcp.checksum(np.frombuffer(data, np.uint8), handle)
    head = tcp.HEAD.pack(number, tcp.OK, len(data))
    return head + data + tcp.TAIL.pack(tcp.OK, value)


FIRST, SECOND = BlockHandle(1, 5, KEY), BlockHandle(2, 5, KEY)
DATA = os.urandom(BLOCK_BYTES)
TRUE = good(0, DATA, FIRST) + good(1, DATA, SECOND)


def answers(sent: bytes) -> list[bool]:
    """What comes of a peer that answers two requests with `sent`, whatever it raises."""

    def answer(peer: socket.socket) -> None:
        greet(peer)
        peer.sendall(sent)

    with lying(answer) as endpoint:
        connection = Connection(endpoint, EXPECTED)
        into, came = np.zeros((2, BLOCK_BYTES), np.uint8), [False, False]
        try:
            connection.fetch(list(zip([FIRST, SECOND], into)), came)
        except TransferFailed:
            pass
        connection.close()
    for data, ok in zip(into, came):
        assert not ok or data.tobytes() == DATA
    return came


def test_what_a_true_peer_sends_comes() -> None:
    assert answers(TRUE) == [True, True]


def test_a_flipped_bit_is_found() -> None:
    for at in (tcp.HEAD.size, tcp.HEAD.size + BLOCK_BYTES - 1):
        spoilt = bytearray(TRUE)
        spoilt[at] ^= 1
        assert answers(bytes(spoilt)) == [False, True]


def test_a_duplicate_or_another_block_is_not_taken_for_what_was_asked() -> None:
    assert answers(good(0, DATA, FIRST) * 2) == [True, False]
    assert answers(good(0, DATA, SECOND) + good(1, DATA, FIRST)) == [False, False]
    stale = BlockHandle(1, 4, KEY)
    assert answers(good(0, DATA, stale) + good(1, DATA, SECOND)) == [False, True]


def test_too_little_too_much_and_nothing() -> None:
    one = len(TRUE) // 2
    assert answers(TRUE[: one - 1]) == [False, False]
    assert answers(TRUE[: one + 100]) == [True, False]
    assert answers(b"") == [False, False]
    longer = DATA + b"x"
    assert answers(good(0, longer, FIRST)) == [False, False]


def test_what_was_not_asked_for_ends_a_connection() -> None:
    def answer(peer: socket.socket) -> None:
        greet(peer)
        peer.sendall(TRUE + b"more")

    with lying(answer) as endpoint:
        connection = Connection(endpoint, EXPECTED)
        assert fetch(connection, [FIRST, SECOND])[1] == [True, True]
        assert not connection.is_quiet()
        connection.close()


def test_a_peer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_SLOWEST_BYTES_S", 1 << 30)
    stop = threading.Event()

    def answer(peer: socket.socket) -> None:
        greet(peer)
        for byte in TRUE:
            if stop.wait(0.01):
                return
            peer.sendall(bytes([byte]))

    with lying(answer) as endpoint:
        connection = Connection(endpoint, EXPECTED)
        with pytest.raises(TransferFailed, match=r"too slow|nothing came"):
            fetch(connection, [FIRST])
        stop.set()
        connection.close()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, len(TRUE) - 1), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_whatever_is_spoilt_nothing_wrong_counts(flips: list[tuple[int, int]]) -> None:
    spoilt = bytearray(TRUE)
    for at, mask in flips:
        spoilt[at] ^= mask
    answers(bytes(spoilt))


# --- clients that lie ------------------------------------------------------------------------


def raw(owner: Owner) -> socket.socket:
    _, port = tcp.parse_endpoint(owner.server.endpoint)
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def well_greeted(owner: Owner) -> socket.socket:
    peer = raw(owner)
    theirs = peer.recv(1000)[8:]
    ours = bytes(32)
    peer.sendall(tcp.GREETING.pack(tcp.MAGIC, ours) + tcp.proof(b"", b"receiver", theirs, ours))
    assert len(peer.recv(1000)) > 32
    return peer


def is_closed(peer: socket.socket) -> bool:
    try:
        while peer.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    peer.close()
    return True


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(garbage=st.binary(min_size=1, max_size=300), greeted=st.booleans())
def test_garbage_never_hurts_the_server(owner: Owner, garbage: bytes, greeted: bool) -> None:
    peer = well_greeted(owner) if greeted else raw(owner)
    peer.sendall(garbage)
    with suppress(OSError):  # it may have been closed already
        peer.shutdown(socket.SHUT_WR)
    assert is_closed(peer)
    connection = Connection(owner.server.endpoint, EXPECTED)
    assert fetch(connection, owner.handles(4))[1] == [True]
    connection.close()


def test_who_says_nothing_or_reads_nothing_is_cut_off(owner: Owner) -> None:
    silent, deaf = raw(owner), well_greeted(owner)
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.sendall(tcp.REQUEST.pack(tcp.BLOCK, 1, 5, KEY) * 1000)
    threads = [t for t in threading.enumerate() if t.name == "kv-tcp-peer"]
    assert threads
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert is_closed(silent)
    deaf.close()


def test_no_more_connections_than_the_bound(owner: Owner) -> None:
    peers = [well_greeted(owner) for _ in range(64)]
    with pytest.raises(TransferFailed):
        Connection(owner.server.endpoint, EXPECTED)
    for peer in peers:
        peer.close()


def test_closing_leaves_nothing_behind() -> None:
    def open_now() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    before = open_now()
    owner = Owner()
    connection = Connection(owner.server.endpoint, EXPECTED)
    idle = raw(owner)
    fetch(connection, owner.handles(1))
    owner.server.close()
    owner.server.close()
    with pytest.raises(TransferFailed):
        fetch(connection, owner.handles(1))
    connection.close()
    idle.close()
    assert open_now() == before


def test_the_frames_are_what_the_docs_say() -> None:
    assert (tcp.REQUEST.size, tcp.HEAD.size, tcp.TAIL.size) == (32, 12, 12)
    assert struct.calcsize("<8s32s") == tcp.GREETING.size
