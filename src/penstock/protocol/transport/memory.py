"""Frames between threads of one process, with the semantics of the ZeroMQ transport.

Used by `--in-process` and by tests. Unlike those of other transports, these endpoints may be used
from any thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.protocol.errors import ConfigError
from penstock.protocol.transport import base

# One lock for all endpoints: what happens under it is a few dictionary and deque operations.
_lock = threading.Lock()
_listeners: dict[str, MemoryEndpoint] = {}
_connectors: dict[str, list[MemoryEndpoint]] = {}


@dataclass(frozen=True, slots=True)
class _Link:
    """A way to `target`, which knows this side as `known_as`."""

    target: MemoryEndpoint
    known_as: str


class MemoryEndpoint:
    """`peer` is None at a listener. `_links` (by peer) and the inbox are guarded by `_lock`."""

    def __init__(self, address: str, name: str, peer: str | None, high_water_frames: int) -> None:
        self.name = name
        self.address = address
        self.peer = peer
        self._high_water_frames = high_water_frames
        self._links: dict[str, _Link] = {}
        self._inbox: deque[tuple[str, bytes]] = deque()
        self._num_waiting: dict[str, int] = {}
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False

    def send(self, peer: str, frame: bytes) -> bool:
        base.check_frame(frame)
        with _lock:
            link = self._links.get(peer)
            return link is not None and link.target._put(link.known_as, frame)

    def receive(self) -> tuple[str, bytes] | None:
        with _lock:
            if not self._inbox:
                return None
            sender, frame = self._inbox.popleft()
            self._num_waiting[sender] -= 1
            if not self._inbox:
                self._num_waiting.clear()
                os.eventfd_read(self._event)
            return sender, frame

    def drain(self, limit: int | None = None) -> Iterator[tuple[str, bytes]]:
        return base.drain(self, limit)

    def trouble(self) -> str:
        return ""

    def fileno(self) -> int:
        return self._event

    def close(self, flush_s: float = 0.0) -> None:
        """What was sent is in the receiver's inbox already, so there is nothing to flush."""
        with _lock:
            if self._closed:
                return
            self._closed = True
            self._inbox.clear()
            os.close(self._event)
            if self.peer is None:
                _remove_listener(self)
            else:
                _remove_connector(self)

    def _put(self, sender: str, frame: bytes) -> bool:
        waiting = self._num_waiting.get(sender, 0)
        if waiting >= self._high_water_frames:
            return False
        if not self._inbox:
            os.eventfd_write(self._event, 1)
        self._num_waiting[sender] = waiting + 1
        self._inbox.append((sender, frame))
        return True


def listen(
    address: str, name: str, *, high_water_frames: int = base.HIGH_WATER_FRAMES
) -> MemoryEndpoint:
    """As `penstock.protocol.transport.zmq.listen`, at `memory://anything`."""
    _check(address, name)
    with _lock:
        if address in _listeners:
            raise ConfigError(f"another endpoint listens at {address}: give another address")
        endpoint = MemoryEndpoint(address, name, None, high_water_frames)
        _listeners[address] = endpoint
        for connector in _connectors.get(address, []):
            _link(endpoint, connector)
        return endpoint


def connect(
    address: str, name: str, peer: str, *, high_water_frames: int = base.HIGH_WATER_FRAMES
) -> MemoryEndpoint:
    """As `penstock.protocol.transport.zmq.connect`."""
    _check(address, name)
    with _lock:
        endpoint = MemoryEndpoint(address, name, peer, high_water_frames)
        _connectors.setdefault(address, []).append(endpoint)
        if address in _listeners:
            _link(_listeners[address], endpoint)
        return endpoint


def _check(address: str, name: str) -> None:
    base.check_name(name)
    if not address.startswith("memory://") or address == "memory://":
        raise ConfigError(f"{address!r} is no address in memory: write memory://name")


def _link(listener: MemoryEndpoint, connector: MemoryEndpoint) -> None:
    assert connector.peer is not None
    earlier = listener._links.get(connector.name)
    if earlier is not None:
        earlier.target._links.clear()
    listener._links[connector.name] = _Link(connector, connector.peer)
    connector._links[connector.peer] = _Link(listener, connector.name)


def _remove_listener(listener: MemoryEndpoint) -> None:
    del _listeners[listener.address]
    for link in listener._links.values():
        link.target._links.clear()
    listener._links.clear()


def _remove_connector(connector: MemoryEndpoint) -> None:
    connectors = _connectors[connector.address]
    connectors.remove(connector)
    if not connectors:
        del _connectors[connector.address]
    # Cut off by a namesake, it has no link left, and the listener's belongs to the other.
    for link in connector._links.values():
        del link.target._links[connector.name]
    connector._links.clear()
