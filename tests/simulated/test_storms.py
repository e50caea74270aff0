"""Storms (and hurricanes) of seeded faults over the production cores. A seed that fails is played
again, and made smaller, by the line that the test prints."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engine.core import InstanceCore
from penstock.service.cluster.finder import IndexFinder
from penstock.service.core import ServiceCore
from penstock.simulator.storms.draw import storm_of
from penstock.simulator.storms.hurricanes import hurricane_of
from penstock.simulator.storms.play import play
from penstock.simulator.storms.storm import Crash, Drain

#: So many in one test: a failure leaves the rest to run.
NUM_SEEDS = 320
MANY_SEEDS = 10_000
NUM_HURRICANES = 40
MANY_HURRICANES = range(10_000, 15_000)
A_TEST = 40


@pytest.fixture(autouse=True)
def quiet() -> None:
    """A registry that is lost every other second is worth no warning here."""
    logging.getLogger("penstock").setLevel(logging.CRITICAL)


def weather(first: int, count: int) -> None:
    failed = []
    for seed in range(first, first + count):
        verdict = play(storm_of(seed))
        if not verdict.ok:
            failed.append(f"python -m penstock.simulator.storms {seed}  # {verdict.failure}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, A_TEST))
def test_storms(first: int) -> None:
    weather(first, A_TEST)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(NUM_SEEDS, MANY_SEEDS, 100))
def test_many_storms(first: int) -> None:
    weather(first, 100)


def hurricanes(first: int, count: int) -> list[InstanceCore | ServiceCore]:
    """Who has lived through them."""
    failed = []
    cores: list[InstanceCore | ServiceCore] = []
    for seed in range(first, first + count):
        verdict = play(hurricane_of(seed), plant=cores.append)
        if not verdict.ok:
            line = f"python -m penstock.simulator.storms --hurricane {seed}"
            failed.append(f"{line}  # {verdict.failure}")
    assert not failed, "\n".join(failed)
    return cores


def test_hurricanes_and_that_they_have_what_storms_leave_out() -> None:
    cores = hurricanes(0, NUM_HURRICANES)
    services = [core for core in cores if isinstance(core, ServiceCore)]
    tiers = [core.exchange.tiers.stats for core in cores if isinstance(core, InstanceCore)]
    finders = [core.prospects.finder for core in services]
    assert any(core.roles.num_rollbacks for core in services)
    assert any(f.index.stats().num_evicted for f in finders if isinstance(f, IndexFinder))
    assert sum(t["store"].loaded for t in tiers if "store" in t) > 10
    faults = [hurricane_of(seed).faults for seed in range(NUM_HURRICANES)]
    assert sum(len(set(map(type, some))) >= 5 for some in faults) > NUM_HURRICANES / 3
    crashes = [[fault.at_s for fault in some if isinstance(fault, Crash)] for some in faults]
    assert any(len(set(times)) < len(times) for times in crashes), "a host is lost"


@pytest.mark.slow
@pytest.mark.parametrize("first", MANY_HURRICANES[::100])
def test_many_hurricanes(first: int) -> None:
    hurricanes(first, 100)


def test_storms_are_hostile() -> None:
    """What they are there to disturb does happen in them."""
    verdicts = [play(storm_of(seed)) for seed in range(24)]
    assert sum(v.handovers for v in verdicts) > 30
    assert sum(v.resumed for v in verdicts) > 20
    assert sum(v.preemptions for v in verdicts) > 10
    drains = [s for s in map(storm_of, range(160)) if any(isinstance(f, Drain) for f in s.faults)]
    assert any(play(storm).migrated for storm in drains)
    assert any(v.errors for v in verdicts)
    assert sum(v.errors for v in verdicts) < sum(len(v.storm.asks) for v in verdicts) / 5


def digests(seeds: range) -> str:
    return " ".join(play(storm_of(seed)).digest[:16] for seed in seeds)


def test_one_seed_is_one_storm_under_any_hash_seed() -> None:
    root = Path(__file__).parents[2]
    code = (
        "import logging; logging.disable(logging.CRITICAL)\n"
        "from tests.simulated.test_storms import digests; print(digests(range(6)))"
    )
    env = os.environ | {
        "PYTHONHASHSEED": "5",
        "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digests(range(6))
