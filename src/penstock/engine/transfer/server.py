"""The block server of one instance: what peers read over TCP, straight from the pool.

A thread for each connection, few of them. Nothing that a peer does holds up compute: what it reads
is guarded by the generation word, before and after, and by the checksum, so a block that is taken
back while it is being sent is known to be spoilt on both sides. A block is given only to who says
its key, which nobody can who does not know the tokens in it: where there is no secret, a process
that finds the port cannot leaf through the pool.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.engine.memory.windows import loads_before_are_done
from penstock.engine.transfer import seal, tcp
from penstock.protocol.errors import ConfigError
from penstock.protocol.transport.base import stays_here

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 64
#: A connection nobody uses is closed; its owner connects again.
_IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class Served:
    """What is served. `generations` is live, uint64 [num_blocks]; `key_of` says what a block holds
    at this moment (None: nothing to be given) and is called from any thread."""

    block_bytes_of: Callable[[int], tcp.Bytes]
    generations: npt.NDArray[np.uint64]
    incarnation: int
    block_bytes: int
    key_of: Callable[[int], bytes | None]

    @property
    def num_blocks(self) -> int:
        return len(self.generations)

    def holds(self, block: int, generation: int, key: bytes) -> bool:
        return (
            block < self.num_blocks
            and int(self.generations[block]) == generation
            and self.key_of(block) == key
        )


class BlockServer:
    """Listens at once, at `host`; raises `ConfigError` for one that others can reach when there is
    no secret, or where nothing can listen. What leaves the host is sealed."""

    def __init__(
        self,
        served: Served,
        host: str = "127.0.0.1",
        secret: bytes = b"",
        is_sealed: Callable[[socket.socket], bool] = seal.leaves_host,
    ) -> None:
        if not stays_here(f"tcp://{host}:0"):
            if not secret:
                raise ConfigError(
                    f"{host} can be reached from other hosts: KV blocks are served there only with "
                    "a cluster secret"
                )
            seal.require()
        self._is_sealed = is_sealed
        self._served = served
        self._secret = secret
        self._stop = threading.Event()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._changes = threading.Lock()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._listener.bind((host, 0))
            self._listener.listen(_MAX_CONNECTIONS)
        except OSError as exc:
            self._listener.close()
            raise ConfigError(f"nothing can listen at {host}: {exc.strerror or exc}") from exc
        port = self._listener.getsockname()[1]
        self.endpoint = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        self._thread = threading.Thread(target=self._accept, name="kv-tcp", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when no thread reads the pool any more."""
        if self._stop.is_set():
            return
        self._stop.set()
        with contextlib.suppress(OSError):  # wakes `accept`
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with self._changes:
            open_now = dict(self._connections)
        for connection in open_now:
            with contextlib.suppress(OSError):
                seal.cut(connection)
        for thread in open_now.values():
            thread.join()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                plain, _ = self._listener.accept()
            except OSError:
                if self._stop.wait(0.1):  # else out of descriptors, or the peer was gone at once
                    return
                continue
            try:
                connection = seal.wrap(plain, server=True) if self._is_sealed(plain) else plain
            except OSError:  # the peer was gone at once
                plain.close()
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="kv-tcp-peer", daemon=True
            )
            with self._changes:
                if len(self._connections) >= _MAX_CONNECTIONS:
                    connection.close()
                    continue
                self._connections[connection] = thread
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._greet(connection):
                self._answer_all(connection)
        except (tcp.TransferFailed, OSError) as exc:
            if not self._stop.is_set():
                log.debug("a peer's connection ends: %s", exc)
        finally:
            with self._changes:
                del self._connections[connection]
            connection.close()

    def _greet(self, connection: socket.socket) -> bool:
        progress = tcp.Progress.of(0)
        binding = tcp.shake_hands(connection, progress)
        ours = os.urandom(32)
        tcp.send(connection, [memoryview(tcp.GREETING.pack(tcp.MAGIC, ours))], progress)
        greeting = tcp.receive(connection, tcp.GREETING.size + 32, progress)
        magic, theirs = tcp.GREETING.unpack(greeting[: tcp.GREETING.size])
        mac = greeting[tcp.GREETING.size :]
        expected = tcp.proof(self._secret, b"receiver", ours, theirs, binding)
        known = hmac.compare_digest(mac, expected)
        if magic != tcp.MAGIC or not known:
            log.warning("a peer without the cluster's secret was turned away")
            return False
        served = self._served
        answer = tcp.proof(self._secret, b"owner", ours, theirs, binding) + tcp.WELCOME.pack(
            served.incarnation, served.num_blocks, served.block_bytes
        )
        tcp.send(connection, [memoryview(answer)], progress)
        return True

    def _answer_all(self, connection: socket.socket) -> None:
        number = 0
        while not self._stop.is_set():
            waiting = tcp.Progress(time.monotonic() + _IDLE_S, _IDLE_S)
            first = tcp.receive(connection, 1, waiting)
            progress = tcp.Progress.of(self._served.block_bytes)
            rest = tcp.receive(connection, tcp.REQUEST.size - 1, progress)
            operation, block, generation, key = tcp.REQUEST.unpack(first + rest)
            if operation not in (tcp.BLOCK, tcp.CHECKSUM):
                raise tcp.TransferFailed(f"operation {operation} is not known")
            self._answer(connection, number, (operation, block, generation, key), progress)
            number = (number + 1) % (1 << 32)

    def _answer(
        self,
        connection: socket.socket,
        number: int,
        request: tuple[int, int, int, bytes],
        progress: tcp.Progress,
    ) -> None:
        operation, block, generation, key = request
        served = self._served
        if not served.holds(block, generation, key):
            head = tcp.HEAD.pack(number, tcp.STALE, 0)
            tcp.send(connection, [memoryview(head)], progress)
            return
        data = served.block_bytes_of(block)
        value = tcp.checksum_of(data, block, generation, key)
        sends_bytes = operation == tcp.BLOCK
        head = tcp.HEAD.pack(number, tcp.OK, len(data) if sends_bytes else 0)
        tcp.send(connection, [memoryview(head), *([data.data] * sends_bytes)], progress)
        loads_before_are_done()
        status = tcp.OK if served.holds(block, generation, key) else tcp.STALE
        tcp.send(connection, [memoryview(tcp.TAIL.pack(status, value))], progress)
