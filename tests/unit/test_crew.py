"""Simulations on several processes: results as on one, errors told, nobody left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError, NotEnoughMemory
from penstock.simulator.crew import Crew, Task
from penstock.simulator.outcome import Outcome
from penstock.simulator.spec import ClusterSpec, PoolSpec
from penstock.simulator.stretch import busiest, dealt, faster

REQUESTS = [TraceRequest(n * 0.5, 100 + n, 3) for n in range(12)]


@pytest.fixture
def spec(tmp_path: Path) -> ClusterSpec:
    cost = dict(base_s=0.02, per_token_s=1e-4, kv_tokens=4000, kv_bytes_per_token=9)
    (tmp_path / "cost.json").write_text(json.dumps(cost))
    pool = PoolSpec(count=1, hardware=str(tmp_path / "cost.json"), max_model_len=4000)
    return ClusterSpec(pools=(pool,), pd="off")


def digest(outcome: Outcome, task: Task) -> tuple[str, int]:
    return outcome.digest, len(outcome.finish)


def dies(outcome: Outcome, task: Task) -> None:
    if task.seed == 1:
        os._exit(9)


def tasks(spec: ClusterSpec) -> list[Task]:
    return [Task(spec=spec, seed=seed, speed=speed) for seed in (0, 1) for speed in (1.0, 3.0)]


def test_two_do_what_one_does_and_tell_how_far_they_are(spec: ClusterSpec) -> None:
    seen: list[list[float]] = []
    with Crew(REQUESTS, digest, 1) as one, Crew(REQUESTS, digest, 2) as two:
        alone = one.run(tasks(spec), lambda shares: seen.append(list(shares)))
        assert alone == two.run(tasks(spec))
        assert two.run(tasks(spec)[:1]) == alone[:1]
    assert len({d for d, _ in alone}) == 4
    assert seen[-1] == [1.0] * 4
    assert all((np.diff([s[i] for s in seen]) >= 0).all() for i in range(4))
    left = psutil.Process().children()
    assert not any("spawn_main" in " ".join(process.cmdline()) for process in left)


@pytest.mark.parametrize("jobs", [1, 2])
def test_errors_of_a_run_are_told(spec: ClusterSpec, jobs: int) -> None:
    long = [*REQUESTS, TraceRequest(9.0, 5000, 1)]
    with pytest.raises(ConfigError, match="5000"), Crew(long, digest, jobs) as crew:
        crew.run(tasks(spec))


def test_a_process_that_was_killed_is_said_to_be(spec: ClusterSpec) -> None:
    with pytest.raises(NotEnoughMemory, match="--jobs 1"), Crew(REQUESTS, dies, 2) as crew:
        crew.run(tasks(spec))


class Waits:
    """For ever, once it has left a file with the number of its process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, outcome: Outcome, task: Task) -> None:
        (self._folder / f"{os.getpid()}.pid").touch()
        while True:
            time.sleep(60)


def _run_waiting(spec: ClusterSpec, folder: Path) -> None:
    with Crew(REQUESTS, Waits(folder), 2) as crew:
        crew.run(tasks(spec))


def test_processes_end_with_a_parent_that_is_killed(spec: ClusterSpec, tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(
        target=_run_waiting, args=(spec, tmp_path)
    )
    parent.start()
    try:
        until_s = time.monotonic() + 60
        while len(left := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < until_s:
            time.sleep(0.05)
        assert len(left) == 2
        processes = [psutil.Process(int(file.stem)) for file in left]
    finally:
        parent.kill()
        parent.join()
    _, alive = psutil.wait_procs(processes, timeout=30)
    for process in alive:
        process.kill()
    assert alive == []


# --- parts of traces ------------------------------------------------------------------------------


def test_the_busiest_stretch() -> None:
    requests = [TraceRequest(n, 10, 1) for n in range(100)]
    requests[40:45] = [TraceRequest(n, 999, 1) for n in range(40, 45)]
    found = busiest(requests, 5.0)
    assert [r.input_tokens for r in found] == [999] * 5
    assert [r.arrival_s for r in found] == [0, 1, 2, 3, 4]
    assert busiest(requests, None) == requests == busiest(requests, 1000.0)


def test_another_day_like_this_one() -> None:
    assert dealt(REQUESTS, 0) == REQUESTS
    other = dealt(REQUESTS, 1)
    assert other != REQUESTS and dealt(REQUESTS, 1) == other != dealt(REQUESTS, 2)
    assert [r.arrival_s for r in other] == [r.arrival_s for r in REQUESTS]
    assert sorted(r.input_tokens for r in other) == [r.input_tokens for r in REQUESTS]
    sharing = [TraceRequest(0, 600, 1, (1, 2)), TraceRequest(1, 700, 1, (1, 3))]
    assert dealt(sharing, 5) == sharing


def test_faster() -> None:
    assert [r.arrival_s for r in faster(REQUESTS[:3], 2.0)] == [0, 0.25, 0.5]
