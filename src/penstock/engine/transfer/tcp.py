"""Blocks over TCP: a server straight from the pool, and a receiver straight into it.

A connection that leaves the host is sealed first (`seal.py`). Frames, little-endian. Both sides
greet with a nonce and prove with an HMAC over the two that they know the cluster's secret (one on
the same host may go without); then the server says what its pool is. A request is 32 bytes; any
number may be on their way, and they are answered in order:

    request   operation, block, generation, key
    head      the request's number, status, length
    bytes     of the block, straight from the pool (operation BLOCK only)
    tail      status again, now that the bytes have been read, and their checksum

The checksum is xxh3-64 with a seed made of (block, generation, key): bytes of another block, of
another time, or of another question do not pass, whoever sent them. It finds what is spoilt, not
what is forged: that is what the seal is for, and who has the secret is trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from penstock.engine.transfer import seal
from penstock.protocol.errors import ConfigError
from penstock.protocol.kv import BlockHandle

BLOCK, CHECKSUM = 1, 2
OK, STALE, REFUSED = 0, 1, 2

MAGIC = b"PNSTKV01"
_NONCE_BYTES = 32
_MAC_BYTES = 32
GREETING = struct.Struct(f"<8s{_NONCE_BYTES}s")
#: incarnation, blocks, bytes of a block.
WELCOME = struct.Struct("<QQQ")
REQUEST = struct.Struct("<BxxxIQ16s")
HEAD = struct.Struct("<III")
TAIL = struct.Struct("<IQ")

#: Whoever makes no progress for this long is given up.
STALL_S = 2.0
#: And whoever makes so little that a transfer as a whole is slower than this.
_SLOWEST_BYTES_S = 4 << 20
#: Requests on their way: enough to keep the server busy, few enough to fit any socket's buffer.
_AHEAD = 64
#: A sealed write returns only when all of it is gone: in parts, for the sake of the bounds.
_SEALED_PART_BYTES = 256 << 10
_NUMBERS = 1 << 32

Bytes = npt.NDArray[np.uint8]


class TransferFailed(Exception):
    """The connection is of no further use; one line says why."""


def checksum(data: Bytes, handle: BlockHandle) -> int:
    """xxh3-64 of a block's bytes, bound to what was asked for."""
    return checksum_of(data, handle.block, handle.generation, handle.key)


def checksum_of(data: Bytes, block: int, generation: int, key: bytes) -> int:
    seed = xxhash.xxh3_64_intdigest(REQUEST.pack(BLOCK, block, generation, key))
    return xxhash.xxh3_64_intdigest(data.data, seed=seed)


def proof(
    secret: bytes, role: bytes, server_nonce: bytes, client_nonce: bytes, binding: bytes = b""
) -> bytes:
    """That one knows the secret; for each role and connection another one. `binding`: see
    `seal.binding`."""
    return hmac.digest(secret, role + server_nonce + client_nonce + binding, hashlib.sha256)


@dataclass(frozen=True, slots=True)
class Progress:
    """How long a peer may take: never so long without a byte, nor so long altogether."""

    deadline_s: float
    stall_s: float = STALL_S

    @classmethod
    def of(cls, num_bytes: int) -> Progress:
        return cls(time.monotonic() + STALL_S + num_bytes / _SLOWEST_BYTES_S)

    def apply(self, connection: socket.socket) -> None:
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TransferFailed("the peer is too slow")
        connection.settimeout(min(self.stall_s, left_s))


def receive_into(connection: socket.socket, into: memoryview, progress: Progress) -> None:
    """Fill `into`. Raises `TransferFailed`."""
    while len(into):
        progress.apply(connection)
        try:
            taken = connection.recv_into(into)
        except TimeoutError:
            raise TransferFailed(f"nothing came for {progress.stall_s:g} s") from None
        except OSError as exc:
            raise TransferFailed(f"the connection broke: {exc.strerror or exc}") from exc
        if not taken:
            raise TransferFailed("the peer has closed the connection")
        into = into[taken:]


def receive(connection: socket.socket, num_bytes: int, progress: Progress) -> bytes:
    into = bytearray(num_bytes)
    receive_into(connection, memoryview(into), progress)
    return bytes(into)


def send(connection: socket.socket, parts: list[memoryview], progress: Progress) -> None:
    """Send all of `parts` without joining them. Raises `TransferFailed`."""
    while parts:
        progress.apply(connection)
        try:
            if isinstance(connection, ssl.SSLSocket):
                sent = connection.send(parts[0][:_SEALED_PART_BYTES])
            else:
                sent = connection.sendmsg(parts)
        except TimeoutError:
            raise TransferFailed(f"nothing was taken for {progress.stall_s:g} s") from None
        except OSError as exc:
            raise TransferFailed(f"the connection broke: {exc.strerror or exc}") from exc
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][sent:]


def shake_hands(connection: socket.socket, progress: Progress) -> bytes:
    """Where it is sealed; what proofs must cover then. Raises `TransferFailed`."""
    try:
        if isinstance(connection, ssl.SSLSocket):
            progress.apply(connection)
            connection.do_handshake()
        return seal.binding(connection)
    except (OSError, ValueError) as exc:
        raise TransferFailed(f"the two sides cannot seal their connection: {exc}") from exc


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """`tcp://host:port`. Raises `TransferFailed`."""
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise TransferFailed(f"{endpoint!r} is no endpoint: tcp://host:port")
    return host.strip("[]"), int(port)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the other side's pool must be."""

    incarnation: int
    block_bytes: int


