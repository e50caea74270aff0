"""Blocks by the Mooncake transfer engine: RDMA where there is, its TCP transport elsewhere.

Mooncake reads a peer's registered memory without asking the peer, so the two questions that decide
whether bytes count go to the peer's block server afterwards: is it still that generation, and what
is its checksum (`tcp.Connection.checksums`).

A read that fails may still be writing: the library gives up a silent peer after 30 s and cannot be
told to stop. Therefore nothing is read into the pool. Bytes land in a buffer of ours, are verified
there, and copied while the next ones come; a buffer whose read did not end is never used again.

Mooncake listens on all interfaces and asks nobody who they are. It is used where it is asked for.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.engine.transfer import tcp
from penstock.engine.transfer.jobs import Import, Incoming
from penstock.protocol.errors import ConfigError

log = logging.getLogger(__name__)

#: Read at once: enough to reach the transport's rate, small enough to verify from the caches.
_BATCH_BLOCKS = 8
_SLOWEST_BYTES_S = 4 << 20


@dataclass(frozen=True, slots=True)
class MooncakeEndpoint:
    """`mooncake://host:port/base/stride` and, after a space, the owner's block server."""

    session: str
    base: int
    stride: int
    server: str

    def __str__(self) -> str:
        return f"mooncake://{self.session}/{self.base:x}/{self.stride:x} {self.server}"

    @classmethod
    def parse(cls, text: str) -> MooncakeEndpoint:
        """Raises `TransferFailed`."""
        place, _, server = text.partition(" ")
        try:
            scheme, _, rest = place.partition("://")
            session, base, stride = rest.split("/")
            assert scheme == "mooncake" and session
            return cls(session, int(base, 16), int(stride, 16), server)
        except (ValueError, AssertionError):
            raise tcp.TransferFailed(f"{text!r} is no endpoint of Mooncake") from None


class Mooncake:
    """One transfer engine: serves `pool` [blocks, block_bytes] (rows `stride` bytes apart) and
    reads those of peers. Raises `ConfigError` where the library or its transport is missing."""

    def __init__(self, pool: tcp.Bytes, host: str, protocol: str, server: str) -> None:
        # It logs every start at length; what fails it says as errors.
        os.environ.setdefault("GLOG_minloglevel", "2")
        try:
            library: Any = importlib.import_module("mooncake.engine")
        except ImportError as exc:
            raise ConfigError(
                f"the Mooncake transfer engine is not there ({exc}): pip install "
                "'penstock[mooncake]' (it needs Debian's libibverbs1)"
            ) from exc
        self._engine = library.TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, "") != 0:
            raise ConfigError(f"Mooncake cannot start with protocol {protocol} at {host}")
        self._block_bytes = pool.shape[1]
        self._pool_address = int(pool.ctypes.data)
        stride = pool.strides[0]
        self._register(self._pool_address, (len(pool) - 1) * stride + self._block_bytes)
        session = f"{host}:{self._engine.get_rpc_port()}"
        self.endpoint = str(MooncakeEndpoint(session, self._pool_address, stride, server))
        self._lock = threading.Lock()
        self._buffers: list[tcp.Bytes] = []  # not in use
        self._all_buffers: list[tcp.Bytes] = []

    def _register(self, address: int, num_bytes: int) -> None:
        if self._engine.register_memory(address, num_bytes) != 0:
            raise ConfigError(f"Mooncake cannot register {num_bytes} bytes of KV memory")

    def fetch(
        self,
        job: Import,
        destination: Callable[[Incoming], tcp.Bytes],
        server: tcp.Connection,
        came: list[bool],
    ) -> None:
        """As `tcp.Connection.fetch`; `server` is a connection to the endpoint's block server."""
        owner = MooncakeEndpoint.parse(job.peer.endpoint)
        reader = _Reader()
        buffers = [self._buffer(), self._buffer()]
        try:
            batches = [
                range(start, min(start + _BATCH_BLOCKS, len(job.blocks)))
                for start in range(0, len(job.blocks), _BATCH_BLOCKS)
            ]
            reading = self._start(reader, owner, job, batches[0], buffers[0])
            for number, batch in enumerate(batches):
                self._wait(reading, batch, buffers)
                into, ahead = buffers[number % 2], number + 1
                if ahead < len(batches):
                    reading = self._start(reader, owner, job, batches[ahead], buffers[ahead % 2])
                self._admit(job, batch, into, destination, server, came)
        finally:
            # One read may be under way, if what was read before it could not be verified.
            reader.close()
            if buffers and not reader.busy:
                self._give_back(buffers)

    def _start(
        self,
        reader: _Reader,
        owner: MooncakeEndpoint,
        job: Import,
        batch: range,
        into: tcp.Bytes,
    ) -> Future[int]:
        size = self._block_bytes
        here = [int(into[i].ctypes.data) for i in range(len(batch))]
        there = [owner.base + job.blocks[i].handle.block * owner.stride for i in batch]
        read = self._engine.batch_transfer_sync_read
        return reader.call(lambda: int(read(owner.session, here, there, [size] * len(batch))))

    def _wait(self, reading: Future[int], batch: range, buffers: list[tcp.Bytes]) -> None:
        limit_s = tcp.STALL_S + len(batch) * self._block_bytes / _SLOWEST_BYTES_S
        try:
            status = reading.result(limit_s)
        except FutureTimeout:
            buffers.clear()  # never used again
            raise tcp.TransferFailed(f"Mooncake has read nothing for {limit_s:.1f} s") from None
        if status != 0:
            buffers.clear()
            raise tcp.TransferFailed(f"Mooncake could not read: status {status}")

    def _admit(
        self,
        job: Import,
        batch: range,
        read: tcp.Bytes,
        destination: Callable[[Incoming], tcp.Bytes],
        server: tcp.Connection,
        came: list[bool],
    ) -> None:
        """Into the pool with what the owner still has, and has like this."""
        expected = server.checksums([job.blocks[i].handle for i in batch])
        for place, i in enumerate(batch):
            incoming = job.blocks[i]
            if expected[place] == tcp.checksum(read[place], incoming.handle):
                np.copyto(destination(incoming), read[place])
                came[i] = True

    def _buffer(self) -> tcp.Bytes:
        with self._lock:
            if self._buffers:
                return self._buffers.pop()
        made = np.empty((_BATCH_BLOCKS, self._block_bytes), np.uint8)
        self._register(int(made.ctypes.data), made.nbytes)
        with self._lock:
            self._all_buffers.append(made)
        return made

    def _give_back(self, buffers: list[tcp.Bytes]) -> None:
        with self._lock:
            self._buffers += buffers

    def close(self) -> None:
        """Peers cannot read the pool any more."""
        self._engine.unregister_memory(self._pool_address)


class _Reader:
    """A thread that can be left behind when a call into the library does not return."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], int], Future[int]] | None]
        self._calls = queue.SimpleQueue()
        self._last: Future[int] | None = None
        threading.Thread(target=self._run, name="kv-mooncake", daemon=True).start()

    @property
    def busy(self) -> bool:
        return self._last is not None and not self._last.done()

    def call(self, work: Callable[[], int]) -> Future[int]:
        future: Future[int] = Future()
        self._last = future
        self._calls.put((work, future))
        return future

    def close(self) -> None:
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            work, future = call
            try:
                future.set_result(work())
            except Exception as exc:
                future.set_exception(exc)
