"""The embedded registry of production in a world: who is found, who leads, and what a loss does."""

from __future__ import annotations

import logging

import pytest

from penstock.simulator.storms.cluster import Cluster
from penstock.simulator.storms.play import play
from penstock.simulator.storms.storm import (
    REGISTRY,
    Ask,
    Crash,
    Cut,
    RegistryLoss,
    ScaleUp,
    Shape,
    Storm,
)


@pytest.fixture(autouse=True)
def _quiet(logging_as_it_was: None) -> None:
    """Worlds full of faults log them. (`conftest.py` puts levels back.)"""
    logging.getLogger("penstock").setLevel(logging.CRITICAL)


SHAPE = Shape(num_instances=2, num_services=2, registry=True, pd="auto")


def cluster() -> Cluster:
    return Cluster(Storm(seed=1, shape=SHAPE), 64, lambda core: None)


def leaders(c: Cluster) -> list[str]:
    return [name for name in c.up if name in c.services and c.services[name].roles.term is not None]


def active(c: Cluster, service: str) -> list[str]:
    return [i.name for i in c.services[service].instances.values() if i.state == "active"]


def test_instances_are_found_and_one_service_leads() -> None:
    c = cluster()
    c.world.run(1.5)
    assert active(c, "s") == active(c, "t") == ["a", "b"]
    assert len(leaders(c)) == 1
    c.start_instance("c")
    c.world.run(3.0)
    assert active(c, "s") == active(c, "t") == ["a", "b", "c"]
    c.close()


def test_the_leader_dies_and_the_other_leads_in_a_greater_term() -> None:
    c = cluster()
    c.world.run(1.5)
    (first,) = leaders(c)
    term = c.services[first].roles.term
    c.crash(Crash(at_s=1.5, node=first))
    c.world.run(6.0)
    (second,) = leaders(c)
    later = c.services[second].roles.term
    assert second != first and term is not None and later is not None and later > term
    c.close()


def test_nobody_leads_while_the_registry_is_away_and_nobody_is_forgotten() -> None:
    c = cluster()
    assert c.registry is not None
    c.world.run(1.5)
    c.registry.lose()
    c.world.run(8.0)
    assert leaders(c) == []
    assert active(c, "s") == active(c, "t") == ["a", "b"]
    c.registry.come_back()
    c.world.run(12.0)
    assert len(leaders(c)) == 1
    assert active(c, "s") == active(c, "t") == ["a", "b"]
    assert c.registry.troubles() == []
    c.close()


def test_who_is_cut_off_from_the_registry_alone_goes_on_serving() -> None:
    c = cluster()
    c.world.run(1.5)
    (first,) = leaders(c)
    c.world.cut(first, REGISTRY, 8.0)
    c.world.run(9.0)
    (second,) = leaders(c)
    assert second != first
    assert active(c, first) == ["a", "b"]
    c.close()


@pytest.mark.parametrize("for_s", [0.2, 2.0, 6.0])
def test_requests_notice_nothing_of_a_registry_that_is_lost(for_s: float) -> None:
    """While an instance starts again, another one joins, and a service cannot be reached."""
    storm = Storm(
        seed=3,
        shape=SHAPE,
        asks=tuple(
            Ask(number=n, at_s=0.6 + 0.2 * n, service="st"[n % 2], own_tokens=60, max_tokens=60)
            for n in range(10)
        ),
        faults=(
            RegistryLoss(at_s=0.8, for_s=for_s),
            ScaleUp(at_s=1.0, node="c"),
            Crash(at_s=1.2, node="b", again_after_s=0.5),
            Cut(at_s=1.5, these=("t",), those=(REGISTRY,), for_s=1.0),
        ),
    )
    verdict = play(storm)
    assert verdict.failure == ""
    assert verdict.errors == 0
