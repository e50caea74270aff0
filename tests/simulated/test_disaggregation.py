"""Clusters that prefill in one place and decode in another, under everything that can go wrong.

Each request must have one terminal reply and the tokens of an undisturbed run, whatever dies, stops
or is cut off; the counters of the service must be exact after every event; and nothing may be left
behind in the engines.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from penstock.engine.core import InstanceCore
from penstock.protocol.effects import Effect
from penstock.protocol.errors import InvalidRequest
from penstock.protocol.instance import Assign
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.protocol.request import SamplingParams
from penstock.service.cluster.finder import IndexFinder
from penstock.service.cluster.roles import RoleKeeperConfig
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import GenerationSpec
from penstock.service.placement import PlacementConfig
from penstock.service.policies.roles import RolesConfig
from penstock.service.policies.routing import kv_aware, policy_named, slo_aware
from penstock.service.policies.view import Candidate, ClusterView, Decision, Policy, RouteRequest
from penstock.simulator.world import SMALL_SCHEDULER, VOCAB_SIZE, NetworkFaults, World
from tests.simulated.test_smoke import check_outcomes, specs

NAMES = ("a", "b", "c", "d", "e")


def always_apart(view: ClusterView, request: RouteRequest) -> Decision:
    """Every request that may be split is, over all pairs in turn."""
    names = view.names
    first = names[request.number % len(names)]
    decode = None
    if request.prefilled_on is None and not request.aggregated_because and len(names) > 1:
        others = [name for name in names if name != first]
        decode = others[request.number // len(names) % len(others)]
    return Decision(
        policy="always-apart",
        instance=first,
        candidates=(Candidate(instance=first, predicted_ttft_s=0.0),),
        reason="in turn",
        decode=decode,
    )


class Checked(ServiceCore):
    """Counts everything anew after each event."""

    def on_message(self, *args: object) -> list[Effect]:  # type: ignore[override]
        return self._checked(super().on_message(*args))  # type: ignore[arg-type]

    def on_timer(self, now: float) -> list[Effect]:
        return self._checked(super().on_timer(now))

    def submit(self, spec: GenerationSpec, now: float) -> list[Effect]:
        return self._checked(super().submit(spec, now))

    def cancel(self, request_id: str, choice: int | None, now: float) -> list[Effect]:
        return self._checked(super().cancel(request_id, choice, now))

    def on_instance_lost(self, name: str, now: float) -> list[Effect]:
        return self._checked(super().on_instance_lost(name, now))

    def _checked(self, effects: list[Effect]) -> list[Effect]:
        self.check()
        return effects


@dataclass
class Cluster:
    world: World
    service: ServiceCore
    engines: dict[str, InstanceCore]
    num_blocks: int

    def restart(self, name: str) -> None:
        self.engines[name] = self.world.add_instance(name, num_blocks=self.num_blocks)

    def call(self, at_s: float, call: Callable[[float], list[Effect]]) -> None:
        """Something that the service's driver tells its core."""
        self.world.at(at_s, lambda: self.world.tell("s", call))

    def check_nothing_is_left(self) -> None:
        self.service.check()
        assert len(self.service.journal) == 0
        for instance in self.service.instances.values():
            assert (instance.queued_tokens, instance.running, instance.running_tokens) == (0, 0, 0)
            assert not instance.entries and not instance.coming and not instance.waiting
        for name, engine in self.engines.items():
            if self.world.lives(name):
                engine.scheduler.check()
                engine.exchange.check()
                assert not engine.scheduler.has_work(), name
                assert engine.exchange.idle, name


def cluster(
    seed: int,
    size: int,
    policy: Policy,
    faults: NetworkFaults | None = None,
    *,
    num_blocks: int = 160,
    config: ServiceCoreConfig | None = None,
) -> Cluster:
    world = World(seed, faults)
    names = list(NAMES[:size])
    engines = {name: world.add_instance(name, num_blocks=num_blocks) for name in names}
    service = world.add_service(
        "s", names, policy=policy, finder=IndexFinder(), config=config or ServiceCoreConfig()
    )
    service.__class__ = Checked
    return Cluster(world, service, engines, num_blocks)


