"""Blocks between instances on a virtual clock: fetched, handed over, borrowed, and lost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from penstock.engine.core import InstanceCore
from penstock.protocol.kv import KvSource
from penstock.protocol.request import Stage
from penstock.simulator.data_plane import DataFaults
from penstock.simulator.pacing import StepCost
from penstock.simulator.world import VOCAB_SIZE, NetworkFaults, World
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


class Pair:
    """Instances a and b, attached to a service that the test plays."""

    def __init__(
        self,
        seed: int = 1,
        faults: NetworkFaults | None = None,
        data_faults: DataFaults | None = None,
        **fields: object,
    ) -> None:
        self.world = World(seed, faults, data_faults)
        self.a = self.world.add_instance("a", **fields)  # type: ignore[arg-type]
        self.b = self.world.add_instance("b", **fields)  # type: ignore[arg-type]
        self.service = HandService(self.world)
        self.service.attach("a", "b")
        self.world.run(0.1)

    def wait(self, seconds: float) -> None:
        self.world.run(self.world.now + seconds)

    def until(self, condition: Callable[[], bool], within_s: float = 20.0) -> None:
        end_s = self.world.now + within_s
        while not condition():
            assert self.world.now < end_s, "it does not happen"
            self.wait(0.001)

    def finished(self, request_id: str, attempt: int = 1) -> Callable[[], bool]:
        return lambda: (request_id, attempt) in self.service.finish

    def hand_over(self, ids: list[int], *, request_id: str = "r", max_tokens: int = 16) -> None:
        """What a service does: both are told at once; the sequence follows its first token."""
        num_blocks = len(ids) // 16
        plan = [Stage("prefill", "a"), Stage("decode", "b")]
        self.service.submit("a", request_id, ids, max_tokens=max_tokens, plan=plan)
        self.service.fetch("b", request_id, ids, source_of(self.a, num_blocks))
        self.until(self.finished(request_id))
        if self.service.finish[request_id, 1] == "handover":
            self.service.submit(
                "b", request_id, ids, max_tokens=max_tokens, attempt=2, resumed=1,
                plan=[Stage("decode", "b")],
            )  # fmt: skip
            self.until(self.finished(request_id, 2))


@pytest.mark.parametrize("means", [("map", "tcp"), ("tcp",)])
def test_a_prefix_is_fetched_from_a_peer(means: tuple[str, ...]) -> None:
    pair = Pair(means=means)
    ids = prompt(1, 200)
    pair.service.submit("a", "first", ids)
    pair.until(pair.finished("first"))
    pair.service.submit("b", "second", ids, source=source_of(pair.a, 12))
    pair.until(pair.finished("second"))
    assert pair.service.output("second") == undisturbed(ids, 16)
    fetched = pair.service.fetched["second"]
    assert (fetched.num_blocks, fetched.num_wanted, fetched.means) == (12, 12, means[0])
    assert fetched.reason == ""
    assert pair.b.scheduler.stats.prefix_hit_tokens == 192
    pair.wait(5)
    check_nothing_is_left(pair.a, pair.b)


@pytest.mark.parametrize("means", [("map", "tcp"), ("tcp",)])
@pytest.mark.parametrize("num_tokens", [5, 16, 100, 700])
def test_a_request_is_handed_over(means: tuple[str, ...], num_tokens: int) -> None:
    pair = Pair(means=means)
    ids = prompt(num_tokens, num_tokens)
    pair.hand_over(ids)
    assert pair.service.finish["r", 1] == "handover"
    assert pair.service.output("r") == undisturbed(ids, 16)
    whole_blocks = num_tokens // 16
    assert pair.b.scheduler.stats.prefix_hit_tokens == whole_blocks * 16
    pair.wait(8)
    check_nothing_is_left(pair.a, pair.b)


@pytest.mark.parametrize("means", [("map", "tcp"), ("map",)])
@pytest.mark.parametrize("shared", [480, 0])
def test_hand_overs_go_on_when_no_more_can_be_pinned(means: tuple[str, ...], shared: int) -> None:
    """All decode at once, so that what they have mapped stays pinned. Without a prefix in common
    they have more than may be pinned for long: the rest is copied, or else computed, but at once.
    """
    pair = Pair(means=means)
    prompts: dict[str, list[int]] = {}
    for number in range(7):
        ids = prompt(1, shared) + prompt(50 + number, 544 - shared)
        request_id = f"r{number}"
        prompts[request_id] = ids
        pair.service.submit(
            "a", request_id, ids, max_tokens=400,
            plan=[Stage("prefill", "a"), Stage("decode", "b")],
        )  # fmt: skip
        pair.service.fetch("b", request_id, ids, source_of(pair.a, len(ids) // 16))
        pair.until(pair.finished(request_id))
        handed_over_s = pair.world.now
        pair.service.submit(
            "b", request_id, ids, max_tokens=400, attempt=2, resumed=1, plan=[Stage("decode", "b")]
        )
        pair.until(lambda: len(pair.service.ids[request_id]) > 1)  # noqa: B023
        assert pair.world.now - handed_over_s < 0.1  # of virtual time
    moved = {counts.means: counts.blocks for counts in pair.b.exchange.move_counts()}
    if shared:
        assert moved == {"map": 34 + 6 * 4}
    else:
        assert moved["map"] == (3 * 34 if "tcp" in means else 128)
        assert moved.get("tcp", 0) == (4 * 34 if "tcp" in means else 0)
    pair.until(lambda: all((r, 2) in pair.service.finish for r in prompts), within_s=60)
    for request_id, ids in prompts.items():
        assert pair.service.output(request_id) == undisturbed(ids, 400)
    pair.wait(8)
    check_nothing_is_left(pair.a, pair.b)


def test_a_first_token_that_is_the_last_ends_it() -> None:
    pair = Pair()
    pair.hand_over(prompt(3, 50), max_tokens=1)
    assert pair.service.finish == {("r", 1): "length"}
    pair.wait(8)
    check_nothing_is_left(pair.a, pair.b)


@pytest.mark.parametrize("means", [("map", "tcp"), ("tcp",)])
@pytest.mark.parametrize("victim", ["a", "b"])
@pytest.mark.parametrize("after_ms", [0, 1, 2, 5, 8, 12, 15, 16, 17, 18, 20, 25, 40])
def test_kills_at_every_point(means: tuple[str, ...], victim: str, after_ms: int) -> None:
    """Whoever is left says what an undisturbed run says, and holds nothing in the end."""
    pair = Pair(means=means)
    ids = prompt(4, 500)
    killed: list[str] = []

    def kill() -> None:
        pair.world.kill(victim)
        killed.append(victim)

    pair.world.at(pair.world.now + after_ms / 1000, kill)
    plan = [Stage("prefill", "a"), Stage("decode", "b")]
    pair.service.submit("a", "r", ids, plan=plan)
    pair.service.fetch("b", "r", ids, source_of(pair.a, 31))
    pair.until(lambda: bool(killed) or ("r", 1) in pair.service.finish)
    pair.wait(0.05)
    left, core = ("b", pair.b) if victim == "a" else ("a", pair.a)
    emitted = len(pair.service.output("r"))
    source = source_of(pair.a, 31) if left == "b" else None
    pair.service.submit(left, "r", ids, attempt=2, resumed=emitted, source=source)
    pair.until(pair.finished("r", 2), within_s=6)
    assert pair.service.output("r") == undisturbed(ids, 16)
    pair.wait(12)
    check_nothing_is_left(core)


@pytest.mark.parametrize("seed", range(12))
def test_lost_doubled_and_spoilt(seed: int) -> None:
    """Messages are lost and come twice, jobs fail, hang and bring garbage."""
    pair = Pair(
        seed,
        NetworkFaults(duplicate=0.1),
        DataFaults(fails=0.1, hangs=0.1, corrupt=0.05),
        num_blocks=80,
        means=("map", "tcp") if seed % 2 else ("tcp",),
    )
    draw = random.Random(seed)
    requests = {}
    shared = prompt(seed, 160)
    for number in range(12):
        ids = shared[: draw.randrange(16, 160)] + prompt(100 + number, draw.randrange(1, 60))
        requests[f"r{number}"] = ids
        here, there = ("a", pair.b) if draw.random() < 0.5 else ("b", pair.a)
        source = source_of(there, len(ids) // 16)
        at_s = pair.world.now + draw.random() * 0.5
        pair.service.submit(here, f"r{number}", ids, source=source, at_s=at_s)
    pair.until(lambda: len(pair.service.finish) == len(requests), within_s=60)
    for request_id, ids in requests.items():
        assert pair.service.output(request_id) == undisturbed(ids, 16)
    pair.wait(15)
    check_nothing_is_left(pair.a, pair.b)


def test_an_owner_that_cannot_be_heard_takes_its_pages_back() -> None:
    """The lease ends while windows are in use; what they show then is noticed by its generation,
    and never emitted."""
    pair = Pair(num_blocks=40, cost=StepCost(base_s=0.03))
    ids = prompt(9, 320)
    pair.service.submit("a", "first", ids, max_tokens=2)
    pair.until(pair.finished("first"))
    pair.service.submit("b", "r", ids, max_tokens=300, source=source_of(pair.a, 20))
    pair.until(lambda: len(pair.service.ids.get("r", {})) > 3)
    assert pair.service.fetched["r"].means == "map"
    pair.world.cut("a", "b", for_s=100)
    pair.wait(0.2)
    pair.service.submit("a", "other", prompt(10, 500), max_tokens=100, at_s=pair.world.now + 4)
    pair.until(pair.finished("r"), within_s=60)
    pair.until(pair.finished("other"), within_s=60)
    assert pair.service.output("r") == undisturbed(ids, 300)
    assert pair.b.scheduler.stats.preemptions >= 1
    pair.wait(15)
    check_nothing_is_left(pair.a, pair.b)


def test_a_zombie_reads_no_page_that_has_been_taken_back() -> None:
    pair = Pair(num_blocks=40, cost=StepCost(base_s=0.03))
    ids = prompt(11, 320)
    pair.service.submit("a", "first", ids, max_tokens=2)
    pair.until(pair.finished("first"))
    pair.service.submit("b", "r", ids, max_tokens=200, source=source_of(pair.a, 20))
    pair.until(lambda: len(pair.service.ids.get("r", {})) > 3)
    pair.world.stop("b", for_s=10)
    pair.wait(4)
    pair.service.submit("a", "other", prompt(12, 500), max_tokens=100)
    pair.until(pair.finished("other"), within_s=60)
    pair.wait(30)
    found = pair.service.output("r")
    assert found == undisturbed(ids, 200)[: len(found)] and len(found) > 3
    check_nothing_is_left(pair.a)


def test_windows_outlive_a_dead_owner() -> None:
    pair = Pair()
    ids = prompt(13, 320)
    pair.service.submit("a", "first", ids, max_tokens=2)
    pair.until(pair.finished("first"))
    pair.service.submit("b", "r", ids, max_tokens=200, source=source_of(pair.a, 20))
    pair.until(lambda: len(pair.service.ids.get("r", {})) > 3)
    pair.world.kill("a")
    pair.until(pair.finished("r"), within_s=60)
    assert pair.service.output("r") == undisturbed(ids, 200)
    assert pair.b.scheduler.stats.preemptions == 0
    pair.wait(8)
    check_nothing_is_left(pair.b)


@pytest.mark.parametrize("num_own_blocks", [0, 4])
def test_what_was_computed_behind_windows_outlives_its_sequence(num_own_blocks: int) -> None:
    """For a moment, wherever in the chain the windows begin."""
    pair = Pair()
    ids = prompt(17, 400)
    if num_own_blocks:
        pair.service.submit("b", "own", ids[: num_own_blocks * 16])
        pair.until(pair.finished("own"))
    pair.service.submit("a", "first", ids)
    pair.until(pair.finished("first"))
    pair.service.submit("b", "r", ids, source=source_of(pair.a, 25), max_tokens=64)
    pair.until(lambda: len(pair.service.output("r")) > 40)
    (seq,) = pair.b.scheduler.live()
    pool = pair.b.scheduler.pool
    assert [pool.is_window(block) for block in seq.blocks[:24]] == [
        index >= num_own_blocks for index in range(24)
    ]
    pair.until(pair.finished("r"))
    num_whole = (400 + 63) // 16
    assert len(pool.match(seq.keys)) == num_whole
    pair.wait(5)
    assert len(pool.match(seq.keys)) == num_own_blocks
    check_nothing_is_left(pair.a, pair.b)


def test_several_wants_share_one_import() -> None:
    pair = Pair(means=("tcp",))
    ids = prompt(14, 320)
    pair.service.submit("a", "first", ids, max_tokens=2)
    pair.until(pair.finished("first"))
    for number in range(4):
        request_id = f"r{number}"
        pair.service.submit("b", request_id, [*ids, number], source=source_of(pair.a, 20))
    pair.until(lambda: all((f"r{n}", 1) in pair.service.finish for n in range(4)))
    for number in range(4):
        assert pair.service.output(f"r{number}") == undisturbed([*ids, number], 16)
    (counts,) = pair.b.exchange.move_counts()
    assert (counts.means, counts.blocks) == ("tcp", 20)
    pair.wait(8)
    check_nothing_is_left(pair.a, pair.b)


def test_who_waits_for_a_dead_owner_computes_within_the_bound() -> None:
    pair = Pair()
    ids = prompt(15, 320)
    nobody = KvSource("a", 1, "sim://a", 20)
    pair.world.kill("a")
    pair.service.submit("b", "r", ids, source=nobody)
    pair.until(pair.finished("r"), within_s=2.5)
    assert pair.service.output("r") == undisturbed(ids, 16)
    assert "does not answer" in pair.service.fetched["r"].reason
    pair.wait(8)
    check_nothing_is_left(pair.b)


def test_a_fetch_that_nobody_follows_is_forgotten() -> None:
    pair = Pair()
    ids = prompt(16, 320)
    pair.service.submit("a", "first", ids, max_tokens=2)
    pair.until(pair.finished("first"))
    pair.service.fetch("b", "r", ids, source_of(pair.a, 20), lease_s=2.0)
    pair.until(lambda: "r" in pair.service.fetched)
    assert pair.b.scheduler.pool.num_free_windows < pair.b.scheduler.pool.num_windows
    assert len(pair.a.exchange.offers) == 1
    pair.wait(3)
    check_nothing_is_left(pair.a, pair.b)


def test_keys_are_what_the_service_says() -> None:
    assert len(keys_of(prompt(1, 33))) == 2 * 16


def cores_of(pair: Pair) -> tuple[InstanceCore, InstanceCore]:
    return pair.a, pair.b
