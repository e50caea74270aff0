"""Pages of one host's instances, seen by each other: the header beside a pool, and how a peer gets
hold of both.

The header is a file without a name (memfd), written by the pool's owner only: what the pool is, and
for each block a generation word and a count of its holders. A peer asks for the two descriptors at
an abstract Unix socket, whose name is in the endpoint, and gets copies that are open for reading
only (SCM_RIGHTS).

Why a socket, of the ways to reach another process's descriptor: `/proc/<pid>/fd` and `pidfd_getfd`
want a process id that both sides mean alike (containers have their own) and the right to trace the
other (which security modules take away, from siblings first), and they hand out whatever descriptor
has that number by now. A socket needs none of this; the owner decides what it gives, each side
learns the other's user id from the kernel, and an abstract name leaves nothing behind when a
process is killed. Its scope is the network namespace, which is therefore part of `host_id`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

Generations = npt.NDArray[np.uint64]
Holders = npt.NDArray[np.uint32]

_MAGIC = b"PENSTOCK"
_VERSION = 1
#: magic, version, layout digest, incarnation, blocks, bytes from one block to the next.
_HEAD = struct.Struct("<8sI16sxxxxQQQ")
#: Where the generation words begin; the holders' counts follow them.
_TABLES_AT = 4096
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid, as SO_PEERCRED has them
_TIMEOUT_S = 2.0
#: Others wait behind it, and what waits for 2 s is given up.
_ATTACH_TIMEOUT_S = 1.0
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@dataclass(frozen=True, slots=True)
class PoolIdentity:
    """What a peer must agree on before it reads a page."""

    layout_digest: str
    incarnation: int
    num_blocks: int
    block_stride_bytes: int

    def pack(self) -> bytes:
        digest = self.layout_digest.encode()
        return _HEAD.pack(
            _MAGIC, _VERSION, digest, self.incarnation, self.num_blocks, self.block_stride_bytes
        )

    @property
    def header_bytes(self) -> int:
        return _TABLES_AT + self.num_blocks * (8 + 4)


def host_id() -> str:
    """Equal for two processes that can map each other's pages: the same boot of the same kernel,
    the same network namespace (which abstract sockets live in), and the same user."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    network = Path("/proc/self/ns/net").stat().st_ino
    return f"{boot_id}:{network}:{os.geteuid()}"


class CannotAttach(Exception):
    """Why a peer's pages cannot be had; one line."""


class PoolHeader:
    """The owner's side of the header. `generations` and `holders` are the scheduler's to write."""

    def __init__(self, identity: PoolIdentity) -> None:
        self.identity = identity
        self.fd = os.memfd_create("penstock-kv-header", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, identity.header_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, identity.header_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        head = identity.pack()
        self._map[: len(head)] = head
        self.generations, self.holders = _tables(self._map, identity.num_blocks)

    def close(self) -> None:
        """The arrays stay usable for whoever still has them."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class PageServer:
    """Hands out a pool and its header to processes of the same user, on a thread of its own."""

    def __init__(self, pool_fd: int, header: PoolHeader) -> None:
        self._stop = threading.Event()
        self._fds: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            for fd in (pool_fd, header.fd):
                read_only = f"/proc/self/fd/{fd}"
                self._fds.append(os.open(read_only, os.O_RDONLY | os.O_CLOEXEC))
            self.name = f"penstock-kv-{secrets.token_hex(8)}"
            self._listener.bind(f"\0{self.name}")
            self._listener.listen(16)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._serve, name="kv-pages", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"abstract:{self.name}"

    def close(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        with contextlib.suppress(OSError):  # wakes `accept`
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._release()

    def _release(self) -> None:
        self._listener.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                peer.settimeout(_TIMEOUT_S)
                if _uid(peer) == os.geteuid():
                    socket.send_fds(peer, [_MAGIC], self._fds)


class PeerPages:
    """A peer's pool and header, open for reading (`memory.windows.PeerPool`)."""

    def __init__(self, pool_fd: int, header_fd: int, expected: PoolIdentity) -> None:
        """Takes the pool's descriptor over; the header's is closed. Raises `CannotAttach`."""
        self.fd = pool_fd
        self.identity = expected
        try:
            found = _identity(header_fd)
            if found != expected:
                raise CannotAttach(f"its pool is {found}, not {expected}")
            _check_file(header_fd, expected.header_bytes)
            _check_file(pool_fd, expected.num_blocks * expected.block_stride_bytes)
            header = mmap.mmap(header_fd, expected.header_bytes, prot=mmap.PROT_READ)
        except BaseException:
            os.close(pool_fd)
            raise
        finally:
            os.close(header_fd)
        self.generations, self.holders = _tables(header, expected.num_blocks)

    def close(self) -> None:
        """Pages that are mapped stay so."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def attach(
    endpoint: str,
    *,
    incarnation: int,
    layout_digest: str,
    block_stride_bytes: int,
    timeout_s: float = _ATTACH_TIMEOUT_S,
) -> PeerPages:
    """The pages of the peer at `endpoint`, if they are what the caller was told of. Raises
    `CannotAttach`."""
    scheme, _, name = endpoint.partition(":")
    if scheme != "abstract" or not name:
        raise CannotAttach(f"{endpoint!r} is no place where pages are handed out")
    fds: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as peer:
            peer.settimeout(timeout_s)
            peer.connect(f"\0{name}")
            if (uid := _uid(peer)) != os.geteuid():
                raise CannotAttach(f"{endpoint} belongs to user {uid}")
            greeting, fds, _, _ = socket.recv_fds(peer, len(_MAGIC) + 1, 2)
        if greeting != _MAGIC or len(fds) != 2:
            raise CannotAttach(f"{endpoint} does not hand out its pages")
        found = _identity(fds[1])
        expected = PoolIdentity(layout_digest, incarnation, found.num_blocks, block_stride_bytes)
        pool_fd, header_fd = fds
        fds = []
        return PeerPages(pool_fd, header_fd, expected)
    except OSError as exc:
        raise CannotAttach(f"{endpoint}: {exc.strerror or exc}") from exc
    finally:
        for fd in fds:
            os.close(fd)


def _identity(header_fd: int) -> PoolIdentity:
    head = os.pread(header_fd, _HEAD.size, 0)
    if len(head) < _HEAD.size or head[: len(_MAGIC)] != _MAGIC:
        raise CannotAttach("its header is none")
    _, version, digest, incarnation, num_blocks, stride = _HEAD.unpack(head)
    if version != _VERSION:
        raise CannotAttach(f"its header has version {version}, ours {_VERSION}")
    if not 0 < num_blocks < 1 << 40:
        raise CannotAttach(f"its header speaks of {num_blocks} blocks")
    return PoolIdentity(digest.decode(errors="replace"), incarnation, num_blocks, stride)


def _check_file(fd: int, num_bytes: int) -> None:
    """A file that could become shorter than what is mapped of it would kill its reader."""
    if os.fstat(fd).st_size < num_bytes:
        raise CannotAttach("its pool or header is shorter than the header says")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise CannotAttach("its pool or header could be cut short at any moment")


def _tables(header: mmap.mmap, num_blocks: int) -> tuple[Generations, Holders]:
    generations = np.frombuffer(header, np.uint64, num_blocks, _TABLES_AT)
    holders = np.frombuffer(header, np.uint32, num_blocks, _TABLES_AT + 8 * num_blocks)
    return generations, holders


def _uid(peer: socket.socket) -> int:
    found = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(found)[1])