class Connection:
    """To one peer's block server; for one thread at a time."""

    def __init__(
        self,
        endpoint: str,
        expected: Expected,
        secret: bytes = b"",
        is_sealed: Callable[[socket.socket], bool] = seal.leaves_host,
    ) -> None:
        """Connect and greet. Raises `TransferFailed`."""
        self.endpoint = endpoint
        self._block_bytes = expected.block_bytes
        self._number = 0
        progress = Progress.of(0)
        try:
            self._socket = socket.create_connection(parse_endpoint(endpoint), timeout=STALL_S)
        except OSError as exc:
            raise TransferFailed(f"{endpoint}: {exc.strerror or exc}") from exc
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if is_sealed(self._socket):
                self._seal(secret)
            self._greet(expected, secret, progress)
        except BaseException:
            self._socket.close()
            raise

    def _seal(self, secret: bytes) -> None:
        if not secret:
            raise TransferFailed(f"{self.endpoint} is on another host: a cluster secret is needed")
        try:
            self._socket = seal.wrap(self._socket, server=False)
        except (OSError, ConfigError) as exc:
            raise TransferFailed(f"{self.endpoint}: {exc}") from exc

    def _greet(self, expected: Expected, secret: bytes, progress: Progress) -> None:
        binding = shake_hands(self._socket, progress)
        greeting = receive(self._socket, GREETING.size, progress)
        magic, theirs = GREETING.unpack(greeting)
        if magic != MAGIC:
            raise TransferFailed(f"{self.endpoint} is no block server")
        ours = os.urandom(_NONCE_BYTES)
        answer = GREETING.pack(MAGIC, ours) + proof(secret, b"receiver", theirs, ours, binding)
        send(self._socket, [memoryview(answer)], progress)
        mac = receive(self._socket, _MAC_BYTES, progress)
        if not hmac.compare_digest(mac, proof(secret, b"owner", theirs, ours, binding)):
            raise TransferFailed(f"{self.endpoint} does not know the cluster's secret")
        welcome = receive(self._socket, WELCOME.size, progress)
        incarnation, _, block_bytes = WELCOME.unpack(welcome)
        if Expected(incarnation, block_bytes) != expected:
            raise TransferFailed(
                f"{self.endpoint} has incarnation {incarnation} and blocks of {block_bytes} bytes, "
                f"not {expected.incarnation} and {expected.block_bytes}"
            )

    def fetch(self, blocks: list[tuple[BlockHandle, Bytes]], came: list[bool]) -> None:
        """Fill each destination; came[i] is set once it is whole and unspoilt. Where it is not, the
        destination holds anything. Raises `TransferFailed`: then those not set did not come."""
        handles = [handle for handle, _ in blocks]
        num_bytes = len(blocks) * self._block_bytes
        for i, progress in self._answers(BLOCK, handles, num_bytes):
            handle, into = blocks[i]
            receive_into(self._socket, into.data, progress)
            status, expected = TAIL.unpack(receive(self._socket, TAIL.size, progress))
            came[i] = status == OK and checksum(into, handle) == expected

    def checksums(self, handles: list[BlockHandle]) -> list[int | None]:
        """Of the peer's blocks as they are now; None for those that are not what they were."""
        found: list[int | None] = [None] * len(handles)
        for i, progress in self._answers(CHECKSUM, handles, 0):
            status, value = TAIL.unpack(receive(self._socket, TAIL.size, progress))
            found[i] = value if status == OK else None
        return found

    def _answers(
        self, operation: int, handles: list[BlockHandle], num_bytes: int
    ) -> Iterator[tuple[int, Progress]]:
        """Ask for all, some ahead. Yields the place of each that the owner still has, whose bytes
        (if any) and tail are to be read now."""
        progress = Progress.of(num_bytes)
        first, asked = self._number, 0
        for i in range(len(handles)):
            if asked < min(i + _AHEAD // 2, len(handles)):
                ahead = handles[asked : i + _AHEAD]
                requests = [REQUEST.pack(operation, h.block, h.generation, h.key) for h in ahead]
                send(self._socket, [memoryview(b"".join(requests))], progress)
                asked += len(ahead)
            head = receive(self._socket, HEAD.size, progress)
            number, status, length = HEAD.unpack(head)
            expected = self._block_bytes if operation == BLOCK and status == OK else 0
            if (number, length) != ((first + i) % _NUMBERS, expected):
                raise TransferFailed("the peer answers what was not asked")
            self._number = (first + i + 1) % _NUMBERS
            if status == OK:
                yield i, progress

    def is_quiet(self) -> bool:
        """Nothing has come that was not asked for, nor the end: it may be used again."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return False
        self._socket.settimeout(0.0)
        try:
            socket.socket.recv(self._socket, 1, socket.MSG_PEEK)  # what is below a seal counts too
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        return False

    def cut(self) -> None:
        """From any thread: whoever waits for the peer stops waiting, and may then close it."""
        with contextlib.suppress(OSError):
            seal.cut(self._socket)

    def close(self) -> None:
        self.cut()
        self._socket.close()
