"""One run: a cluster, a trace, a seed, and what came of it.

    outcome = run(spec, requests, seed=7)

The cores, policies and books are those of production; only the clock, the network and the device
are simulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from penstock.engine.core import InstanceCore
from penstock.engine.memory.tiers.index import TierSizes
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.loadgen.costs import hardware_or_file
from penstock.loadgen.prompts import prompt_ids
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import PenstockError
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.protocol.request import SamplingParams
from penstock.service.cluster.finder import IndexFinder, NoFinder
from penstock.service.cluster.roles import RoleKeeperConfig
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.service.policies.roles import RolesConfig
from penstock.service.policies.routing import (
    ClusterView,
    Decision,
    Policy,
    RouteRequest,
    policy_named,
)
from penstock.simulator.data_plane import DataFaults
from penstock.simulator.gaps import GapHistogram
from penstock.simulator.outcome import Outcome, RoleChange, Sample
from penstock.simulator.runner import StepCost
from penstock.simulator.spec import GPUS_PER_HOST, ClusterSpec, PoolSpec
from penstock.simulator.world import NetworkFaults, World

SERVICE = "service"
#: Instances attach and roles are given before the first arrival.
WARM_UP_S = 3.0
SAMPLE_EVERY_S = 1.0


@dataclass(slots=True)
class _Seen:
    """What the client of one request sees."""

    world: World
    gaps: GapHistogram
    first_s: float = np.nan
    last_s: float = np.nan
    end_s: float = np.nan
    tokens: int = 0
    cached_tokens: int = 0
    finish: str = ""

    def take(self, delta: TokenDelta) -> None:
        if count := len(delta.ids):
            now = self.world.now
            if self.tokens:
                self.gaps.add((now - self.last_s) / count, count)
            else:
                self.first_s, self.cached_tokens = now, delta.cached_tokens
            self.tokens += count
            self.last_s = now
        if delta.finish is not None:
            assert not self.finish, "a second terminal reply"
            self.finish, self.end_s = delta.finish, self.world.now

    def refused(self, error: PenstockError) -> None:
        self.finish = "refused"


def run(
    spec: ClusterSpec,
    requests: Sequence[TraceRequest],
    *,
    seed: int = 0,
    mode: str = "exact",
    progress: Callable[[float], None] = lambda share: None,
) -> Outcome:
    """`progress` is told what share of the trace has arrived. Raises `ConfigError` for a cluster
    that cannot hold its model."""
    began_s = time.perf_counter()
    build = _Build(spec, seed)
    world, core = build.world, build.core
    seen, gaps = [], GapHistogram()
    for number, request in enumerate(requests):
        wanted = GenerationSpec(
            str(number),
            prompt_ids(request, number),
            SamplingParams(max_tokens=request.output_tokens, ignore_eos=True, seed=number),
            ttft_slo_s=None,
        )
        client = _Seen(world, gaps)
        seen.append(client)
        world.submit(SERVICE, wanted, WARM_UP_S + request.arrival_s, client)
    last_s = WARM_UP_S + requests[-1].arrival_s
    while world.now < last_s or len(core.journal):
        world.run(world.now + SAMPLE_EVERY_S)
        build.sample()
        progress(min(world.now / last_s, 1.0))
    return Outcome(
        spec=spec,
        seed=seed,
        mode=mode,
        instances=tuple(build.instances),
        arrival_s=np.array([r.arrival_s for r in requests]),
        first_s=np.array([s.first_s for s in seen]) - WARM_UP_S,
        end_s=np.array([s.end_s for s in seen]) - WARM_UP_S,
        input_tokens=np.array([float(r.input_tokens) for r in requests]),
        output_tokens=np.array([float(s.tokens) for s in seen]),
        cached_tokens=np.array([float(s.cached_tokens) for s in seen]),
        finish=[s.finish for s in seen],
        samples=build.samples,
        role_changes=build.role_changes,
        handovers=core.placement.num_handovers,
        resumed=core.placement.num_resumed,
        preemptions=sum(i.scheduler.stats.preemptions for i in build.instances.values()),
        gaps=gaps,
        wall_s=time.perf_counter() - began_s,
    )


@dataclass(slots=True)
class _Build:
    """The world of a spec, and what is noted about it."""

    spec: ClusterSpec
    seed: int
    world: World = field(init=False)
    core: ServiceCore = field(init=False)
    instances: dict[str, InstanceCore] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    role_changes: list[RoleChange] = field(default_factory=list)
    _busy_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.spec
        largest = max(
            (hardware_or_file(p.hardware) for p in spec.pools), key=lambda m: m.kv_bytes_per_token
        )
        block_s = BLOCK_TOKENS * largest.kv_bytes_per_token / (spec.link.kv_gbit * 1e9 / 8)
        self.world = World(
            self.seed,
            NetworkFaults(spec.link.latency_s, spec.link.jitter_s),
            DataFaults(block_s=block_s),
            counting=True,
        )
        for pool in spec.pools:
            for number in range(pool.count):
                self._add(pool, number)
        self.core = self.world.add_service(
            SERVICE,
            list(self.instances),
            policy=_policy(spec),
            finder=IndexFinder() if spec.kv_index else NoFinder(),
            config=_service(spec),
        )
        if spec.pd not in ("off", "pools"):
            self.core.lead(1, 0.0)

    def _add(self, pool: PoolSpec, number: int) -> None:
        model = hardware_or_file(pool.hardware, pool.max_num_batched_tokens, pool.max_num_seqs)
        kv_tokens = model.kv_tokens if pool.kv_tokens is None else pool.kv_tokens
        name, c, slow = f"{pool.name}-{number}", model.cost, pool.slowdown
        instance = self.instances[name] = self.world.add_instance(
            name,
            num_blocks=kv_tokens // BLOCK_TOKENS,
            cost=StepCost(
                slow * c.base_s,
                slow * c.per_token_s,
                slow * c.per_row_s,
                slow * c.per_context_token_s,
                slow * c.per_attention_s,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=pool.max_num_seqs,
                max_num_batched_tokens=pool.max_num_batched_tokens,
                max_model_len=pool.max_model_len,
                enable_prefix_caching=pool.enable_prefix_caching,
            ),
            host=f"{pool.name}-host-{number // GPUS_PER_HOST}",
            means=("tcp",),
            num_windows=0,
            tiers=TierSizes(
                pool.host_kv_tokens // BLOCK_TOKENS, pool.disk_kv_tokens // BLOCK_TOKENS
            ),
        )
        instance.role = pool.role

    def sample(self) -> None:
        """Note what every instance does, and which roles have changed since the last sample."""
        world, now = self.world, self.world.now
        before_s = self.samples[-1].at_s + WARM_UP_S if self.samples else 0.0
        stats = [core.scheduler.stats for core in self.instances.values()]
        busy = []
        for name in self.instances:
            total_s = world.busy_s(name)
            busy.append((total_s - self._busy_s.get(name, 0.0)) / (now - before_s))
            self._busy_s[name] = total_s
        roles = tuple(core.role for core in self.instances.values())
        if self.samples:
            for name, old, new in zip(self.instances, self.samples[-1].roles, roles):
                if old != new:
                    self.role_changes.append(RoleChange(now - WARM_UP_S, name, new))
        self.samples.append(
            Sample(
                at_s=now - WARM_UP_S,
                roles=roles,
                busy=tuple(busy),
                running=tuple(sum(s.running.values()) for s in stats),
                waiting=tuple(sum(s.waiting.values()) for s in stats),
                kv_used=tuple(s.kv_blocks_used / s.kv_blocks_total for s in stats),
            )
        )


def _policy(spec: ClusterSpec) -> Policy:
    policy = policy_named(spec.policy)

    def in_one_place(view: ClusterView, request: RouteRequest) -> Decision:
        return policy(view, replace(request, aggregated_because="the cluster has pd: off"))

    return in_one_place if spec.pd == "off" else policy


def _service(spec: ClusterSpec) -> ServiceCoreConfig:
    # Admission refuses where a TTFT SLO is set; without it everybody is measured.
    config = ServiceCoreConfig(
        max_queue=spec.max_queue,
        ttft_slo_s=spec.ttft_slo_s if spec.admission else None,
        tpot_slo_s=spec.tpot_slo_s,
    )
    if spec.pd in ("off", "pools"):
        return config
    roles = RolesConfig(
        static=spec.static_split, ttft_slo_s=spec.ttft_slo_s, tpot_slo_s=spec.tpot_slo_s
    )
    return replace(config, roles=RoleKeeperConfig(policy=roles))
