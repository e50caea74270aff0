"""Interrupted sequences: who goes first, where each goes and how, and how well that was foreseen.
And what is ordered rather than suffered: drains, and scaling down and up again under load."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from penstock.engine.memory.tiers.index import TierSizes
from penstock.protocol.effects import Effect
from penstock.protocol.request import SamplingParams
from penstock.service.cluster.finder import IndexFinder
from penstock.service.core import ServiceCore
from penstock.service.explain import PlacementRecord
from penstock.service.generation import GenerationSpec
from penstock.service.policies.routing import policy_named
from penstock.service.policies.view import Candidate, ClusterView, Decision, RouteRequest
from penstock.simulator.pacing import StepCost
from penstock.simulator.world import VOCAB_SIZE, World
from tests.simulated.test_smoke import check_outcomes

#: A prompt of some hundred tokens takes as long as fetching it is worth thinking about.
SLOW_PROMPTS = StepCost(base_s=0.002, per_token_s=2e-4, per_row_s=5e-5)


def prompt(seed: int, num_tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, VOCAB_SIZE) for _ in range(num_tokens)]


def spec(name: str, prompt_ids: list[int], max_tokens: int = 60, **more: object) -> GenerationSpec:
    sampling = SamplingParams(max_tokens=max_tokens)
    return replace(GenerationSpec(name, prompt_ids, sampling), **more)  # type: ignore[arg-type]


class Guided:
    """A policy that sends everything to `to` while that is set."""

    def __init__(self, policy: str) -> None:
        self.to = ""
        self._policy = policy_named(policy)

    def __call__(self, view: ClusterView, request: RouteRequest) -> Decision:
        if not self.to:
            return self._policy(view, request)
        candidate = Candidate(instance=self.to, predicted_ttft_s=0.0)
        return Decision(policy="guided", instance=self.to, candidates=(candidate,), reason="")


def cluster(
    seed: int, names: str, policy: str | Guided = "kv-aware", tiers: TierSizes | None = None
) -> tuple[World, ServiceCore]:
    world = World(seed)
    for name in names:
        world.add_instance(name, num_blocks=400, cost=SLOW_PROMPTS, tiers=tiers or TierSizes())
    chosen = policy if isinstance(policy, Guided) else policy_named(policy)
    return world, world.add_service("s", list(names), policy=chosen, finder=IndexFinder())


def load(
    seed: int, count: int, every_s: float = 0.02, max_tokens: int = 120
) -> list[GenerationSpec]:
    draw = random.Random(seed)
    made = []
    for number in range(count):
        ids = prompt(1000 * seed + number, draw.randrange(20, 500))
        if number % 3 == 0:
            ids = prompt(seed, 160) + ids
        made.append(spec(f"r{number}", ids, draw.randrange(20, max_tokens)))
    return made


def recoveries(service: ServiceCore, requests: list[GenerationSpec]) -> list[PlacementRecord]:
    """Placements of interrupted sequences that came to a token."""
    found = []
    for request in requests:
        explained = service.explain(request.request_id)
        assert explained is not None
        for choice in explained.choices:
            found += [p for p in choice.placements if p.way and p.actual_ttft_s is not None]
    return found


# --- which way ------------------------------------------------------------------------------------


def interrupted(policy: str, drains: bool) -> tuple[World, ServiceCore, GenerationSpec]:
    """A sequence on `b`, whose whole prompt `a` has as well, loses `b`; `a` drains then or not."""
    guided = Guided(policy)
    world, service = cluster(1, "abc", guided)
    for number, name in enumerate("abcabc"):  # they learn what a step takes
        guided.to = name
        world.submit("s", spec(f"warm{number}", prompt(number, 300), 12), at_s=0.5 + 0.07 * number)
        world.run(until_s=0.55 + 0.07 * number)
    ids, guided.to = prompt(7, 480), "a"
    world.submit("s", spec("first", ids, 4), at_s=1.0)
    world.run(until_s=2.0)
    guided.to = "b"
    victim = spec("victim", ids, 200)
    world.submit("s", victim, at_s=2.0)
    world.run(until_s=2.4)
    guided.to = ""
    service.instances["a"].draining = drains
    world.kill("b", noticed_by="s")
    world.run(until_s=2.41)
    return world, service, victim


@pytest.mark.parametrize("policy", ["kv-aware", "slo-aware", "least-load"])
@pytest.mark.parametrize("drains", [False, True], ids=["a peer", "a peer that drains"])
def test_what_a_peer_has_is_weighed_against_computing(policy: str, drains: bool) -> None:
    world, service, victim = interrupted(policy, drains)
    entry = service.journal.get("victim/0")
    assert entry is not None and entry.emitted
    placement = entry.record.placements[-1]
    assert placement.because.startswith("moved") and placement.decision is not None
    here = next(c for c in placement.decision.candidates if c.instance == placement.instance)
    assert placement.way == here.ways[0].kind
    assert [w.predicted_s for w in here.ways] == sorted(w.predicted_s for w in here.ways)
    if drains:
        # Nobody that takes work has it: it comes from the one that leaves.
        assert (placement.way, placement.instance) == ("fetch", "c")
        assert (here.ways[0].source, here.ways[0].tokens) == ("a", 480)
        assert {w.kind for w in here.ways} == {"fetch", "recompute"}
        assert here.ways[0].predicted_s < here.ways[1].predicted_s
    else:
        assert (placement.way, placement.instance) == ("recompute", "a")
        assert here.ways[0].tokens == 480  # all but what was emitted since
    world.run(until_s=20.0)
    check_outcomes(world, [victim])
    done = recoveries(service, [victim])[-1]
    assert (done.cached_tokens or 0) >= 480 - 16
    counts = service.placement.recoveries.by_way[placement.way]
    assert counts.num == 1 and counts.recomputed_tokens == done.num_tokens - 480
    assert counts.predicted_s == done.predicted_ttft_s and counts.actual_s == done.actual_ttft_s


def test_it_is_loaded_from_a_slower_tier_where_that_is_faster() -> None:
    """`a` has the prompt only in host memory any more, `b` and its sequence die."""
    guided = Guided("kv-aware")
    world, service = cluster(3, "ab", guided, TierSizes(host_blocks=2000))
    ids, guided.to = prompt(7, 480), "a"
    world.submit("s", spec("first", ids, 4), at_s=1.0)
    for number in range(40):  # push it out of the device
        world.submit("s", spec(f"f{number}", prompt(100 + number, 400), 2), at_s=2.0 + 0.2 * number)
    world.run(until_s=16.0)
    guided.to = "b"
    victim = spec("victim", ids, 200)
    world.submit("s", victim, at_s=16.0)
    world.run(until_s=16.3)
    guided.to = ""
    world.kill("b", noticed_by="s")
    world.run(until_s=40.0)
    check_outcomes(world, [victim])
    (placement,) = recoveries(service, [victim])
    assert placement.way == "restore" and placement.decision is not None
    kinds = {w.kind: w.predicted_s for w in placement.decision.candidates[0].ways}
    assert kinds["restore"] < kinds["recompute"]
    assert service.placement.recoveries.by_way["restore"].num == 1
    assert (placement.cached_tokens or 0) >= 480 - 16


@pytest.mark.parametrize(
    ("policy", "seed"),
    [("kv-aware", 0), ("slo-aware", 1), ("least-load", 2), ("round-robin", 3)],
)
def test_the_chosen_way_is_the_fastest_foreseen_and_the_tokens_are_right(
    policy: str, seed: int
) -> None:
    world, service = cluster(seed, "abcd", policy, TierSizes(host_blocks=400))
    requests = load(seed, 120)
    for number, request in enumerate(requests):
        world.submit("s", request, at_s=1.0 + 0.02 * number)
    for number, name in enumerate("abc"):
        world.at(1.8 + 0.6 * number, lambda name=name: world.kill(name, noticed_by="s"))
        world.at(2.6 + 0.6 * number, lambda name=name: world.restart(name))
    world.run(until_s=60.0)
    check_outcomes(world, requests)
    service.check()
    found = recoveries(service, requests)
    assert len(found) > 10
    for placement in found:
        assert placement.decision is not None
        here = next(c for c in placement.decision.candidates if c.instance == placement.instance)
        fastest = min(here.ways, key=lambda way: way.predicted_s)
        assert (placement.way, placement.source) == (fastest.kind, fastest.source)
    counts = service.placement.recoveries.by_way
    assert sum(c.num for c in counts.values()) == len(found)


# --- many at once ---------------------------------------------------------------------------------


def test_those_who_are_placed_together_are_foreseen_together() -> None:
    """Several of a dead instance share steps on the next: each gets its token with the last one in
    its step, and that is what is predicted."""
    ratios = []
    for seed in range(3):
        world, service = cluster(seed, "abcd")
        requests = load(seed, 160)
        for number, request in enumerate(requests):
            world.submit("s", request, at_s=1.0 + 0.03 * number)
        for number in range(4):
            name = "abcd"[number]
            world.at(2.5 + 0.8 * number, lambda w=world, n=name: w.kill(n, noticed_by="s"))
            world.at(3.1 + 0.8 * number, lambda w=world, n=name: w.restart(n))
        world.run(until_s=60.0)
        check_outcomes(world, requests)
        for placement in recoveries(service, requests):
            if placement.predicted_ttft_s and placement.actual_ttft_s:
                ratios.append(placement.actual_ttft_s / placement.predicted_ttft_s)
    assert len(ratios) > 40
    assert 0.7 < np.median(ratios) < 1.4
    assert np.quantile(ratios, 0.9) < 2.5 and np.quantile(ratios, 0.1) > 0.4


@pytest.mark.parametrize("policy", ["kv-aware", "slo-aware", "least-load"])
def test_a_whole_instances_worth_is_spread(policy: str) -> None:
    world, service = cluster(5, "abcde", policy)
    requests = [spec(f"r{i}", prompt(i, 200), 300) for i in range(40)]
    for number, request in enumerate(requests):
        world.submit("s", request, at_s=1.0 + 0.03 * number)
    world.run(until_s=2.4)
    before = {name: len(service.instances[name].entries) for name in "abcde"}
    victim = max(before, key=before.__getitem__)
    lost = before.pop(victim)
    world.kill(victim, noticed_by="s")
    world.run(until_s=2.401)
    got = {name: len(service.instances[name].entries) - had for name, had in before.items()}
    assert lost >= 6 and sum(got.values()) == lost
    assert max(got.values()) <= lost // 4 + 2
    world.run(until_s=60.0)
    check_outcomes(world, requests)


def test_who_is_urgent_goes_first() -> None:
    guided = Guided("least-load")
    world, service = cluster(6, "ab", guided)
    made = [
        spec("offline", prompt(1, 100), 100, request_class="offline"),
        spec("plain", prompt(2, 100), 100),
        spec("later", prompt(3, 100), 100, priority=1),
        spec("steady", prompt(4, 100), 100, tpot_slo_s=0.5),
        spec("tight", prompt(5, 100), 100, tpot_slo_s=0.05),
        spec("hopeless", prompt(6, 100), 100, tpot_slo_s=1e-6),
        spec("first", prompt(8, 100), 100, priority=-1),
    ]
    guided.to = "a"
    for request in made:
        world.submit("s", request, at_s=1.0)
    world.run(until_s=1.2)
    assert len(service.instances["a"].entries) == len(made)
    guided.to = ""
    world.kill("a", noticed_by="s")
    order = [entry.request_id for entry in service.instances["b"].waiting.values()]
    assert order == ["first", "tight", "steady", "hopeless", "plain", "later", "offline"]
    world.run(until_s=30.0)
    check_outcomes(world, made)


# --- in order -------------------------------------------------------------------------------------


class Operator:
    """Takes instances out for good and brings them back, as the driver and a roster do."""

    def __init__(self, world: World, service: ServiceCore) -> None:
        self.world, self.service = world, service
        self.out: dict[str, None] = {}
        self._look()

    def take_out(self, name: str) -> None:
        self.out[name] = None
        self.world.tell("s", lambda now: self.service.take_out(name, now))

    def bring_back(self, name: str) -> None:
        assert self.service.instances[name].state == "drained", name
        del self.out[name]
        self.world.restart(name)
        self.service.instances[name].bring_back()
        self.service.expect(name, True)

    def _look(self) -> None:
        for name in self.out:
            if self.world.left(name) and self.service.instances[name].state != "drained":
                self.world.tell("s", lambda now, name=name: self._gone(name, now))
        self.world.at(self.world.now + 0.1, self._look)

    def _gone(self, name: str, now: float) -> list[Effect]:
        return self.service.on_drained(name, now)


@pytest.mark.parametrize(("policy", "seed"), [("kv-aware", 0), ("slo-aware", 1), ("least-load", 2)])
def test_five_two_five_under_load_and_nobody_notices(policy: str, seed: int) -> None:
    world, service = cluster(seed, "abcde", policy)
    operator = Operator(world, service)
    requests = load(seed, 300, max_tokens=100)
    for number, request in enumerate(requests):
        world.submit("s", request, at_s=1.0 + 0.04 * number)
    for number, name in enumerate("abc"):
        world.at(4.0 + 0.5 * number, lambda name=name: operator.take_out(name))
        world.at(9.0 + 0.5 * number, lambda name=name: operator.bring_back(name))
    world.run(until_s=8.9)
    states = Counter(i.state for i in service.instances.values())
    assert states == {"active": 2, "drained": 3}
    world.run(until_s=80.0)
    check_outcomes(world, requests)
    ends = Counter(end for a in world.outcomes.values() for e in a.finish.values() for end in e)
    assert set(ends) <= {"length", "stop"} and sum(ends.values()) == len(requests)
    assert service.placement.num_resumed == 0 and service.placement.num_migrated > 0
    assert all(i.state == "active" for i in service.instances.values())
    service.check()
