"""A whole deployment on a virtual clock: the production cores, a network with faults, no threads.

One seed gives one history: events happen in the order of (time, number), all randomness comes from
seeded generators, and nothing depends on hash order. `digest` is a hash over everything that was
delivered, launched and replied; `history` (not in large worlds) is that in words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from penstock.engine.core import CoreConfig, InstanceCore
from penstock.engine.memory.tiers.index import TierIndex, TierSizes
from penstock.engine.scheduler.batch import Batch, StepResult
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.transfer.jobs import Job, Moved
from penstock.protocol.codec import Message, decode, encode
from penstock.protocol.effects import (
    Connect,
    Effect,
    Launch,
    Move,
    Reply,
    Send,
    SetTimer,
    Shorten,
    Stop,
)
from penstock.protocol.errors import EngineUnavailable, Overloaded
from penstock.service.cluster.finder import Finder
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import GenerationSpec
from penstock.service.policies.routing import Policy, least_load
from penstock.simulator.clients import Answer, Client
from penstock.simulator.clocks import Clock
from penstock.simulator.counting import CountingRunner
from penstock.simulator.data_plane import DataFaults, SimulatedDataPlane
from penstock.simulator.digest import Digest
from penstock.simulator.events import Call, Events
from penstock.simulator.kv import KvMemory, NoCells
from penstock.simulator.network import Network, NetworkFaults
from penstock.simulator.node import VOCAB_SIZE, Core, Device, Node, card_of
from penstock.simulator.pacing import StepCost
from penstock.simulator.runner import CostModelRunner

SMALL_SCHEDULER = SchedulerConfig(
    max_num_seqs=16, max_num_batched_tokens=256, max_model_len=1024, eos_token_ids=(0,)
)


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
        self._counting = counting
        self.events = Events()
        self.network = Network(faults or NetworkFaults(), random.Random(seed))
        self.digest = Digest()
        self.history: list[str] = []
        self.outcomes: dict[str, Answer] = {}
        self._asked: dict[str, tuple[Client, int]] = {}  # and how many choices have not ended
        self._data_faults = data_faults or DataFaults()
        self._data_random = random.Random(seed + 1)
        self._nodes: dict[str, Node] = {}
        self._incarnations: dict[str, int] = {}
        self._watchers: list[Callable[[str], None]] = []

    @property
    def now(self) -> float:
        """Seconds since the beginning, by no clock in it."""
        return self.events.now

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
        clock: Clock | None = None,
    ) -> InstanceCore:
        """Start (or start again, as a new incarnation) the instance `name`. Blocks move between
        instances by `means`, mapped only on one `host`."""
        incarnation = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        memory = (NoCells if self._counting else KvMemory)(num_blocks, scheduler.block_tokens)
        card = card_of(name, incarnation, scheduler, num_blocks, host)
        instance = InstanceCore(
            card,
            Scheduler(scheduler, num_blocks, num_windows, memory.generations),
            core or CoreConfig(),
            means={m: host if m == "map" else "" for m in means},
            endpoints={m: f"{name}/{incarnation}" for m in means},
            tiers=TierIndex(tiers),
        )
        clock = clock or Clock()
        start_again = partial(
            self.add_instance, name, num_blocks=num_blocks, cost=cost, scheduler=scheduler,
            host=host, means=means, num_windows=num_windows, tiers=tiers, core=core, clock=clock,
        )  # fmt: skip
        node = self._install(Node(name, instance, clock, start_again))
        node.device = self._device(node, cost or StepCost(), memory, card.layout.block_bytes)
        self._carry_out(node, instance.on_timer(clock.local_s(self.now)))
        return instance

    def _device(self, node: Node, cost: StepCost, memory: KvMemory, block_bytes: int) -> Device:
        def at(when_s: float, call: Call) -> None:
            self.at(when_s, partial(node.when_running, call))

        def clock() -> float:
            return self.now  # however wrong the node's may be

        runner: CostModelRunner | CountingRunner
        if self._counting:
            runner = CountingRunner(cost, clock, at)
        else:
            runner = CostModelRunner(cost, VOCAB_SIZE, clock, at, memory)
        data_plane = SimulatedDataPlane(
            memory, self._data_faults, self._data_random, at, clock, self._memory_at, block_bytes
        )
        return Device(cost, runner, data_plane, memory)

    def _memory_at(self, endpoint: str) -> KvMemory | None:
        name, _, incarnation = endpoint.partition("/")
        node = self._nodes.get(name)
        if node is None or not node.alive or str(self._incarnations[name]) != incarnation:
            return None
        return self._device_of(name).memory

    def add_node(self, name: str, core: Core, clock: Clock | None = None) -> None:
        """Anything that takes messages. (`send` sends in its name.)"""
        again = partial(self.add_node, name, core, clock)
        self._install(Node(name, core, clock or Clock(), again))

    def _install(self, node: Node) -> Node:
        """A successor takes the name over; what had it is gone."""
        before = self._nodes.get(node.name)
        if before is not None:
            before.end()
        self._nodes[node.name] = node
        return node

    def add_service(
        self,
        name: str,
        instances: Sequence[str],
        *,
        policy: Policy = least_load,
        finder: Callable[[], Finder] | Finder | None = None,
        config: ServiceCoreConfig | None = None,
        clock: Clock | None = None,
    ) -> ServiceCore:
        """`config` for all but the name (and, once started again, the incarnation). `finder`: one,
        or what makes a new one at each start."""
        config, clock = replace(config or ServiceCoreConfig(), name=name), clock or Clock()
        core = ServiceCore(config, policy, finder() if callable(finder) else finder)
        start_again = partial(
            self.add_service, name, instances, policy=policy, finder=finder, clock=clock,
            config=replace(config, incarnation=config.incarnation + 1),
        )  # fmt: skip
        node = self._install(Node(name, core, clock, start_again))
        for instance in instances:
            self._carry_out(node, core.add_instance(instance, clock.local_s(self.now)))
        return core

    def restart(self, name: str) -> Any:
        """Start `name` again as it was started last; the new core is returned."""
        node = self._nodes[name]
        if node.alive:
            self.kill(name)
        self._happened("start", name)
        node.start_again()
        return self._nodes[name].core

    # --- looking -------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._nodes)

    def node(self, name: str) -> Node:
        """The process that has (or had last) this name."""
        return self._nodes[name]

    def core(self, name: str) -> Any:
        """The core of the process that has (or had last) this name."""
        return self._nodes[name].core

    def lives(self, name: str) -> bool:
        return self._nodes[name].alive

    def left(self, name: str) -> bool:
        """Whether it ended by itself (`Stop`)."""
        return self._nodes[name].left

    def busy_s(self, name: str) -> float:
        """Seconds that the instance has computed."""
        return self._device_of(name).runner.busy_s

    def watch(self, watcher: Callable[[str], None]) -> None:
        """`watcher(name)` is called each time that the core of `name` has taken something in and
        what it asked for has been carried out."""
        self._watchers.append(watcher)

    def _device_of(self, name: str) -> Device:
        device = self._nodes[name].device
        assert device is not None, f"{name} is not an instance"
        return device

    # --- requests ------------------------------------------------------------------------------

    def submit(
        self, service: str, spec: GenerationSpec, at_s: float, client: Client | None = None
    ) -> Client:
        """`client` sees the replies; by default an `Answer`, to be found in `outcomes`."""
        caller: Client = client or self.outcomes.setdefault(spec.request_id, Answer())
        self.at(at_s, partial(self.submit_now, service, spec, caller))
        return caller

    def submit_now(self, service: str, spec: GenerationSpec, client: Client) -> None:
        node = self._nodes[service]
        if not node.alive:
            client.refused(EngineUnavailable(f"nobody listens at {service}"))
            return

        def arrive() -> None:
            assert isinstance(node.core, ServiceCore)
            self._asked[spec.request_id] = client, spec.n
            try:
                effects = node.core.submit(spec, node.clock.local_s(self.now))
            except Overloaded as error:
                del self._asked[spec.request_id]
                client.refused(error)
            else:
                self._carry_out(node, effects)

        node.when_running(arrive)

    def cancel(self, service: str, request_id: str, at_s: float) -> None:
        def arrive(now: float) -> list[Effect]:
            self._asked.pop(request_id, None)  # no further word is to come
            effects: list[Effect] = self.core(service).cancel(request_id, None, now)
            return effects

        self.at(at_s, partial(self.tell, service, arrive))

    def tell(self, name: str, call: Callable[[float], list[Effect]]) -> None:
        """Something that the driver of `name` tells its core: `call` gets the time by its clock."""
        node = self._nodes[name]
        node.when_running(lambda: self._carry_out(node, call(node.clock.local_s(self.now))))

    # --- faults --------------------------------------------------------------------------------

    def kill(self, name: str, *, noticed_by: str | None = None, words_arrive: bool = False) -> None:
        """The process is gone. A supervisor (`noticed_by`) sees that at once; others by silence.
        `words_arrive`: its machine's kernel still sends what it had been given."""
        self._happened("kill", name)
        self._nodes[name].left = words_arrive
        self._nodes[name].end()
        if noticed_by is not None:
            service = self.core(noticed_by)
            service.expect(name, True)
            self.tell(noticed_by, lambda now: service.on_instance_lost(name, now))

    def stop(self, name: str, for_s: float) -> None:
        """SIGSTOP, and SIGCONT after `for_s`: what it missed comes then, in the order of events."""
        self._happened("stop", name)
        node = self._nodes[name]
        node.stopped = True

        def go_on() -> None:
            self._happened("continue", name)
            node.stopped = False
            missed, node.missed = node.missed, []
            for call in missed:
                node.when_running(call)

        self.at(self.now + for_s, go_on)

    def slow_down(self, name: str, factor: float) -> None:
        """Steps of the instance take `factor` times as long from now on; 1: as before."""
        self._happened("slow", name)
        self._device_of(name).slow_down(factor)

    def cut(self, one: str, other: str, for_s: float, *, one_way: bool = False) -> None:
        """Nothing passes between the two for `for_s`; engines notice what they cannot send."""
        self._happened("cut", one, other)
        self.network.cut(one, other, self.now + for_s, one_way=one_way)

    def partition(self, groups: Sequence[Collection[str]], for_s: float) -> None:
        """Nothing passes from one group to another for `for_s`."""
        self._happened("partition", *(name for group in groups for name in group))
        self.network.partition(groups, self.now + for_s)

    def jump_clock(self, name: str, by_s: float) -> None:
        self._happened("jump", name)
        node = self._nodes[name]
        node.clock.jump(by_s, self.now)
        self._arm(node)

    def drift_clock(self, name: str, drift: float) -> None:
        self._happened("drift", name)
        node = self._nodes[name]
        node.clock.drifts(drift, self.now)
        self._arm(node)

    # --- running -------------------------------------------------------------------------------

    def at(self, when_s: float, call: Call) -> None:
        self.events.at(when_s, call)

    def run(self, until_s: float) -> None:
        self.events.run(until_s)

    def _carry_out(self, node: Node, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:  # the frequent ones first
                case Send():
                    self._send(node, effect.peer, effect.message)
                case SetTimer():
                    node.due_s = effect.at_s
                    self._arm(node)
                case Reply():
                    self._reply(effect.request_id, effect.event)
                case Launch():
                    self._launch(node, effect.batch)
                case Shorten():
                    self._shorten(node, effect.step, effect.ahead_s)
                case Move():
                    self._move(node, effect.job)
                case Connect():
                    assert effect.address == f"sim://{effect.peer}"
                    node.peers[effect.peer] = None
                case Stop():
                    self._happened("leave", node.name)
                    node.left = True
                    node.end()
        for watcher in self._watchers:
            watcher(node.name)

    def _reply(self, request_id: str, event: Any) -> None:
        self.digest.replied(self.events.now, request_id, event)
        if not self._counting:
            self._log("reply", request_id, event.choice, event.ids, event.finish)
        assert request_id in self._asked, f"{request_id} is answered after its end"
        client, choices = self._asked[request_id]
        if event.finish is not None and choices == 1:
            del self._asked[request_id]
        elif event.finish is not None:
            self._asked[request_id] = client, choices - 1
        client.take(event)

    def _launch(self, node: Node, batch: Batch) -> None:
        core, device = node.core, node.device
        assert isinstance(core, InstanceCore) and device is not None
        self.digest.launched(self.events.now, node.name, batch)

        def done(result: StepResult) -> None:
            now = node.clock.local_s(self.events.now)
            self._carry_out(node, core.on_step_done(result, now))

        device.runner.launch(batch, done)

    def _shorten(self, node: Node, step: int, ahead_s: float) -> None:
        core, device = node.core, node.device
        assert isinstance(core, InstanceCore) and device is not None
        steps = device.runner.shorten(step, ahead_s)
        self._carry_out(node, core.on_shortened(step, steps, node.clock.local_s(self.now)))

    def _move(self, node: Node, job: Job) -> None:
        core, device = node.core, node.device
        assert isinstance(core, InstanceCore) and device is not None

        def done(moved: Moved) -> None:
            self._log("moved", node.name, moved.number, moved.ok)
            self._carry_out(node, core.on_moved(moved, node.clock.local_s(self.now)))

        device.data_plane.start(job, done)

    # --- timers --------------------------------------------------------------------------------

    def _arm(self, node: Node) -> None:
        """Look after its timer when it is due. Where that was to be done earlier anyway it is only
        put off then: most timers are replaced before they are due."""
        if node.due_s is None:
            return
        when_s = max(node.clock.world_s(node.due_s), self.events.now)
        if when_s < node.looked_after_s:
            node.looked_after_s = when_s
            self.events.at(when_s, partial(self._look_after, node, when_s))

    def _look_after(self, node: Node, when_s: float) -> None:
        if node.looked_after_s != when_s:
            return  # that was to be done earlier, and has been
        node.looked_after_s = float("inf")
        if node.due_s is None:
            return
        if node.clock.world_s(node.due_s) > self.events.now:
            self._arm(node)
        elif node.stopped:
            node.missed.append(partial(self._fire, node))
        elif node.alive:
            self._fire(node)

    def _fire(self, node: Node) -> None:
        if node.due_s is None:
            return
        # Not a rounding error too early, or it would be set again for this moment for ever.
        now, node.due_s = max(node.clock.local_s(self.events.now), node.due_s), None
        self._carry_out(node, node.core.on_timer(now))

    # --- messages ------------------------------------------------------------------------------

    def send(self, source: str, target: str, message: Message) -> None:
        """As if the core of `source` had asked for it."""
        self._send(self._nodes[source], target, message)

    def _send(self, node: Node, target: str, message: Message) -> None:
        source, now = node.name, self.events.now
        receiver = self._nodes.get(target)
        passes = self.network.passes(source, target, now)
        if node.is_instance:
            if receiver is not None and receiver.is_instance:
                assert target in node.peers, f"{source} has no way to {target}"
                receiver.peers[source] = None  # the answer comes over the same connection
            # ZeroMQ tells a ROUTER when a peer is out of reach; a DEALER just keeps it.
            there = receiver is not None and receiver.alive
            core: Any = node.core
            core.on_sent(target, passes and there, node.clock.local_s(now))
        frame = b"" if self._counting else encode(message)
        arrivals = self.network.arrivals(source, target, len(frame), now) if passes else []
        if not arrivals:
            self._log("lost", source, target, type(message).__name__)
        if receiver is None:
            return
        what = message if self._counting else frame
        for arrival_s in arrivals:
            self.events.at(arrival_s, partial(self._deliver, node, receiver, what))

    def _deliver(self, sender: Node, receiver: Node, what: Any) -> None:
        # What was on its way to (or from) a process that has died does not reach its successor.
        if not (receiver.alive and (sender.alive or sender.left)):
            return
        if receiver.stopped:
            receiver.missed.append(partial(self._take, sender.name, receiver, what))
        else:
            self._take(sender.name, receiver, what)

    def _take(self, source: str, receiver: Node, what: Any) -> None:
        message, frame = (what, b"") if self._counting else (decode(what), what)
        now = self.events.now
        self.digest.delivered(now, source, receiver.name, message, frame)
        if not self._counting:
            self._log("deliver", source, receiver.name, frame)
        effects = receiver.core.on_message(source, message, receiver.clock.local_s(now))
        self._carry_out(receiver, effects)

    def _happened(self, *what: str) -> None:
        self.digest.happened(self.now, *what)
        self._log(*what)

    def _log(self, *what: object) -> None:
        if self._counting:
            return
        parts = (part.hex() if isinstance(part, bytes) else str(part) for part in what)
        self.history.append(f"{self.now:.9f} " + " ".join(parts))
