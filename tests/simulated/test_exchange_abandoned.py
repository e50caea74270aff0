"""The data plane is told which of its jobs nobody waits for any more."""

from __future__ import annotations

import random

from penstock.engine.transfer.jobs import Abandon, Import, Job
from penstock.simulator.data_plane import DataFaults, SimulatedDataPlane
from penstock.simulator.world import VOCAB_SIZE, World
from tests.helpers.peers import HandService, check_nothing_is_left, source_of, undisturbed


def test_a_transfer_that_is_given_up_abandons_its_jobs(monkeypatch: object) -> None:
    started: list[Job] = []
    start = SimulatedDataPlane.start

    def noted(self: SimulatedDataPlane, job: Job, done: object) -> None:
        started.append(job)
        start(self, job, done)  # type: ignore[arg-type]

    monkeypatch.setattr(SimulatedDataPlane, "start", noted)  # type: ignore[attr-defined]
    world = World(1, None, DataFaults(hangs=1.0, hang_s=10.0))
    a, b = world.add_instance("a"), world.add_instance("b")
    service = HandService(world)
    service.attach("a", "b")
    world.run(0.1)
    draw = random.Random(1)
    ids = [draw.randrange(1, VOCAB_SIZE) for _ in range(64)]
    service.submit("a", "first", ids)
    world.run(2.0)
    service.submit("b", "second", ids, source=source_of(a, 4))
    world.run(8.0)
    imports = [job.number for job in started if isinstance(job, Import)]
    abandoned = [number for job in started if isinstance(job, Abandon) for number in job.numbers]
    assert imports and abandoned == imports
    assert service.output("second") == undisturbed(ids, 16)  # computed meanwhile
    world.run(30.0)
    check_nothing_is_left(a, b)
