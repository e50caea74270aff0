"""A whole deployment on a virtual clock: the production cores, a network with faults, no threads.

One seed gives one history: events happen in the order of (time, number), all randomness comes from
one generator, and nothing depends on hash order. `history` records every message that was
delivered, every fault and every reply.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from penstock.engine.core import CoreConfig, InstanceCore
from penstock.engine.memory.tiers.index import TierIndex, TierSizes
from penstock.engine.scheduler.batch import Batch, StepResult
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.transfer.jobs import Job, Moved
from penstock.protocol.codec import Message, decode, encode
from penstock.protocol.effects import Connect, Effect, Launch, Move, Reply, Send, SetTimer
from penstock.protocol.errors import Overloaded
from penstock.protocol.instance import InstanceCard
from penstock.protocol.kv import KvLayout
from penstock.service.cluster.finder import Finder
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.service.policies.routing import Policy, least_load
from penstock.simulator.counting import CountingRunner
from penstock.simulator.data_plane import DataFaults, SimulatedDataPlane
from penstock.simulator.kv import KvMemory
from penstock.simulator.runner import CostModelRunner, StepCost

VOCAB_SIZE = 1000
At = Callable[[float, Callable[[], None]], None]
SMALL_SCHEDULER = SchedulerConfig(
    max_num_seqs=16, max_num_batched_tokens=256, max_model_len=1024, eos_token_ids=(0,)
)


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """Each frame: `latency_s` plus up to `jitter_s`; may come twice; may be lost."""

    latency_s: float = 0.0002
    jitter_s: float = 0.0003
    duplicate: float = 0.0
    loss: float = 0.0


class Core(Protocol):
    """What takes part in a world: an `InstanceCore`, a `ServiceCore`, or what a test puts there."""

    def on_message(self, peer: str, message: Any, now: float) -> list[Effect]: ...
    def on_timer(self, now: float) -> list[Effect]: ...


@dataclass(slots=True)
class _Node:
    """A process: its core, whether it lives, and the timer it has set last."""

    name: str
    core: Core
    runner: CostModelRunner | CountingRunner | None = None
    data_plane: SimulatedDataPlane | None = None
    memory: KvMemory | None = None
    #: Instances that it has been told to connect to, and those that have connected to it.
    peers: dict[str, None] = field(default_factory=dict)
    alive: bool = True
    #: While stopped, a process takes in nothing and sets nothing off; it does so afterwards.
    stopped: bool = False
    missed: list[Callable[[], None]] = field(default_factory=list)
    timer: int = 0


class Client(Protocol):
    """Who made a request."""

    def take(self, delta: TokenDelta) -> None: ...
    def refused(self) -> None: ...


@dataclass(slots=True)
class Outcome:
    """What the caller of one request saw, by choice."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    finish: dict[int, list[str]] = field(default_factory=dict)

    def take(self, delta: TokenDelta) -> None:
        self.ids.setdefault(delta.choice, []).extend(delta.ids)
        if delta.finish is not None:
            self.finish.setdefault(delta.choice, []).append(delta.finish)

    def refused(self) -> None:
        self.finish[0] = ["overloaded"]