def long_specs(seed: int, count: int) -> list[GenerationSpec]:
    """As in the smoke tests, with more of those that take their time."""
    draw = random.Random(seed)
    return [
        replace(spec, sampling=SamplingParams(max_tokens=draw.choice((1, 2, 30, 80, 160))))
        for spec in specs(seed, count)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_every_request_split_comes_out_as_it_would_have(seed: int) -> None:
    c = cluster(seed, 2 + seed % 3, always_apart)
    requests = long_specs(seed, 40)
    for i, spec in enumerate(requests):
        c.world.submit("s", spec, at_s=0.5 + 0.05 * i)
    c.world.run(until_s=40.0)
    check_outcomes(c.world, requests)
    c.check_nothing_is_left()
    assert c.service.placement.num_handovers > 20
    assert c.service.placement.num_resumed == 0
    whole_tokens, found_tokens = handed_over(c, requests)
    assert found_tokens >= 0.98 * whole_tokens  # what was computed came along


def handed_over(c: Cluster, requests: list[GenerationSpec]) -> tuple[int, int]:
    """Tokens of whole blocks at the hand-overs, and those that were found where it went on."""
    whole = found = 0
    for spec in requests:
        explanation = c.service.explain(spec.request_id)
        assert explanation is not None
        for placement in (p for choice in explanation.choices for p in choice.placements):
            if placement.because == "handover" and placement.actual_ttft_s is not None:
                whole += (placement.num_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
                found += placement.cached_tokens or 0
    return whole, found


@pytest.mark.parametrize("seed", range(10))
def test_kills_and_losses_end_in_the_right_tokens(seed: int) -> None:
    size = 2 + seed % 4
    c = cluster(seed, size, always_apart, NetworkFaults(duplicate=0.1, loss=0.003))
    draw = random.Random(seed + 1)
    requests = long_specs(seed, 40)
    for spec in requests:
        c.world.submit("s", spec, at_s=0.5 + draw.random() * 6)
    for number in range(4):
        name = draw.choice(NAMES[:size])
        at_s = 1.0 + 2.0 * number + draw.random()
        told = draw.choice(("s", None))

        def die(name: str = name, told: str | None = told) -> None:
            if c.world.lives(name):
                c.world.kill(name, noticed_by=told)

        def rise(name: str = name) -> None:
            if not c.world.lives(name):
                c.restart(name)

        c.world.at(at_s, die)
        c.world.at(at_s + 1.2, rise)
    c.world.run(until_s=90.0)
    check_outcomes(c.world, requests)
    c.check_nothing_is_left()


@pytest.mark.parametrize("seed", range(10))
def test_cuts_and_zombies_end_in_the_right_tokens(seed: int) -> None:
    """Also between instances, which then cannot fetch from each other."""
    size = 2 + seed % 4
    c = cluster(seed, size, always_apart, NetworkFaults(duplicate=0.05, loss=0.002))
    draw = random.Random(seed + 50)
    requests = long_specs(seed, 40)
    for spec in requests:
        c.world.submit("s", spec, at_s=0.5 + draw.random() * 15)
    for _ in range(5):
        at_s, for_s = 1 + draw.random() * 14, draw.choice((0.3, 1.5, 4.0, 10.0))
        one, other = draw.sample(("s", *NAMES[:size]), 2)
        if draw.random() < 0.6:
            c.world.at(at_s, lambda p=(one, other), t=for_s: c.world.cut(*p, t))
        else:
            c.world.at(at_s, lambda n=one, t=for_s: c.world.stop(n, t))
    c.world.run(until_s=150.0)
    check_outcomes(c.world, requests, may_be_unavailable=True)
    c.check_nothing_is_left()


@pytest.mark.parametrize("victim", ["a", "b"])
@pytest.mark.parametrize("how", ["kill", "stop", "cut"])
@pytest.mark.parametrize("at_s", [1.004, 1.012, 1.03, 1.3])
def test_nobody_waits_longer_than_the_bound(victim: str, how: str, at_s: float) -> None:
    """Nobody tells the service: it must hear the silence, whatever the request was at."""
    c = cluster(1, 3, prefill_on("a", "b"))
    spec = GenerationSpec("r", list(range(1, 401)), SamplingParams(max_tokens=120, ignore_eos=True))
    c.world.submit("s", spec, at_s=1.0)
    faults: dict[str, Callable[[], None]] = {
        "kill": lambda: c.world.kill(victim),
        "stop": lambda: c.world.stop(victim, 30.0),
        "cut": lambda: c.world.cut("s", victim, 30.0),
    }
    c.world.at(at_s, faults[how])
    c.world.run(until_s=60.0)
    outcome = c.world.outcomes["r"]
    assert outcome.finish[0] == ["length"] and len(outcome.ids[0]) == 120
    times = [1.0, *(float(line.split()[0]) for line in c.world.history if " reply r " in line)]
    assert max(later - earlier for earlier, later in pairwise(times)) < 5.0
    c.check_nothing_is_left()


def prefill_on(first: str, decode: str) -> Policy:
    """What is split goes there while both are; everything else to the last instance."""

    def policy(view: ClusterView, request: RouteRequest) -> Decision:
        apart = {first, decode} <= set(view.names) and not request.aggregated_because
        name = first if apart else view.names[-1]
        return Decision(
            policy="told",
            instance=name,
            candidates=(Candidate(instance=name, predicted_ttft_s=0.0),),
            reason="told",
            decode=decode if apart and request.prefilled_on is None else None,
        )

    return policy


def test_a_prefix_is_fetched_from_who_has_it() -> None:
    """The policy finds blocks by the index, fetching looks faster than computing, and is."""
    c = cluster(2, 2, kv_aware, num_blocks=400)
    draw = random.Random(2)
    shared = [draw.randrange(1, VOCAB_SIZE) for _ in range(480)]
    requests = [
        GenerationSpec(f"r{i}", [*shared, i + 1, 7], SamplingParams(max_tokens=100))
        for i in range(24)
    ]
    c.world.submit("s", requests[0], at_s=0.5)
    for spec in requests[1:]:
        c.world.submit("s", spec, at_s=3.0)
    c.world.run(until_s=40.0)
    check_outcomes(c.world, requests)
    c.check_nothing_is_left()
    explained = [c.service.explain(r.request_id) for r in requests]
    placements = [e.choices[0].placements[0] for e in explained if e is not None]
    fetched = [p for p in placements if p.source is not None]
    assert fetched and all(p.fetched is not None for p in fetched)
    assert any((p.cached_tokens or 0) >= 480 for p in fetched)
    assert len({p.instance for p in placements}) == 2


def test_what_comes_too_late_anyway_is_refused_and_the_rest_is_in_time() -> None:
    config = ServiceCoreConfig(ttft_slo_s=0.5)
    c = cluster(3, 2, slo_aware, config=config)
    draw = random.Random(3)
    requests = [
        GenerationSpec(
            f"r{i}",
            [draw.randrange(1, VOCAB_SIZE) for _ in range(600)],
            SamplingParams(max_tokens=20, ignore_eos=True),
        )
        for i in range(120)
    ]
    for i, spec in enumerate(requests):
        c.world.submit("s", spec, at_s=1.0 + 0.3 * i if i < 20 else 8.0)
    c.world.run(until_s=60.0)
    refused = [r for r in requests if c.world.outcomes[r.request_id].finish[0] == ["overloaded"]]
    served = [r for r in requests if r not in refused]
    assert len(served) > 20 and len(refused) > 20
    c.check_nothing_is_left()
    explained = [c.service.explain(r.request_id) for r in served]
    late = [e for e in explained if e is not None and (e.choices[0].ttft_s or 9.0) > 0.5 * 1.5]
    assert len(late) < 0.1 * len(served)  # predictions err, but not by much


def test_cancels_in_the_middle_leave_nothing() -> None:
    c = cluster(5, 3, always_apart)
    requests = long_specs(5, 40)
    for i, spec in enumerate(requests):
        c.world.submit("s", spec, at_s=0.5)
        if i % 2:
            c.world.cancel("s", spec.request_id, at_s=0.5 + 0.004 * i)
    c.world.run(until_s=60.0)
    check_outcomes(c.world, requests[::2])
    c.check_nothing_is_left()


@pytest.mark.parametrize("seed", range(4))
def test_a_drain_loses_nothing_and_the_instance_goes(seed: int) -> None:
    c = cluster(seed, 3, always_apart)
    draw = random.Random(seed)
    requests = long_specs(seed, 40)
    for spec in requests:
        c.world.submit("s", spec, at_s=0.5 + draw.random() * 3)
    c.call(2.0, lambda now: c.service.drain_instance("b", now))
    c.world.run(until_s=8.0)
    engine = c.engines["b"]
    assert engine.draining and not engine.scheduler.has_work()
    c.world.run(until_s=60.0)
    check_outcomes(c.world, requests)
    assert c.service.placement.num_resumed == 0
    assert all(o.finish for o in c.world.outcomes.values())


def roles_config(static: tuple[int, int] | None = None) -> ServiceCoreConfig:
    policy = RolesConfig(static=static, patience_s=0.5, pause_s=0.5)
    return ServiceCoreConfig(
        roles=RoleKeeperConfig(policy=policy), placement=PlacementConfig(migrated_at_once=4)
    )


def test_a_static_split_is_brought_about_and_kept() -> None:
    c = cluster(1, 4, slo_aware, config=roles_config(static=(1, 3)))
    c.call(0.5, lambda now: c.service.lead(1, now))
    c.world.run(until_s=15.0)
    assert sorted(e.role for e in c.engines.values()) == ["decode", "decode", "decode", "prefill"]
    prefill = next(name for name, e in c.engines.items() if e.role == "prefill")
    c.world.kill(prefill, noticed_by="s")
    c.restart(prefill)
    c.world.run(until_s=30.0)
    assert sorted(e.role for e in c.engines.values()) == ["decode", "decode", "decode", "prefill"]
    assert {i.role for i in c.service.instances.values()} == {"decode", "prefill"}


@pytest.mark.parametrize("seed", range(6))
def test_roles_that_change_all_the_time_lose_nothing(seed: int) -> None:
    """By hand, at random, under load and losses: also on instances that die meanwhile."""
    size = 3 + seed % 3
    c = cluster(seed, size, slo_aware, NetworkFaults(duplicate=0.05, loss=0.002))
    draw = random.Random(seed + 7)
    requests = long_specs(seed, 50)
    for spec in requests:
        c.world.submit("s", spec, at_s=1.0 + draw.random() * 8)
    c.call(0.5, lambda now: c.service.lead(1, now))
    roles = ("any", "prefill", "decode", "prefill_to_decode", "decode_to_prefill")

    def turn(now: float) -> list[Effect]:
        try:
            return c.service.assign(draw.choice(NAMES[:size]), draw.choice(roles), now)
        except InvalidRequest:
            return []  # the floors hold

    for number in range(30):
        c.call(1.0 + 0.3 * number, turn)
    c.call(5.0, lambda now: c.service.lead(2, now))
    c.world.at(6.0, lambda: c.world.kill("a", noticed_by="s"))
    c.world.at(7.0, lambda: c.restart("a"))
    c.world.run(until_s=90.0)
    check_outcomes(c.world, requests)
    c.check_nothing_is_left()
    for name, engine in c.engines.items():
        assert c.service.instances[name].role == engine.role
        assert c.service.instances[name].epoch == engine.epoch
    assert any(e.epoch >> 32 == 2 for e in c.engines.values())


def test_an_older_leaders_word_is_refused() -> None:
    c = cluster(3, 2, slo_aware)
    other = c.world.add_service("t", ["a", "b"], policy=slo_aware)
    c.call(0.5, lambda now: c.service.lead(2, now))
    c.call(0.6, lambda now: c.service.assign("a", "prefill", now))
    c.world.run(until_s=1.0)
    c.world.send("t", "a", Assign("decode", 1 << 32 | 7))
    c.world.run(until_s=2.0)
    assert c.engines["a"].role == "prefill"
    assert other.instances["a"].role == "prefill"  # told by the instance itself


@pytest.mark.parametrize("elected", [True, False])
def test_a_service_started_again_on_an_earlier_clock_leads_within_seconds(elected: bool) -> None:
    c = cluster(3, 3, slo_aware, config=roles_config(static=(1, 2)))
    c.call(0.5, lambda now: c.service.lead(90_000, now, elected=elected))
    c.world.run(until_s=10.0)
    assert sorted(e.role for e in c.engines.values()) == ["decode", "decode", "prefill"]
    c.world.kill("s")
    config = replace(roles_config(static=(2, 1)), name="t")
    later = c.world.add_service("t", NAMES[:3], policy=slo_aware, config=config)
    # An hour is 3600 terms; and the registry that elects has forgotten the last one.
    c.world.tell("t", lambda now: later.lead(90_000 - 3600, now, elected=elected))
    c.world.run(until_s=20.0)
    assert sorted(e.role for e in c.engines.values()) == ["decode", "prefill", "prefill"]
    assert later.roles.term == 90_001 and not later.roles.has_yielded


def test_two_routers_over_one_cluster() -> None:
    c = cluster(4, 3, always_apart)
    other = c.world.add_service("t", ["a", "b", "c"], policy=always_apart, finder=IndexFinder())
    mine = [replace(spec, request_id=f"s{i}") for i, spec in enumerate(long_specs(4, 25))]
    theirs = [replace(spec, request_id=f"t{i}") for i, spec in enumerate(long_specs(9, 25))]
    for i, (spec, another) in enumerate(zip(mine, theirs)):
        c.world.submit("s", spec, at_s=0.5 + 0.1 * i)
        c.world.submit("t", another, at_s=0.5 + 0.1 * i)
    c.world.at(2.0, lambda: c.world.kill("t"))
    c.world.run(until_s=60.0)
    check_outcomes(c.world, mine)
    c.check_nothing_is_left()
    assert len(other.journal) > 0  # it died with them


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_more_storms(seed: int) -> None:
    test_kills_and_losses_end_in_the_right_tokens(seed)
    test_cuts_and_zombies_end_in_the_right_tokens(seed)
    test_roles_that_change_all_the_time_lose_nothing(seed)


def test_one_seed_one_history_with_everything_on() -> None:
    def history() -> list[str]:
        c = cluster(8, 3, always_apart, NetworkFaults(duplicate=0.1, loss=0.005))
        for i, spec in enumerate(long_specs(8, 15)):
            c.world.submit("s", spec, at_s=0.5 + 0.1 * i)
        c.world.at(1.0, lambda: c.world.kill("a", noticed_by="s"))
        c.world.run(until_s=20.0)
        return c.world.history

    assert history() == history()


@pytest.mark.parametrize("caching", [True, False])
def test_a_hand_over_takes_the_prompt_along_also_where_prefixes_are_not_shared(
    caching: bool,
) -> None:
    """The runner finds wrong blocks out; two requests with one prompt show whether it is shared."""
    world = World(1)
    scheduler = replace(SMALL_SCHEDULER, enable_prefix_caching=caching)
    engines = [world.add_instance(name, scheduler=scheduler) for name in ("a", "b")]
    roles = RoleKeeperConfig(policy=RolesConfig(static=(1, 1)))
    service = world.add_service(
        "s", ["a", "b"], policy=policy_named("split"), config=ServiceCoreConfig(roles=roles)
    )
    world.tell("s", lambda now: service.lead(1, now))
    world.run(3.0)
    sampling = SamplingParams(max_tokens=40)
    specs = [GenerationSpec(f"r{n}", list(range(1, 401)), sampling) for n in range(2)]
    for n, spec in enumerate(specs):
        world.submit("s", spec, 3.1 + 2 * n)
    world.run(9.0)
    check_outcomes(world, specs)
    prefill, decode = (engine.scheduler.stats.scheduled_tokens for engine in engines)
    assert service.placement.num_handovers == 2
    assert prefill == (400 + 16 if caching else 2 * 400)
    assert decode <= 2 * (39 + BLOCK_TOKENS)
    assert engines[1].scheduler.stats.prefix_hit_tokens >= 2 * 384
    for engine in engines:
        engine.scheduler.check()
        engine.exchange.check()
