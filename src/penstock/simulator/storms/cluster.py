"""The cluster of a storm: who lives, who starts again, and who is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from penstock.engine.core import CoreConfig, InstanceCore
from penstock.engine.memory.tiers.index import TierSizes
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.protocol.effects import Effect
from penstock.protocol.errors import EngineUnavailable
from penstock.protocol.kv import Pull, Release
from penstock.service.cluster.finder import IndexFinder
from penstock.service.cluster.roles import RoleKeeperConfig
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.kv_index.index import KvIndex
from penstock.service.placement import PlacementConfig
from penstock.service.policies.roles import RolesConfig
from penstock.service.policies.routing import Policy, policy_named
from penstock.service.policies.view import Candidate, ClusterView, Decision, RouteRequest
from penstock.simulator.data_plane import DataFaults
from penstock.simulator.network import NetworkFaults
from penstock.simulator.registry import SimulatedRegistry
from penstock.simulator.storms.asks import EOS, Caller, spec_of
from penstock.simulator.storms.checks import Witness
from penstock.simulator.storms.storm import REGISTRY, SERVICES, Crash, Storm
from penstock.simulator.world import World

#: A supervisor's first try after an end that nobody asked for.
RESTART_S = 0.3
#: Who was put behind the others goes before them all after this long.
_OVERDUE_S = 1.0
Plant = Callable[[InstanceCore | ServiceCore], None]


def in_turn(view: ClusterView, request: RouteRequest) -> Decision:
    """Splits every request that may be split, over all pairs in turn."""
    names = view.names
    first = names[request.number % len(names)]
    decode = None
    if request.prefilled_on is None and not request.aggregated_because and len(names) > 1:
        others = [name for name in names if name != first]
        decode = others[request.number // len(names) % len(others)]
    return Decision(
        policy="in-turn",
        instance=first,
        candidates=(Candidate(instance=first, predicted_ttft_s=0.0),),
        reason="in turn",
        decode=decode,
    )


class Cluster:
    def __init__(self, storm: Storm, recount_every: int, plant: Plant) -> None:
        """`plant(core)` is called with each core when it starts."""
        shape = storm.shape
        data = DataFaults(fails=shape.job_fails, hangs=shape.job_hangs, corrupt=shape.block_spoilt)
        self.storm = storm
        self.world = World(storm.seed, NetworkFaults(latency_s=shape.latency_s), data)
        self.witness = Witness(recount_every)
        self.registry = SimulatedRegistry(self.world, REGISTRY) if shape.registry else None
        #: Processes that run, as far as is known here.
        self.up: dict[str, None] = {}
        #: Instances that an operator has taken out for good.
        self.out: dict[str, None] = {}
        self.services: dict[str, ServiceCore] = {}
        self.instances: dict[str, InstanceCore] = {}
        self.callers = [Caller(ask, lambda: self.world.now) for ask in storm.asks]
        self._plant = plant
        #: Instances that a supervisor has started again.
        self._awaited: dict[str, None] = {}
        #: What the shared store has.
        self._store: dict[bytes, list[int]] = {}
        #: Transfers that peers have asked for: (owner, peer, transfer).
        self._pulls: dict[tuple[str, str, str], None] = {}
        for name in shape.instances:
            self.start_instance(name)
        for name in shape.services:
            self._start_service(name)
        self.world.watch(self._look)
        for caller in self.callers:
            self.world.at(caller.ask.at_s, partial(self._ask, caller))

    # --- instances -----------------------------------------------------------------------------

    def start_instance(self, name: str) -> None:
        """For the first time."""
        shape = self.storm.shape
        number = (*shape.instances, name).index(name)
        self.world.add_instance(
            name,
            num_blocks=shape.num_blocks,
            scheduler=SchedulerConfig(
                max_num_seqs=shape.max_num_seqs,
                max_num_batched_tokens=shape.max_num_batched_tokens,
                max_model_len=1024,
                max_chunk_tokens=shape.max_chunk_tokens,
                max_waiting=shape.max_waiting,
                enable_prefix_caching=shape.enable_prefix_caching,
                eos_token_ids=(EOS,),
            ),
            host=f"host-{number % shape.num_hosts}",
            means=shape.means,
            num_windows=shape.num_windows if "map" in shape.means else 0,
            tiers=TierSizes(shape.host_blocks, shape.disk_blocks, shape.store),
            core=CoreConfig(
                credit_window=shape.credit_window, max_run_steps=shape.max_run_steps, max_run_s=0.2
            ),
        )
        self._instance_is_up(name)

    def _instance_is_up(self, name: str) -> None:
        core = self.instances[name] = self.world.core(name)
        self._begin(name, core)
        device = self.world.node(name).device
        assert device is not None
        device.data_plane.tiers["store"] = self._store
        self._pulls = {pull: None for pull in self._pulls if pull[0] != name}
        self._note_pulls(name, core)
        if self.registry is not None:
            self.registry.register(core)
            return
        for service, known in self.services.items():
            if name not in known.instances:
                self.tell(service, partial(known.add_instance, name))

    def _begin(self, name: str, core: InstanceCore | ServiceCore) -> None:
        self.up[name] = None
        self._plant(core)
        self.witness.beside(name, core)

    def _note_pulls(self, name: str, core: InstanceCore) -> None:
        act = core.on_message

        def on_message(peer: str, message: Any, now: float) -> list[Effect]:
            if isinstance(message, Pull):
                self._pulls[name, peer, message.transfer] = None
            return act(peer, message, now)

        setattr(core, "on_message", on_message)  # noqa: B010 (of this one object)

    def take_back(self, name: str, *, overwrites: bool) -> None:
        """Every page that peers have of this instance."""
        core = self.instances[name]
        for owner, peer, transfer in list(self._pulls):
            if owner == name:
                release = partial(core.on_message, peer, Release(transfer))
                self.tell(name, release)
        if overwrites:
            # Their generations move on. (What is in them changes when a step writes to it: steps
            # under way may still read what has just been given back.)
            pool = core.scheduler.pool
            pool.release([pool.allocate() for _ in range(pool.num_available)])

    def drain(self, service: str, name: str, *, out: bool) -> None:
        core = self.services[service]
        if name not in core.instances or name not in self.up:
            return
        others = [i for i in core.instances.values() if i.takes_work and i.name != name]
        if out and others:  # the last one is not taken out: `CoreOperations.drain`
            self.out[name] = None
            self.tell(service, partial(core.take_out, name))
        else:
            self.tell(service, partial(core.drain_instance, name))

    # --- services ------------------------------------------------------------------------------

    def _start_service(self, name: str) -> None:
        shape = self.storm.shape
        static: tuple[int, int] | None = None
        if ":" in shape.pd:
            prefill, _, decode = shape.pd.partition(":")
            static = int(prefill), int(decode)
        roles = RolesConfig(static=static, patience_s=0.5, pause_s=0.5)
        config = ServiceCoreConfig(
            max_queue=shape.max_queue,
            ttft_slo_s=shape.ttft_slo_s,
            tpot_slo_s=shape.tpot_slo_s,
            placement=PlacementConfig(refuses_late=shape.refuses_late, overdue_s=_OVERDUE_S),
            roles=RoleKeeperConfig(
                policy=None if shape.pd == "off" else roles,
                judged_after=shape.judged_after,
                hold_s=2.0,
            ),
        )
        self.world.add_service(
            name,
            () if self.registry is not None else shape.instances,
            policy=_policy(shape.policy),
            finder=lambda: IndexFinder(KvIndex(shape.index_blocks)),
            config=config,
        )
        self._service_is_up(name)

    def _service_is_up(self, name: str) -> None:
        core = self.services[name] = self.world.core(name)
        self._begin(name, core)
        if self.registry is not None:
            self.registry.join(core)
            return
        for instance in self.instances:
            if instance not in core.instances:
                self.tell(name, partial(core.add_instance, instance))
        term = 1000 + int(self.world.now)
        self.tell(name, partial(core.lead, term))

    def tell(self, service: str, call: Callable[[float], list[Effect]]) -> None:
        self.world.tell(service, call)

    # --- ends and beginnings -------------------------------------------------------------------

    def crash(self, fault: Crash) -> None:
        name = fault.node
        if name not in self.up:
            return
        self._goes(name)
        self.world.kill(name, words_arrive=fault.words_arrive)
        again = fault.again_after_s is not None and name not in self.out
        if name in SERVICES:
            for caller in self.callers:
                if caller.ask.service == name and caller.began:
                    caller.reset()
        elif fault.noticed or self._is_awaited(name):
            self._notice(name, coming_back=again)
        if again:
            assert fault.again_after_s is not None
            self.world.at(self.world.now + fault.again_after_s, partial(self.start_again, name))

    def leave(self, name: str, again_after_s: float) -> None:
        """A service that is told to stop."""
        if name not in self.up:
            return
        core = self.services[name]
        self.tell(name, lambda now: core.close_all(EngineUnavailable("the server is stopping")))
        again = Crash(
            at_s=self.world.now, node=name, words_arrive=True, again_after_s=again_after_s
        )
        self.crash(again)

    def _goes(self, name: str) -> None:
        del self.up[name]
        if self.registry is not None:
            self.registry.end(name)

    def _notice(self, name: str, *, coming_back: bool) -> None:
        """The supervisor is a part of the first service."""
        first = SERVICES[0]
        core = self.services[first]
        if name not in core.instances:
            return

        if coming_back:
            self._awaited[name] = None

        def lost(now: float) -> list[Effect]:
            if name in self.out:
                return core.on_drained(name, now)
            core.expect(name, coming_back)
            return core.on_instance_lost(name, now)

        self.tell(first, lost)

    def _is_awaited(self, name: str) -> bool:
        """A supervisor has started it, and it is not known yet: he notices its end."""
        known = self.services[SERVICES[0]].instances.get(name)
        if name not in self._awaited or known is None:
            return False
        return known.is_gone or known.incarnation != self.instances[name].card.incarnation

    def start_again(self, name: str) -> None:
        if name in self.up or name in self.out:
            return
        self.world.restart(name)
        (self._service_is_up if name in SERVICES else self._instance_is_up)(name)

    def _look(self, name: str) -> None:
        """After each event."""
        self.witness.look(name, self.world.now)
        if name in self.up and not self.world.lives(name):
            self._has_left(name)

    def _has_left(self, name: str) -> None:
        """Its core has asked for its end."""
        self._goes(name)
        if name in self.out:
            self.world.at(self.world.now, partial(self._notice, name, coming_back=False))
        else:
            self.world.at(self.world.now + RESTART_S, partial(self.start_again, name))

    # --- requests ------------------------------------------------------------------------------

    def _ask(self, caller: Caller) -> None:
        ask = caller.ask
        spec = spec_of(ask)
        caller.began = True
        self.world.submit_now(ask.service, spec, caller)
        if ask.cancel_after_s is not None:
            at_s = self.world.now + ask.cancel_after_s
            self.world.at(at_s, partial(self._cancel, caller, spec.request_id))

    def _cancel(self, caller: Caller, request_id: str) -> None:
        core = self.services[caller.ask.service]

        def go_away(now: float) -> list[Effect]:
            if not caller.waits:
                return []
            caller.goes_away()
            return core.cancel(request_id, None, now)

        self.tell(caller.ask.service, go_away)

    def close(self) -> None:
        if self.registry is not None:
            self.registry.end_all()


def _policy(name: str) -> Policy:
    return in_turn if name == "in-turn" else policy_named(name)