class World:
    """Add services and instances, submit requests at times, inject faults, `run`."""

    def __init__(
        self,
        seed: int,
        faults: NetworkFaults | None = None,
        data_faults: DataFaults | None = None,
        *,
        counting: bool = False,
    ) -> None:
        """`counting`: for large worlds. Runners only count (`counting.py`), messages are handed
        over without being encoded, and no history is kept."""
        self.now = 0.0
        self._counting = counting
        self.history: list[str] = []
        self.outcomes: dict[str, Outcome] = {}
        self._clients: dict[str, Client] = {}
        self._random = random.Random(seed)
        self._faults = faults or NetworkFaults()
        self._data_faults = data_faults or DataFaults()
        self._data_random = random.Random(seed + 1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._nodes: dict[str, _Node] = {}
        self._incarnations: dict[str, int] = {}
        self._last_arrival_s: dict[tuple[str, str], float] = {}
        self._cuts: dict[frozenset[str], float] = {}

    # --- building ------------------------------------------------------------------------------

    def add_instance(
        self,
        name: str,
        *,
        num_blocks: int = 256,
        cost: StepCost | None = None,
        scheduler: SchedulerConfig = SMALL_SCHEDULER,
        host: str = "host",
        means: tuple[str, ...] = ("map", "tcp"),
        num_windows: int = 256,
        tiers: TierSizes = TierSizes(),  # noqa: B008 (frozen)
        core: CoreConfig | None = None,
    ) -> InstanceCore:
        """Start (or start again, as a new incarnation) the instance `name`. Blocks move between
        instances by `means`, mapped only on one `host`."""
        incarnation = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        config = scheduler
        layout = KvLayout(1, 1, 8, config.block_tokens, "float32", 4096)
        card = InstanceCard(
            name=name,
            incarnation=incarnation,
            pid=0,
            model="simulated",
            model_digest="simulated",
            vocab_size=VOCAB_SIZE,
            max_model_len=config.max_model_len,
            dtype="float32",
            device="simulated",
            layout=layout,
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            host=host,
            endpoints={"control": f"sim://{name}"},
        )
        memory = KvMemory(num_blocks, config.block_tokens)
        instance = InstanceCore(
            card,
            Scheduler(config, num_blocks, num_windows, memory.generations),
            core or CoreConfig(),
            means={m: host if m == "map" else "" for m in means},
            endpoints={m: f"{name}/{incarnation}" for m in means},
            tiers=TierIndex(tiers),
        )
        node = self._nodes[name] = _Node(name, instance, memory=memory)

        def at(when_s: float, call: Callable[[], None]) -> None:
            self.at(when_s, lambda: self._when_running(node, call))

        node.runner = self._runner(cost or StepCost(), at, memory)
        node.data_plane = SimulatedDataPlane(
            memory, self._data_faults, self._data_random, at, lambda: self.now,
            self._memory_at, layout.block_bytes,
        )  # fmt: skip
        self._carry_out(node, instance.on_timer(self.now))
        return instance

    def _runner(self, cost: StepCost, at: At, memory: KvMemory) -> CostModelRunner | CountingRunner:
        if self._counting:
            return CountingRunner(cost, lambda: self.now, at)
        return CostModelRunner(cost, VOCAB_SIZE, lambda: self.now, at, memory)

    def busy_s(self, name: str) -> float:
        """Seconds that the instance has computed."""
        runner = self._nodes[name].runner
        assert runner is not None
        return runner.busy_s

    def _memory_at(self, endpoint: str) -> KvMemory | None:
        name, _, incarnation = endpoint.partition("/")
        node = self._nodes.get(name)
        lives = node is not None and node.alive and str(self._incarnations[name]) == incarnation
        return node.memory if node is not None and lives else None

    def add_node(self, name: str, core: Core) -> None:
        """Anything that takes messages. (`send` sends in its name.)"""
        self._nodes[name] = _Node(name, core)

    def add_service(
        self,
        name: str,
        instances: list[str],
        *,
        policy: Policy = least_load,
        finder: Finder | None = None,
        config: ServiceCoreConfig | None = None,
    ) -> ServiceCore:
        """`config` for all but the name."""
        core = ServiceCore(replace(config or ServiceCoreConfig(), name=name), policy, finder)
        node = self._nodes[name] = _Node(name, core)
        for instance in instances:
            self._carry_out(node, core.add_instance(instance, self.now))
        return core

    def submit(
        self, service: str, spec: GenerationSpec, at_s: float, client: Client | None = None
    ) -> Client:
        """`client` sees the replies; by default an `Outcome`."""
        outcome: Client = client or self.outcomes.setdefault(spec.request_id, Outcome())
        self._clients[spec.request_id] = outcome

        def arrive() -> None:
            node = self._nodes[service]
            assert isinstance(node.core, ServiceCore)
            try:
                self._carry_out(node, node.core.submit(spec, self.now))
            except Overloaded:
                outcome.refused()

        self.at(at_s, arrive)
        return outcome

    def cancel(self, service: str, request_id: str, at_s: float) -> None:
        def arrive() -> None:
            node = self._nodes[service]
            assert isinstance(node.core, ServiceCore)
            self._carry_out(node, node.core.cancel(request_id, None, self.now))

        self.at(at_s, arrive)

    # --- faults --------------------------------------------------------------------------------

    def kill(self, name: str, *, noticed_by: str | None = None) -> None:
        """The process is gone. A supervisor (`noticed_by`) sees that at once; others by silence."""
        self._log("kill", name)
        node = self._nodes[name]
        node.alive = False
        if node.runner is not None:
            node.runner.close()
        if node.data_plane is not None:
            node.data_plane.close()
        if noticed_by is not None:
            service = self._nodes[noticed_by]
            assert isinstance(service.core, ServiceCore)
            service.core.expect(name, True)
            self._carry_out(service, service.core.on_instance_lost(name, self.now))

    def stop(self, name: str, for_s: float) -> None:
        """SIGSTOP, and SIGCONT after `for_s`: what it missed comes then, in the order of events."""
        self._log("stop", name)
        node = self._nodes[name]
        node.stopped = True

        def go_on() -> None:
            self._log("continue", name)
            node.stopped = False
            missed, node.missed = node.missed, []
            for call in missed:
                call()

        self.at(self.now + for_s, go_on)

    def cut(self, one: str, other: str, for_s: float) -> None:
        """Nothing passes between the two for `for_s`; engines notice what they cannot send."""
        self._log("cut", one, other)
        pair = frozenset((one, other))
        self._cuts[pair] = max(self._cuts.get(pair, 0.0), self.now + for_s)

    # --- running -------------------------------------------------------------------------------

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (when_s, self._number, call))

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now, _, call = heapq.heappop(self._events)
            call()
        self.now = until_s

    def _carry_out(self, node: _Node, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(peer=peer, message=message):
                    self._send(node.name, peer, message)
                case Launch(batch=batch):
                    self._launch(node, batch)
                case Connect(peer=peer, address=address):
                    assert address == f"sim://{peer}"
                    node.peers[peer] = None
                case Move(job=job):
                    self._move(node, job)
                case SetTimer(at_s=at_s):
                    self._set_timer(node, at_s)
                case Reply(request_id=request_id, event=event):
                    self._log("reply", request_id, event.choice, event.ids, event.finish)
                    self._clients[request_id].take(event)

    def _when_running(self, node: _Node, call: Callable[[], None]) -> None:
        if node.stopped:
            node.missed.append(call)
        elif node.alive:
            call()

    def _launch(self, node: _Node, batch: Batch) -> None:
        core, runner = node.core, node.runner
        assert isinstance(core, InstanceCore) and runner is not None

        def done(result: StepResult) -> None:
            self._carry_out(node, core.on_step_done(result, self.now))

        runner.launch(batch, done)

    def _move(self, node: _Node, job: Job) -> None:
        core, data_plane = node.core, node.data_plane
        assert isinstance(core, InstanceCore) and data_plane is not None

        def done(moved: Moved) -> None:
            self._log("moved", node.name, moved.number, moved.ok)
            self._carry_out(node, core.on_moved(moved, self.now))

        data_plane.start(job, done)

    def _set_timer(self, node: _Node, at_s: float) -> None:
        node.timer += 1
        number = node.timer

        def fire() -> None:
            if node.alive and node.timer == number:
                self._carry_out(node, node.core.on_timer(self.now))

        self.at(max(at_s, self.now), lambda: self._when_running(node, fire))

    def send(self, source: str, target: str, message: Message) -> None:
        """As if the core of `source` had asked for it."""
        self._send(source, target, message)

    def _send(self, source: str, target: str, message: Message) -> None:
        faults, draw = self._faults, self._random.random
        passes = self._cuts.get(frozenset((source, target)), 0.0) <= self.now
        sender = self._nodes[source].core
        if isinstance(sender, InstanceCore):
            receives = self._nodes.get(target)
            if receives is not None and isinstance(receives.core, InstanceCore):
                assert target in self._nodes[source].peers, f"{source} has no way to {target}"
                receives.peers[source] = None  # the answer comes over the same connection
            # ZeroMQ tells a ROUTER when a peer is out of reach; a DEALER just keeps it.
            gone = target not in self._nodes or not self._nodes[target].alive
            sender.on_sent(target, passes and not gone, self.now)
        if not passes or draw() < faults.loss:
            self._log("lost", source, target, type(message).__name__)
            return
        frame = message if self._counting else encode(message)
        copies = 2 if draw() < faults.duplicate else 1
        receiver = self._nodes.get(target)
        for _ in range(copies):
            # A connection keeps its order: nothing overtakes what was sent before.
            link = (source, target)
            arrival_s = self.now + faults.latency_s + draw() * faults.jitter_s
            arrival_s = max(arrival_s, self._last_arrival_s.get(link, 0.0))
            self._last_arrival_s[link] = arrival_s
            self.at(arrival_s, lambda: self._deliver(source, target, receiver, frame))

    def _deliver(self, source: str, target: str, receiver: _Node | None, frame: Any) -> None:
        node = self._nodes.get(target)
        sender = self._nodes[source]
        # What was on its way to (or from) a process that has died does not reach its successor.
        if node is None or node is not receiver or not node.alive or not sender.alive:
            return
        message = frame if self._counting else decode(frame)

        def take() -> None:
            if not self._counting:
                self._log("deliver", source, target, frame.hex())
            self._carry_out(node, node.core.on_message(source, message, self.now))

        self._when_running(node, take)

    def _log(self, *what: object) -> None:
        if self._counting:
            return
        self.history.append(f"{self.now:.9f} " + " ".join(str(part) for part in what))
