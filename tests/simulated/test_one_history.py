"""One seed, one history: in a run of every kind, whatever order hashes give to sets."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from penstock.loadgen.traces import TraceRequest
from penstock.simulator.experiment import run
from penstock.simulator.spec import ClusterSpec, PoolSpec
from penstock.simulator.storms.draw import storm_of
from penstock.simulator.storms.play import play

ROOT = Path(__file__).parents[2]
KINDS = ("exact", "scale", "tiers", "storm")


def digests(kind: str) -> list[str]:
    if kind == "storm":
        return [play(storm_of(seed)).digest for seed in range(12)]
    pool = PoolSpec(
        count=6,
        hardware="h100:llama3.1-8b:bf16:tp1",
        kv_tokens=6_000 if kind == "tiers" else 40_000,
        host_kv_tokens=20_000 if kind == "tiers" else 0,
        max_num_seqs=32,
    )
    # Split for good, so that blocks travel; and so many that sequences are preempted.
    policy = "kv-aware" if kind == "tiers" else "split"
    spec = ClusterSpec(pools=(pool,), policy=policy, pd="2:4")
    mode = "scale" if kind == "scale" else "exact"
    return [run(spec, requests(seed), seed=seed, mode=mode).digest for seed in (1, 2)]


def requests(seed: int, rate: float = 25.0) -> list[TraceRequest]:
    draw, now, found = random.Random(seed), 0.0, []
    for _ in range(100):
        now += draw.expovariate(rate)
        shared = tuple(range(draw.randrange(3)))  # some begin alike
        length = 512 * len(shared) + draw.randrange(50, 600)
        found.append(TraceRequest(now, length, draw.randrange(1, 120), shared))
    return found


@cache
def in_a_process(hash_seed: str) -> list[str]:
    code = (
        "import logging; logging.disable()\n"
        "from tests.simulated.test_one_history import KINDS, digests\n"
        "for kind in KINDS: print(kind, *digests(kind))"
    )
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_history_under_any_hash_seed(kind: str) -> None:
    first, second = (
        next(line for line in in_a_process(seed) if line.startswith(kind)) for seed in ("1", "2")
    )
    assert first == second
    found = first.split()[1:]
    assert len(set(found)) == len(found), "other seeds are other histories"
    assert all(len(digest) == 64 for digest in found)
