"""Storms of seeded faults over the production cores. A seed that fails is played again, and made
smaller, by the line that the test prints."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.simulator.storms.draw import storm_of
from penstock.simulator.storms.play import play
from penstock.simulator.storms.storm import Drain

#: So many in one test: a failure leaves the rest to run.
NUM_SEEDS = 320
MANY_SEEDS = 10_000
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
