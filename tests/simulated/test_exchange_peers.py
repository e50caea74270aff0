"""What an instance answers to peers and services, and what it refuses: message by message."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.engine.memory.tiers.index import TierSizes
from penstock.protocol.instance import Assign, Assigned
from penstock.protocol.kv import Ack, BlocksReady, Pull, Release
from penstock.protocol.request import Stage
from penstock.simulator.pacing import StepCost
from penstock.simulator.world import VOCAB_SIZE, World
from tests.helpers.peers import (
    HandService,
    check_nothing_is_left,
    keys_of,
    source_of,
    undisturbed,
)


def prompt(seed: int, num_tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, VOCAB_SIZE) for _ in range(num_tokens)]


class Bench:
    """Instance a, a service, and a peer that the test plays."""

    def __init__(self, **fields: Any) -> None:
        self.world = World(1)
        self.a = self.world.add_instance("a", **fields)
        self.service = HandService(self.world)
        self.peer = HandService(self.world, "p")
        self.service.attach("a")
        self.wait(0.1)

    def wait(self, seconds: float) -> None:
        self.world.run(self.world.now + seconds)

    def compute(self, ids: list[int], **fields: Any) -> None:
        request_id = f"r{len(self.service.finish)}"
        self.service.submit("a", request_id, ids, **fields)
        self.wait(2)
        assert (request_id, 1) in self.service.finish

    def pull(self, ids: list[int], transfer: str = "t", **changes: Any) -> None:
        card = self.a.card
        fields: dict[str, Any] = {
            "transfer": transfer,
            "receiver": "p",
            "receiver_incarnation": 1,
            "owner_incarnation": card.incarnation,
            "model_digest": card.model_digest,
            "layout_digest": card.layout.digest(),
            "keys": keys_of(ids),
            "means": {"map": "host", "tcp": ""},
            "wait_s": 1.0,
            "lease_s": 2.0,
        } | changes
        self.peer.say("a", Pull(**fields))
        self.wait(0.01)

    @property
    def offered(self) -> list[BlocksReady]:
        return [m for m in self.peer.heard if isinstance(m, BlocksReady)]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"owner_incarnation": 9}, "stale_incarnation"),
        ({"first_index": -1}, "protocol_error"),
        ({"lease_s": float("nan")}, "protocol_error"),
        ({"wait_s": -1.0}, "protocol_error"),
        ({"model_digest": "other"}, "other_model"),
        ({"layout_digest": "other"}, "other_layout"),
        ({"means": {"mooncake": ""}}, "no_means"),
        ({"means": {}}, "no_means"),
        ({"means": {"map": "another host"}}, "no_means"),
    ],
)
def test_partners_that_do_not_match_are_refused_at_once(change: dict[str, Any], code: str) -> None:
    bench = Bench()
    bench.compute(prompt(1, 64))
    bench.pull(prompt(1, 64), **change)
    (refused,) = bench.peer.refused
    assert (refused.what, refused.request_id, refused.code) == ("pull", "t", code)
    check_nothing_is_left(bench.a)


def test_the_receivers_first_means_that_both_have_is_taken() -> None:
    bench = Bench()
    bench.compute(prompt(1, 64))
    bench.pull(prompt(1, 64), "far", means={"map": "another host", "mooncake": "", "tcp": ""})
    bench.pull(prompt(1, 64), "near", means={"mooncake": "", "map": "host", "tcp": ""})
    assert [m.means for m in bench.offered] == ["tcp", "map"]
    assert [len(m.blocks) for m in bench.offered] == [4, 4] and all(m.last for m in bench.offered)


def test_what_cannot_be_pinned_is_said_at_once() -> None:
    bench = Bench(num_blocks=16)
    for seed in (1, 2):
        bench.compute(prompt(seed, 96))
    only_map = {"map": "host"}
    bench.pull(prompt(1, 96), "whole", means=only_map)
    bench.pull(prompt(2, 96), "part", means=only_map)
    bench.pull(prompt(2, 96), "none", means=only_map, first_index=2)
    assert [(m.transfer, len(m.blocks), m.last) for m in bench.offered] == [
        ("whole", 6, True),
        ("part", 2, True),
    ]
    assert [(m.request_id, m.code) for m in bench.peer.refused] == [("none", "no_room")]
    bench.pull(prompt(2, 96), "copied")
    assert (bench.offered[-1].means, len(bench.offered[-1].blocks)) == ("tcp", 6)
    bench.wait(3)
    check_nothing_is_left(bench.a)


def test_offers_end_with_their_release() -> None:
    bench = Bench()
    bench.compute(prompt(1, 64))
    bench.pull(prompt(1, 64))
    assert bench.a.scheduler.pool.num_held == 4
    bench.peer.say("a", Release("t", 2))  # a chain is held from its beginning
    bench.wait(0.01)
    assert bench.a.scheduler.pool.num_held == 4
    bench.peer.say("a", Release("t"))
    bench.wait(0.01)
    check_nothing_is_left(bench.a)


def test_offers_end_with_their_lease_unless_it_is_renewed() -> None:
    bench = Bench()
    bench.compute(prompt(1, 64))
    bench.pull(prompt(1, 64))
    for _ in range(4):
        bench.wait(1.5)
        bench.peer.say("a", Ack("t", 4))
    bench.wait(1)
    assert bench.a.scheduler.pool.num_held == 4
    bench.wait(2)
    check_nothing_is_left(bench.a)


def test_a_peer_that_is_started_again_needs_nothing_of_before() -> None:
    bench = Bench()
    bench.compute(prompt(1, 64))
    bench.pull(prompt(1, 64), "old", lease_s=50.0)
    bench.pull(prompt(1, 64), "new", receiver_incarnation=2, lease_s=1.0)
    bench.wait(1.5)
    check_nothing_is_left(bench.a)


def test_a_pull_that_comes_again_is_answered_from_where_it_asks() -> None:
    bench = Bench()
    bench.compute(prompt(1, 64))
    bench.pull(prompt(1, 64))
    bench.pull(prompt(1, 64), first_index=1)
    assert [(m.first_index, len(m.blocks)) for m in bench.offered] == [(0, 4), (1, 3)]
    assert len(bench.a.exchange.offers) == 1


def test_blocks_are_offered_as_chunks_finish() -> None:
    bench = Bench(cost=StepCost(base_s=0.1))
    ids = prompt(2, 640)  # three steps
    bench.service.submit("a", "r", ids, max_tokens=2)
    bench.pull(ids)
    assert [m.blocks for m in bench.offered] == [[]]  # the owner lives, and is at it
    bench.wait(1.5)
    found = [(m.first_index, len(m.blocks), m.last) for m in bench.offered if m.blocks]
    assert found == [(0, 16, False), (16, 16, False), (32, 8, True)]


def test_what_nobody_will_compute_is_not_waited_for() -> None:
    bench = Bench()
    bench.compute(prompt(1, 64))
    bench.pull([*prompt(1, 64), *prompt(3, 64)], wait_s=60.0)
    bench.wait(1)
    assert sum(len(m.blocks) for m in bench.offered) == 4
    assert [m.last for m in bench.offered][-1]


@pytest.mark.parametrize(("means", "num_pinned"), [("map", 20), ("tcp", 30)])
def test_pins_hold_a_share_of_the_pool_at_most(means: str, num_pinned: int) -> None:
    bench = Bench(num_blocks=40)
    bench.compute(prompt(1, 600), max_tokens=2)
    bench.pull(prompt(1, 600), means={means: "host" if means == "map" else ""})
    assert sum(len(m.blocks) for m in bench.offered) == num_pinned


def test_a_fetch_with_an_old_epoch_is_refused() -> None:
    bench = Bench()
    bench.service.say("a", Assign("decode", 5))
    bench.wait(0.01)
    source = source_of(bench.a, 4)
    bench.service.fetch("a", "r", prompt(1, 64), source, epoch=4)
    bench.wait(0.01)
    assert [(r.what, r.code) for r in bench.service.refused] == [("fetch", "stale_epoch")]
    bench.service.submit("a", "r", prompt(1, 64), plan=[Stage("decode", "a", 4)])
    bench.wait(0.01)
    assert bench.service.refused[-1].code == "stale_epoch"


def test_a_fetch_that_finds_no_room_is_refused() -> None:
    bench = Bench(num_blocks=30, cost=StepCost(base_s=0.1))
    bench.service.submit("a", "long", prompt(1, 300), max_tokens=100)
    bench.wait(1)
    bench.service.fetch("a", "r", prompt(2, 300), source_of(bench.a, 4))
    bench.wait(0.01)
    assert [(r.what, r.code) for r in bench.service.refused] == [("fetch", "no_room")]


def test_a_fetch_from_nowhere_ends_with_its_reason() -> None:
    bench = Bench(means=())
    other = bench.world.add_instance("b")
    bench.service.fetch("a", "r", prompt(2, 64), source_of(other, 4), lease_s=1.0)
    bench.wait(0.1)
    found = bench.service.fetched["r"]
    assert (found.num_blocks, found.num_wanted) == (0, 4) and "no means" in found.reason
    bench.wait(2)
    check_nothing_is_left(bench.a)


def test_what_a_dead_service_announced_is_freed() -> None:
    bench = Bench()
    other = bench.world.add_instance("b", cost=StepCost(base_s=5.0))
    bench.service.fetch("a", "r", prompt(2, 64), source_of(other, 4), lease_s=25.0)
    bench.wait(0.1)
    assert not bench.a.exchange.idle
    bench.world.kill("s")
    bench.wait(10)
    check_nothing_is_left(bench.a)


def test_every_service_hears_of_a_role() -> None:
    bench = Bench()
    bench.peer.attach("a")
    bench.wait(0.01)
    bench.service.say("a", Assign("prefill", 3))
    bench.wait(0.01)
    for service in (bench.service, bench.peer):
        (assigned,) = (m for m in service.heard if isinstance(m, Assigned))
        assert (assigned.role, assigned.epoch) == ("prefill", 3)


def test_what_was_evicted_comes_back_from_the_host() -> None:
    bench = Bench(num_blocks=24, tiers=TierSizes(host_blocks=64))
    first = prompt(1, 200)
    bench.compute(first, max_tokens=2)
    for seed in range(2, 6):
        bench.compute(prompt(seed, 200), max_tokens=2)
    bench.compute(first, max_tokens=8)
    assert bench.service.output("r5") == undisturbed(first, 8)
    moves = {m.means: m for m in bench.service.loads["a"].moves}
    assert moves["host"].blocks >= 6 and not moves["host"].failed
    assert {t.tier for t in bench.service.loads["a"].tiers} == {"host"}
    bench.wait(5)
    check_nothing_is_left(bench.a)


@pytest.mark.parametrize("seed", range(4))
def test_cuts_between_the_two_while_blocks_move(seed: int) -> None:
    """Whatever is lost between instances is asked for again or done without."""
    world = World(seed)
    cores = {name: world.add_instance(name, num_blocks=100) for name in "abc"}
    service = HandService(world)
    service.attach(*cores)
    world.run(0.1)
    draw = random.Random(seed)
    shared = prompt(seed, 300)
    wanted = {}
    for number in range(20):
        ids = shared[: draw.randrange(16, 300)] + prompt(50 + number, 20)
        here, there = draw.sample(sorted(cores), 2)
        wanted[f"r{number}"] = ids
        service.submit(
            here, f"r{number}", ids, source=source_of(cores[there], len(ids) // 16),
            at_s=0.1 + draw.random() * 2,
        )  # fmt: skip
    for _ in range(12):
        one, other = draw.sample(sorted(cores), 2)
        length_s = draw.choice((0.01, 0.1, 1.0, 5.0))
        world.at(0.1 + draw.random() * 2, lambda o=one, p=other, s=length_s: world.cut(o, p, s))
    world.run(30)
    for request_id, ids in wanted.items():
        assert service.finish[request_id, 1] == "length"
        assert service.output(request_id) == undisturbed(ids, 16)
    check_nothing_is_left(*cores.values())
