"""Endpoints of `protocol.transport` between nodes of a world: for production code that has its own
connections beside those of the cores, such as the registry's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial

from penstock.protocol.transport import base
from penstock.simulator.events import Call
from penstock.simulator.node import Node
from penstock.simulator.node_loop import NodeLoop
from penstock.simulator.world import World


class Process:
    """One life of a node, and the loop that its `async` code runs on."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.node: Node = world.node(name)
        self._world = world
        self.loop = NodeLoop(self.clock, self._at)  # type: ignore[abstract]  # it has what is needed

    def clock(self) -> float:
        return self.node.clock.local_s(self._world.now)

    def _at(self, when_s: float, call: Call) -> None:
        world_s = max(self.node.clock.world_s(when_s), self._world.now)
        self._world.at(world_s, partial(self.node.when_running, call))


class Wire:
    """What connects the endpoints of one world. A listener's successor has its address, and hears
    whoever sends to it; it knows nobody before that."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._listeners: dict[str, WireEndpoint] = {}
        self._number = 0

    def listen(self, process: Process, address: str, name: str) -> WireEndpoint:
        endpoint = self._listeners[address] = self._open(process, address, name, "")
        return endpoint

    def connect(self, process: Process, address: str, name: str, peer: str) -> WireEndpoint:
        return self._open(process, address, name, peer)

    def _open(self, process: Process, address: str, name: str, peer: str) -> WireEndpoint:
        self._number += 1
        return WireEndpoint(self, process, address, name, peer, self._number)

    def listener(self, address: str) -> WireEndpoint | None:
        return self._listeners.get(address)

    def carry(self, source: Process, target: Process, num_bytes: int, take: Call) -> bool:
        """Call `take` once for each arrival. False: there is no way now."""
        network, now = self.world.network, self.world.now
        if not network.passes(source.name, target.name, now):
            return False
        for arrival_s in network.arrivals(source.name, target.name, num_bytes, now):
            self.world.at(arrival_s, partial(target.node.when_running, take))
        return True


class WireEndpoint:
    """A `protocol.transport` endpoint. `peer`: who listens at `address`; "" at the listener."""

    def __init__(
        self, wire: Wire, process: Process, address: str, name: str, peer: str, number: int
    ) -> None:
        self.name = name
        self.address = address
        self.process = process
        self.closed = False
        self._wire = wire
        self._peer = peer
        self._number = number
        #: Of a listener: those who have sent something.
        self._connected: dict[str, WireEndpoint] = {}
        self._inbox: deque[tuple[str, bytes]] = deque()

    def send(self, peer: str, frame: bytes) -> bool:
        target = self._wire.listener(self.address) if self._peer else self._connected.get(peer)
        if self.closed or self.process.loop.is_closed() or target is None or target.closed:
            return False
        take = partial(target._take, self, frame)
        return self._wire.carry(self.process, target.process, len(frame), take)

    def _take(self, source: WireEndpoint, frame: bytes) -> None:
        if self.closed:
            return
        if not self._peer:
            self._connected[source.name] = source
        self._inbox.append((self._peer or source.name, frame))
        self.process.loop.readable(self._number)

    def receive(self) -> tuple[str, bytes] | None:
        return self._inbox.popleft() if self._inbox else None

    def drain(self, limit: int | None = None) -> Iterator[tuple[str, bytes]]:
        return base.drain(self, limit)

    def trouble(self) -> str:
        return ""

    def fileno(self) -> int:
        """The number under which `NodeLoop` knows it."""
        return self._number

    def close(self, flush_s: float = 0.0) -> None:
        self.closed = True
