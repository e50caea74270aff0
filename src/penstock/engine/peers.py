"""Connections of an instance to its peers, by which it asks for blocks."""

from __future__ import annotations

import logging
import select
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from penstock.protocol.errors import ConfigError
from penstock.protocol.transport.base import Endpoint
from penstock.protocol.transport.open import connect

log = logging.getLogger(__name__)

#: Transfers renew their leases far more often than this.
_UNUSED_S = 60.0
#: A connection takes a moment to stand. What is sent meanwhile waits, for so long and so much.
_STANDING_S = 1.0
_MAX_WAITING = 256


@dataclass(slots=True)
class _Connection:
    endpoint: Endpoint
    address: str
    used_s: float
    began_s: float
    waiting: deque[bytes] = field(default_factory=deque)


class Peers:
    """One connection for each peer that the core has asked for; they share the driver's poller."""

    def __init__(self, poller: select.poll, clock: Callable[[], float]) -> None:
        self._poller = poller
        self._clock = clock
        self._connections: dict[str, _Connection] = {}
        self._by_fd: dict[int, str] = {}

    def connect(self, peer: str, address: str, own_name: str) -> None:
        """Again with the same address: nothing happens; with another: the old one is given up."""
        held = self._connections.get(peer)
        if held is not None and held.address == address:
            held.used_s = self._clock()
            return
        self._close(peer)
        try:
            endpoint = connect(address, own_name, peer)
        except ConfigError as exc:
            log.warning("no connection to %s: %s", peer, exc)
            return
        now = self._clock()
        self._connections[peer] = _Connection(endpoint, address, now, now)
        self._by_fd[endpoint.fileno()] = peer
        self._poller.register(endpoint.fileno(), select.POLLIN)

    def send(self, peer: str, frame: bytes) -> bool | None:
        """Whether it was taken; None if there is no connection of ours to that peer."""
        held = self._connections.get(peer)
        if held is None:
            return None
        held.used_s = self._clock()
        if not held.waiting and held.endpoint.send(peer, frame):
            return True
        if held.used_s - held.began_s > _STANDING_S or len(held.waiting) >= _MAX_WAITING:
            return False
        held.waiting.append(frame)
        return True

    def send_waiting(self) -> bool:
        """To be called soon again while it says True: frames wait for their connection."""
        again = False
        for peer, held in self._connections.items():
            while held.waiting and held.endpoint.send(peer, held.waiting[0]):
                held.waiting.popleft()
            if self._clock() - held.began_s > _STANDING_S:
                held.waiting.clear()
            again |= bool(held.waiting)
        return again

    def receive(self, fds: list[int], limit: int) -> Iterator[tuple[str, bytes]]:
        """Frames of those that the poller has named."""
        for fd in fds:
            peer = self._by_fd.get(fd)
            if peer is not None:
                self._connections[peer].used_s = self._clock()
                yield from self._connections[peer].endpoint.drain(limit)

    def close_unused(self) -> None:
        now = self._clock()
        for peer, held in list(self._connections.items()):
            if now - held.used_s > _UNUSED_S:
                self._close(peer)

    def close(self) -> None:
        for peer in list(self._connections):
            self._close(peer)

    def _close(self, peer: str) -> None:
        held = self._connections.pop(peer, None)
        if held is not None:
            fd = held.endpoint.fileno()
            del self._by_fd[fd]
            self._poller.unregister(fd)
            held.endpoint.close(flush_s=0.2)
