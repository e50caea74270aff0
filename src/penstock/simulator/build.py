"""The world of a `ClusterSpec`: its instances, links and service, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from penstock.engine.core import CoreConfig, InstanceCore
from penstock.engine.memory.tiers.index import TierSizes
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.step import SchedulerStats
from penstock.loadgen.costs import InstanceModel, hardware_or_file, known_hardware
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.cluster.finder import IndexFinder, NoFinder
from penstock.service.cluster.roles import RoleKeeperConfig
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.placement import PlacementConfig
from penstock.service.policies.roles import RolesConfig
from penstock.service.policies.routing import (
    ClusterView,
    Decision,
    Policy,
    RouteRequest,
    policy_named,
)
from penstock.simulator.calibration import calibrate
from penstock.simulator.data_plane import DataFaults
from penstock.simulator.network import NetworkFaults
from penstock.simulator.pacing import StepCost
from penstock.simulator.spec import ClusterSpec, PoolSpec
from penstock.simulator.world import World

SERVICE = "service"


@dataclass(frozen=True, slots=True)
class Deployment:
    world: World
    service: ServiceCore
    instances: dict[str, InstanceCore]
    _starts: dict[str, Callable[[], InstanceCore]]
    #: Incarnations that have died and been replaced, and what they computed, in seconds.
    _ended: list[InstanceCore] = field(default_factory=list)
    _ended_busy_s: dict[str, float] = field(default_factory=dict)

    def start_again(self, name: str) -> None:
        """A new process of the instance, which has died."""
        self.world.node(name).end()
        self._ended_busy_s[name] = self.busy_s(name)
        self._ended.append(self.instances[name])
        self.instances[name] = self._starts[name]()

    def busy_s(self, name: str) -> float:
        """Seconds that all incarnations of the instance have computed."""
        return self._ended_busy_s.get(name, 0.0) + self.world.busy_s(name)

    def stats(self) -> list[SchedulerStats]:
        """Of every incarnation of every instance."""
        return [c.scheduler.stats for c in (*self._ended, *self.instances.values())]


@dataclass(frozen=True, slots=True)
class Limits:
    """What every instance of a pool can hold of one request, prompt and answer together."""

    pool: PoolSpec
    model: InstanceModel
    kv_tokens: int

    def check(self, number: int, input_tokens: int, output_tokens: int) -> None:
        """Raises `ConfigError` for a request that no room could be made for."""
        pool, tokens = self.pool, input_tokens + output_tokens
        said = f"request {number} of the trace has {input_tokens} + {output_tokens} tokens"
        if tokens > pool.max_model_len:
            raise ConfigError(
                f"{said}, and the pool {pool.name} has max-model-len {pool.max_model_len}: raise "
                f"it to {tokens} or more"
            )
        if tokens > self.kv_tokens:
            raise ConfigError(
                f"{said}, and an instance of the pool {pool.name} ({pool.hardware}) has room for "
                f"{self.kv_tokens} tokens of KV: {self._what_holds(tokens)}"
            )

    def _what_holds(self, tokens: int) -> str:
        room = self.model.kv_tokens
        if self.pool.kv_tokens is not None and room >= tokens:
            return f"its hardware has room for {room}: raise kv-tokens, or leave it out"
        kind = self.pool.hardware.split(":")[1:2]
        able = [
            name
            for name, values in known_hardware().items()
            if kind == name.split(":")[1:2] and values["kv_tokens"] >= tokens
        ]
        if able:
            return f"more GPUs (TP), larger ones or fewer bits would hold it: {', '.join(able)}"
        return "no hardware that is known here holds it: leave such requests out of the trace"


def limits(spec: ClusterSpec) -> list[Limits]:
    """Of each pool. Any instance may be chosen for any request, so each must hold every one.
    Raises `ConfigError` for hardware without room for KV."""
    found = []
    for pool in spec.pools:
        model = _model(pool)
        kv_tokens = _kv_tokens(pool, model)
        found.append(Limits(pool, model, kv_tokens - kv_tokens % BLOCK_TOKENS))
    return found


def check_fits(spec: ClusterSpec, requests: Sequence[TraceRequest]) -> None:
    """Raises `ConfigError` where an instance cannot hold the longest request, saying what could."""

    def num_tokens(number: int) -> int:
        return requests[number].input_tokens + requests[number].output_tokens

    longest = max(range(len(requests)), key=num_tokens)
    for bound in limits(spec):
        bound.check(longest, requests[longest].input_tokens, requests[longest].output_tokens)


def build(spec: ClusterSpec, seed: int, engine: CoreConfig = CoreConfig()) -> Deployment:  # noqa: B008 (frozen)
    """Raises `ConfigError` for a cluster that cannot be."""
    limits(spec)
    models = {pool.name: _model(pool) for pool in spec.pools}
    kv_bytes_per_token = max(model.kv_bytes_per_token for model in models.values())
    block_gbit = BLOCK_TOKENS * kv_bytes_per_token * 8 / 1e9
    link = spec.link
    world = World(
        seed,
        NetworkFaults(link.latency_s, link.jitter_s),
        DataFaults(
            block_s=block_gbit / link.kv_gbit,
            host_block_s=block_gbit / link.host_kv_gbit,
            disk_block_s=block_gbit / link.disk_kv_gbit,
        ),
        counting=True,
    )
    instances: dict[str, InstanceCore] = {}
    starts: dict[str, Callable[[], InstanceCore]] = {}
    for pool in spec.pools:
        for number in range(pool.count):
            name = f"{pool.name}-{number}"
            starts[name] = partial(_add, world, pool, models[pool.name], name, engine)
            instances[name] = starts[name]()
    service = world.add_service(
        SERVICE,
        list(instances),
        policy=_policy(spec),
        finder=IndexFinder if spec.kv_index else NoFinder,
        config=_service(spec),
    )
    if spec.pd not in ("off", "pools"):
        world.tell(SERVICE, lambda now: service.lead(1, now))
    return Deployment(world, service, instances, starts)


def _add(
    world: World, pool: PoolSpec, model: InstanceModel, name: str, engine: CoreConfig
) -> InstanceCore:
    c = model.cost
    cost = StepCost(
        c.base_s, c.per_token_s, c.per_row_s, c.per_context_token_s, c.per_attention_s
    ).scaled(pool.slowdown)
    instance = world.add_instance(
        name,
        num_blocks=_kv_tokens(pool, model) // BLOCK_TOKENS,
        cost=cost,
        scheduler=SchedulerConfig(
            max_num_seqs=pool.max_num_seqs,
            max_num_batched_tokens=pool.max_num_batched_tokens,
            max_model_len=pool.max_model_len,
            enable_prefix_caching=pool.enable_prefix_caching,
        ),
        host=name,  # blocks are copied, nothing is mapped
        means=("tcp",),
        num_windows=0,
        core=engine,
        tiers=TierSizes(pool.host_kv_tokens // BLOCK_TOKENS, pool.disk_kv_tokens // BLOCK_TOKENS),
    )
    instance.role = pool.role
    calibrate(instance, cost)
    return instance


def _model(pool: PoolSpec) -> InstanceModel:
    return hardware_or_file(pool.hardware, pool.max_num_batched_tokens, pool.max_num_seqs)


def _kv_tokens(pool: PoolSpec, model: InstanceModel) -> int:
    found = model.kv_tokens if pool.kv_tokens is None else pool.kv_tokens
    if found < BLOCK_TOKENS:
        raise ConfigError(
            f"an instance of pool {pool.name!r} ({model.name}) has room for {found} tokens of KV "
            "beside the model: give it larger hardware, or a larger tensor-parallel size"
        )
    return found


def _policy(spec: ClusterSpec) -> Policy:
    policy = policy_named(spec.policy)

    def in_one_place(view: ClusterView, request: RouteRequest) -> Decision:
        return policy(view, replace(request, aggregated_because="the cluster has pd: off"))

    return in_one_place if spec.pd == "off" else policy


def _service(spec: ClusterSpec) -> ServiceCoreConfig:
    config = ServiceCoreConfig(
        max_queue=spec.max_queue,
        ttft_slo_s=spec.ttft_slo_s,
        tpot_slo_s=spec.tpot_slo_s,
        placement=PlacementConfig(refuses_late=spec.admission),
    )
    if spec.pd in ("off", "pools"):
        return config
    roles = RolesConfig(
        static=spec.static_split, ttft_slo_s=spec.ttft_slo_s, tpot_slo_s=spec.tpot_slo_s
    )
    return replace(config, roles=RoleKeeperConfig(policy=roles))
