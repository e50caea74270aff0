"""Blocks that leave the host: nobody on the way reads, changes or repeats them, or takes part."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from penstock.engine.transfer import seal, tcp
from penstock.engine.transfer.server import BlockServer, Served
from penstock.engine.transfer.tcp import Connection, Expected, TransferFailed
from penstock.protocol.kv import BlockHandle

BLOCK_BYTES = 300_000
SECRET = b"the cluster's own secret"
EXPECTED = Expected(incarnation=7, block_bytes=BLOCK_BYTES)
POOL = np.random.default_rng(1).integers(0, 256, (8, BLOCK_BYTES)).astype(np.uint8)
HANDLES = [BlockHandle(block, 5, b"k" * 16) for block in range(8)]


def always(_: socket.socket) -> bool:
    return True


def never(_: socket.socket) -> bool:
    return False


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "STALL_S", 1.0)
    monkeypatch.setattr(tcp.Progress.__init__, "__defaults__", (1.0,))


@contextmanager
def serving(
    secret: bytes = SECRET, is_sealed: Callable[[socket.socket], bool] = always
) -> Iterator[str]:
    served = Served(
        POOL.__getitem__, np.full(8, 5, np.uint64), 7, BLOCK_BYTES, lambda block: b"k" * 16
    )
    server = BlockServer(served, secret=secret, is_sealed=is_sealed)
    yield server.endpoint
    server.close()


def fetch(connection: Connection) -> tuple[np.ndarray, list[bool]]:
    into, came = np.zeros_like(POOL), [False] * len(HANDLES)
    with contextlib.suppress(TransferFailed):
        connection.fetch(list(zip(HANDLES, into)), came)
    return into, came


Change = Callable[[int, bytes], bytes]


@contextmanager
def in_the_middle(endpoint: str, change: Change) -> Iterator[tuple[str, bytearray]]:
    """Passes bytes on; `change(number of bytes before, bytes)` from the owner to the receiver. Also
    all that the owner sent, as somebody on the way sees it."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen = bytearray()
    sockets: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket, backward: bool) -> None:
        done = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if backward:
                    seen.extend(data)
                    done, data = done + len(data), change(done, data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def run() -> None:
        near, _ = listener.accept()
        far = socket.create_connection(tcp.parse_endpoint(endpoint))
        sockets.extend((near, far))
        forward = threading.Thread(target=pump, args=(near, far, False))
        forward.start()
        pump(far, near, True)
        forward.join()

    thread = threading.Thread(target=run)
    thread.start()
    yield f"tcp://127.0.0.1:{listener.getsockname()[1]}", seen
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
    thread.join()
    for each in (*sockets, listener):
        each.close()


def unchanged(_: int, data: bytes) -> bytes:
    return data


def test_sealed_blocks_come_whole_and_a_connection_serves_again() -> None:
    with serving() as endpoint:
        connection = Connection(endpoint, EXPECTED, SECRET, always)
        for _ in range(3):
            into, came = fetch(connection)
            assert all(came) and (into == POOL).all()
            assert connection.is_quiet()
        expected = [tcp.checksum(POOL[h.block], h) for h in HANDLES]
        assert connection.checksums(HANDLES) == expected
        connection.close()


def test_who_listens_on_the_way_reads_nothing() -> None:
    pieces = [block[at : at + 32].tobytes() for block in POOL for at in (0, 5000, BLOCK_BYTES - 32)]
    for is_sealed in (never, always):
        with (
            serving(is_sealed=is_sealed) as endpoint,
            in_the_middle(endpoint, unchanged) as (middle, seen),
        ):
            connection = Connection(middle, EXPECTED, SECRET, is_sealed)
            assert all(fetch(connection)[1])
            connection.close()
        readable = [piece in seen for piece in pieces]
        assert not any(readable) if is_sealed is always else all(readable)


@pytest.mark.parametrize("at", [0, 700, 5_000, 250_000, 1_000_000])
def test_a_bit_flipped_on_the_way_ends_the_connection(at: int) -> None:
    """Also where a checksum made to fit could not tell."""

    def flip(before: int, data: bytes) -> bytes:
        if before <= at < before + len(data):
            spoilt = bytearray(data)
            spoilt[at - before] ^= 1
            return bytes(spoilt)
        return data

    with serving() as endpoint, in_the_middle(endpoint, flip) as (middle, _):
        try:
            connection = Connection(middle, EXPECTED, SECRET, always)
        except TransferFailed:
            return  # in the handshake
        into, came = fetch(connection)
        connection.close()
    assert not all(came)
    for block, ok, data in zip(POOL, came, into):
        assert not ok or (data == block).all()


def test_bytes_sent_twice_or_left_out_end_the_connection() -> None:
    def twice(before: int, data: bytes) -> bytes:
        return data * 2 if before > 100_000 else data

    def left_out(before: int, data: bytes) -> bytes:
        return b"" if 100_000 < before < 200_000 else data

    for change in (twice, left_out):
        with serving() as endpoint, in_the_middle(endpoint, change) as (middle, _):
            connection = Connection(middle, EXPECTED, SECRET, always)
            into, came = fetch(connection)
            connection.close()
        assert not all(came)
        assert all(not ok or (data == block).all() for block, ok, data in zip(POOL, came, into))


def test_yesterdays_conversation_cannot_be_said_again() -> None:
    with serving() as endpoint, in_the_middle(endpoint, unchanged) as (middle, seen):
        connection = Connection(middle, EXPECTED, SECRET, always)
        fetch(connection)
        connection.close()
    listener = socket.create_server(("127.0.0.1", 0))

    def say_again() -> None:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            peer.sendall(seen)
            peer.recv(1)

    thread = threading.Thread(target=say_again)
    thread.start()
    with pytest.raises(TransferFailed):
        Connection(f"tcp://127.0.0.1:{listener.getsockname()[1]}", EXPECTED, SECRET, always)
    thread.join()
    listener.close()


def test_somebody_in_the_middle_of_both_seals_is_found_out() -> None:
    """He seals with each side and passes on what they say inside: greetings, proofs and all."""
    listener = socket.create_server(("127.0.0.1", 0))
    passed: list[bytes] = []
    ends: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := source.recv(1 << 16):
                passed.append(data)
                sink.sendall(data)

    def run(endpoint: str) -> None:
        near = seal.wrap(listener.accept()[0], server=True)
        far = seal.wrap(socket.create_connection(tcp.parse_endpoint(endpoint)), server=False)
        ends.extend((near, far))
        near.do_handshake()
        far.do_handshake()
        other = threading.Thread(target=pump, args=(near, far))
        other.start()
        pump(far, near)
        other.join()

    with serving() as endpoint:
        thread = threading.Thread(target=run, args=(endpoint,))
        thread.start()
        with pytest.raises(TransferFailed):
            Connection(f"tcp://127.0.0.1:{listener.getsockname()[1]}", EXPECTED, SECRET, always)
        for each in ends:
            with contextlib.suppress(OSError):
                seal.cut(each)
        thread.join()
    for end in (*ends, listener):
        end.close()
    # He heard both greetings, and neither the owner's proof nor what follows it.
    assert sum(map(len, passed)) == 2 * tcp.GREETING.size + 32


def test_another_secret_or_none() -> None:
    with serving() as endpoint:
        for secret in (b"another's", SECRET[:-1]):
            with pytest.raises(TransferFailed):
                Connection(endpoint, EXPECTED, secret, always)
        with pytest.raises(TransferFailed, match="a cluster secret is needed"):
            Connection(endpoint, EXPECTED, b"", always)
        Connection(endpoint, EXPECTED, SECRET, always).close()


@pytest.mark.parametrize("server, client", [(always, never), (never, always)])
def test_a_side_that_does_not_seal_gets_nothing(
    server: Callable[[socket.socket], bool], client: Callable[[socket.socket], bool]
) -> None:
    with serving(is_sealed=server) as endpoint:
        with pytest.raises(TransferFailed):
            Connection(endpoint, EXPECTED, SECRET, client)
        Connection(endpoint, EXPECTED, SECRET, server).close()


def test_a_weaker_or_older_seal_is_not_spoken() -> None:
    with serving() as endpoint:
        for version, suites in (
            (ssl.TLSVersion.TLSv1_2, "AECDH-NULL-SHA:AECDH-AES128-SHA:ADH-AES128-SHA:@SECLEVEL=0"),
            (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"),
        ):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with pytest.warns() if version < ssl.TLSVersion.TLSv1_2 else contextlib.nullcontext():
                context.minimum_version = context.maximum_version = version
            context.set_ciphers(suites)
            plain = socket.create_connection(tcp.parse_endpoint(endpoint), timeout=5)
            with plain, pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(plain)


def test_who_says_nothing_or_nonsense_to_a_sealed_server_is_cut_off() -> None:
    with serving() as endpoint:
        address = tcp.parse_endpoint(endpoint)
        silent = socket.create_connection(address, timeout=10)
        talker = socket.create_connection(address, timeout=10)
        talker.sendall(os.urandom(2000))
        for peer in (silent, talker):
            with contextlib.suppress(ConnectionError):
                while peer.recv(1 << 16):
                    pass
            peer.close()
        connection = Connection(endpoint, EXPECTED, SECRET, always)
        assert all(fetch(connection)[1])
        connection.close()


def test_a_peer_that_stops_in_the_middle_is_given_up() -> None:
    go_on = threading.Event()

    def stop(before: int, data: bytes) -> bytes:
        if before > 400_000:
            go_on.wait(30)
        return data

    with serving() as endpoint, in_the_middle(endpoint, stop) as (middle, _):
        connection = Connection(middle, EXPECTED, SECRET, always)
        with pytest.raises(TransferFailed, match="nothing came"):
            connection.fetch(list(zip(HANDLES, np.zeros_like(POOL))), [False] * 8)
        go_on.set()
        connection.close()


def test_who_waits_is_told_when_the_connection_is_cut() -> None:
    with serving() as endpoint:
        connection = Connection(endpoint, EXPECTED, SECRET, always)
        connection.cut()
        assert fetch(connection)[1] == [False] * 8
        connection.close()


@pytest.mark.parametrize(
    "ours, theirs, leaves",
    [
        ("127.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.2", False),
        ("10.0.0.5", "10.0.0.5", False),
        ("::1", "::1", False),
        ("fe80::1%eth0", "fe80::1%eth0", False),
        ("10.0.0.5", "10.0.0.6", True),
        ("127.0.0.1", "10.0.0.5", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_what_leaves_the_host(ours: str, theirs: str, leaves: bool) -> None:
    class Ends:
        def getsockname(self) -> tuple[str, int]:
            return ours, 1

        def getpeername(self) -> tuple[str, int]:
            return theirs, 2

    assert seal.leaves_host(Ends()) is leaves  # type: ignore[arg-type]
