"""The world itself: links, clocks, timers, processes that are slow, leave, or are started again."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.protocol.effects import Effect, Send, SetTimer, Stop
from penstock.protocol.instance import Probe
from penstock.protocol.request import SamplingParams
from penstock.service.generation import GenerationSpec
from penstock.simulator.clocks import Clock
from penstock.simulator.network import NetworkFaults
from penstock.simulator.world import World

STILL = NetworkFaults(latency_s=0.01, jitter_s=0.0)


class Note:
    """A core that notes what comes, and sets its timer every `every_s` by its clock."""

    def __init__(self, every_s: float | None = None) -> None:
        self.came: list[tuple[float, int]] = []
        self.fired: list[float] = []
        self.every_s = every_s

    def on_message(self, peer: str, message: Any, now: float) -> list[Effect]:
        self.came.append((now, message.nonce))
        return []

    def on_timer(self, now: float) -> list[Effect]:
        self.fired.append(now)
        return [] if self.every_s is None else [SetTimer(now + self.every_s)]


def two(faults: NetworkFaults = STILL, clock: Clock | None = None) -> tuple[World, Note]:
    world, target = World(1, faults), Note()
    world.add_node("a", Note())
    world.add_node("b", target, clock)
    return world, target


def send(world: World, at_s: float, number: int, source: str = "a", target: str = "b") -> None:
    world.at(at_s, lambda: world.send(source, target, Probe(number)))


# --- links ---------------------------------------------------------------------------------------


def test_a_link_keeps_its_order_unless_told_otherwise() -> None:
    def order(reorder: float) -> list[int]:
        world, target = two(NetworkFaults(jitter_s=0.05, reorder=reorder))
        for number in range(200):
            send(world, 0.001 * number, number)
        world.run(10.0)
        return [number for _, number in target.came]

    assert order(0.0) == list(range(200))
    mixed = order(0.2)
    assert mixed != sorted(mixed) and sorted(mixed) == list(range(200))


def test_other_links_overtake() -> None:
    world, target = two(NetworkFaults(jitter_s=0.1))
    world.add_node("c", Note())
    for number in range(100):
        send(world, 0.01 * number, number, source="ac"[number % 2])
    world.run(10.0)
    came = [number for _, number in target.came]
    assert sorted(came) == list(range(100)) and came != sorted(came)


def test_a_narrow_link_lets_one_frame_through_after_the_other() -> None:
    world, target = two(NetworkFaults(latency_s=0.0, jitter_s=0.0, bytes_per_s=100.0))
    for number in range(3):
        send(world, 0.0, number)
    world.run(10.0)
    first, second, third = (at_s for at_s, _ in target.came)
    assert first > 0.0 and second == pytest.approx(2 * first) and third == pytest.approx(3 * first)


def test_cuts_walls_and_slow_links_end() -> None:
    world, target = two()
    world.add_node("c", Note())
    world.at(1.0, lambda: world.cut("a", "b", 1.0, one_way=True))
    send(world, 1.5, 1)
    send(world, 1.5, 2, source="b", target="a")
    send(world, 2.5, 3)
    world.at(3.0, lambda: world.partition([("a", "c"), ("b",)], 1.0))
    send(world, 3.5, 4)
    send(world, 3.5, 5, source="a", target="c")
    send(world, 4.5, 6)
    world.at(5.0, lambda: world.network.slow("a", "b", 0.3, 5.5))
    send(world, 5.1, 7)
    send(world, 5.6, 8)
    world.at(6.0, lambda: world.cut("a", "b", 100.0))
    world.at(6.5, world.network.heal)
    send(world, 6.6, 9)
    world.run(10.0)
    came = [(round(at_s, 6), number) for at_s, number in target.came]
    # What is slow holds up what comes after it: a link keeps its order.
    assert came == [(2.51, 3), (4.51, 6), (5.41, 7), (5.61, 8), (6.61, 9)]
    assert [number for _, number in world.core("a").came] == [2]
    assert [number for _, number in world.core("c").came] == [5]


def test_what_is_lost_and_what_comes_twice() -> None:
    world, target = two(NetworkFaults(loss=0.3, duplicate=0.3))
    for number in range(1000):
        send(world, 0.01 * number, number)
    world.run(100.0)
    came = [number for _, number in target.came]
    assert 600 < len(set(came)) < 800
    assert 1.2 < len(came) / len(set(came)) < 1.4


# --- clocks --------------------------------------------------------------------------------------


def test_cores_see_their_own_clock() -> None:
    world, target = two(clock=Clock(ahead_s=100.0, drift=0.01))
    send(world, 10.0, 1)
    world.run(20.0)
    assert target.came[0][0] == pytest.approx(100.0 + 1.01 * 10.01)


@pytest.mark.parametrize("clock", [Clock(), Clock(-3.0, 0.013), Clock(1e6, -0.0007)])
def test_a_timer_never_fires_early_and_never_twice(clock: Clock) -> None:
    world, node = World(0), Note(0.1)
    world.add_node("n", node, clock)
    world.tell("n", lambda now: [SetTimer(now + 0.1)])
    world.run(50.0)
    steps = [later - earlier for earlier, later in zip(node.fired, node.fired[1:])]
    assert len(steps) > 450
    assert min(steps) >= 0.1 - 1e-9 and max(steps) < 0.1 + 1e-6


def test_a_later_timer_replaces_an_earlier_one() -> None:
    world, node = World(0), Note()
    world.add_node("n", node)
    world.tell("n", lambda now: [SetTimer(1.0)])
    world.at(0.5, lambda: world.tell("n", lambda now: [SetTimer(3.0)]))
    world.at(2.0, lambda: world.tell("n", lambda now: [SetTimer(2.5)]))
    world.run(10.0)
    assert node.fired == [2.5]


def test_a_clock_that_jumps_takes_its_timers_along() -> None:
    world, node = World(0), Note()
    world.add_node("n", node)
    world.tell("n", lambda now: [SetTimer(100.0)])
    world.at(10.0, lambda: world.jump_clock("n", 85.0))
    world.run(14.0)
    assert node.fired == []
    world.run(16.0)
    assert node.fired == [100.0]
    world.tell("n", lambda now: [SetTimer(now + 1.0)])
    world.at(16.5, lambda: world.jump_clock("n", -10.0))
    world.run(20.0)
    assert len(node.fired) == 1
    world.run(30.0)
    assert len(node.fired) == 2


# --- processes -----------------------------------------------------------------------------------


def test_a_slow_instance_takes_its_time_until_it_is_well() -> None:
    def took_s(factor: float) -> float:
        world = World(0)
        world.add_instance("i")
        world.add_service("s", ["i"])
        world.slow_down("i", factor)
        ends: list[float] = []
        spec = GenerationSpec("r", [1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True))
        world.submit("s", spec, 2.0)
        world.watch(lambda name: ends.append(world.now) if not world.core("s").journal else None)
        world.run(60.0)
        assert len(world.outcomes["r"].ids[0]) == 50
        return world.busy_s("i")

    assert took_s(5.0) == pytest.approx(5 * took_s(1.0))


def test_who_was_stopped_takes_in_what_it_missed_in_order() -> None:
    world, target = two()
    world.at(1.0, lambda: world.stop("b", 2.0))
    for number in range(3):
        send(world, 1.5 + 0.1 * number, number)
    world.run(10.0)
    assert target.came == [(3.0, 0), (3.0, 1), (3.0, 2)]


def test_the_last_words_of_the_killed_are_lost_and_of_those_who_leave_are_not() -> None:
    world, target = two()
    send(world, 1.0, 1)
    world.at(1.005, lambda: world.kill("a"))
    world.at(2.0, lambda: world.restart("a"))
    world.at(3.0, lambda: world.tell("a", lambda now: [Send("b", Probe(2)), Stop()]))
    world.run(10.0)
    assert [number for _, number in target.came] == [2]
    assert world.left("a") and not world.lives("a")


def test_a_process_that_is_started_again_is_the_next_incarnation() -> None:
    world = World(0)
    world.add_instance("i", num_blocks=77)
    world.add_service("s", ["i"])
    world.run(2.0)
    assert world.restart("i").card.incarnation == 2
    assert world.restart("s").config.incarnation == 2
    spec = GenerationSpec("r", [1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
    world.submit("s", spec, 4.0)
    world.run(20.0)
    assert world.core("i").card.num_blocks == 77
    assert world.outcomes["r"].finish[0] == ["length"]


def test_nobody_listens_at_a_service_that_is_gone() -> None:
    world = World(0)
    world.add_instance("i")
    world.add_service("s", ["i"])
    world.kill("s")
    world.submit("s", GenerationSpec("r", [1], SamplingParams(max_tokens=5)), 1.0)
    world.run(5.0)
    assert world.outcomes["r"].finish[0] == ["engine_unavailable"]


def test_watchers_hear_of_everybody_who_was_touched() -> None:
    world, seen = World(0), list[str]()
    world.add_instance("i")
    world.watch(seen.append)
    world.add_service("s", ["i"])
    world.run(1.0)
    assert {"i", "s"} <= set(seen)
    assert len(seen) <= world.events.num_done + 2
