"""A registry in a world: the embedded one of production, its server and its clients, with all that
production does with it. Only the endpoints and the event loops are simulated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count

import msgspec

from penstock.engine.core import InstanceCore
from penstock.protocol.codec import PROTOCOL_VERSION
from penstock.protocol.effects import Effect
from penstock.registry.base import INSTANCES, InstanceEntry
from penstock.registry.embedded import EmbeddedStore, RegistryServer
from penstock.registry.registry import Registry
from penstock.service.cluster.cluster import AmongOthers
from penstock.service.core import ServiceCore
from penstock.simulator.wire import Process, Wire
from penstock.simulator.world import World

ADDRESS = "sim://registry"
#: Terms that begin at one second of a world's time (see `registry.first_term`).
_FIRST_TERM = 1_000


class _NoCore:
    """The registry has endpoints of its own."""

    def on_message(self, peer: str, message: object, now: float) -> list[Effect]:
        return []

    def on_timer(self, now: float) -> list[Effect]:
        return []


class SimulatedRegistry:
    """Call `register` and `join` for each start of a process; who has ended is simply silent."""

    def __init__(self, world: World, name: str = "registry") -> None:
        self._world = world
        self._name = name
        self._wire = Wire(world)
        self._lives = 0
        self._numbers = count()
        self._processes: dict[str, Process] = {}
        world.add_node(name, _NoCore())
        self._serve()

    # --- its own life --------------------------------------------------------------------------

    def _serve(self) -> None:
        self._lives += 1
        process = self._begin(self._name)
        process.loop.enter(
            lambda: RegistryServer(
                ADDRESS,
                open_endpoint=partial(self._wire.listen, process),
                first_lease=self._lives << 32,
            )
        )

    def lose(self) -> None:
        """Its process is gone, and what it knew with it."""
        self._world.kill(self._name)

    def come_back(self) -> None:
        self._world.restart(self._name)
        self._serve()

    # --- those who use it ----------------------------------------------------------------------

    def register(self, core: InstanceCore) -> None:
        """What `registry.announce` does beside an engine."""
        process = self._begin(core.card.name)
        value = msgspec.json.encode(_entry(core))
        key = INSTANCES + core.card.name
        process.loop.enter(lambda: self._client(process).register(key, value))

    def join(self, core: ServiceCore) -> Member:
        """What a service has to do with its registry from its start to its end."""
        name, incarnation = core.config.name, core.config.incarnation
        process = self._begin(name)
        member = Member(self._world, process, core)
        process.loop.enter(
            lambda: AmongOthers(
                self._client(process), member, name=name, incarnation=incarnation, url=""
            )
        )
        return member

    def end(self, name: str) -> None:
        """The process is gone."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.loop.end()

    def end_all(self) -> None:
        for name in list(self._processes):
            self.end(name)

    def troubles(self) -> list[object]:
        """What went wrong in a loop and was taken care of by nobody."""
        return [trouble for p in self._processes.values() for trouble in p.loop.troubles]

    def _begin(self, name: str) -> Process:
        self.end(name)
        process = self._processes[name] = Process(self._world, name)
        return process

    def _client(self, process: Process) -> Registry:
        store = EmbeddedStore(
            ADDRESS,
            open_endpoint=partial(self._wire.connect, process),
            name=f"{process.name}-{next(self._numbers)}",
        )
        return Registry(store, ADDRESS, first_term=lambda: _FIRST_TERM + int(process.clock()))


class Member:
    """The driver of a service, as far as `AmongOthers` is concerned."""

    def __init__(self, world: World, process: Process, core: ServiceCore) -> None:
        self.facts: dict[str, object] = {}
        #: Each term in which it has led.
        self.terms: list[int] = []
        self._world = world
        self._process = process
        self._core = core

    def _tell(self, call: Callable[[float], list[Effect]]) -> None:
        if not self._process.loop.is_closed():
            self._world.tell(self._process.name, call)

    def connect(self, name: str, address: str) -> None:
        self._tell(lambda now: self._core.add_instance(name, now))

    def replace(self, name: str, address: str) -> None:
        def lost(now: float) -> list[Effect]:
            self._core.instances[name].refusal = ""
            self._core.expect(name, True)
            return self._core.on_instance_lost(name, now)

        self._tell(lost)

    def refuse(self, name: str, reason: str) -> None:
        raise AssertionError(f"{name} is refused in a cluster of equals: {reason}")

    def remove(self, name: str) -> None:
        self._tell(lambda now: self._core.remove_instance(name, now))

    def still_lives(self, name: str) -> bool:
        return self._core.instances[name].state in ("active", "suspect")

    def lead(self, term: int | None, *, elected: bool = False) -> None:
        if term is not None:
            self.terms.append(term)
        self._tell(lambda now: self._core.lead(term, now, elected=elected))


def _entry(core: InstanceCore) -> InstanceEntry:
    card = core.card
    return InstanceEntry(
        name=card.name,
        incarnation=card.incarnation,
        pid=card.pid,
        address=card.endpoints["control"],
        host=card.host,
        hostname=card.host,
        model=card.model,
        model_digest=card.model_digest,
        layout_digest=card.layout.digest(),
        protocol_version=PROTOCOL_VERSION,
        version="",
        dtype=card.dtype,
        max_model_len=card.max_model_len,
    )
