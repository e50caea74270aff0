"""Simulated worlds whose service is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.protocol.errors import EngineUnavailable
from penstock.protocol.request import SamplingParams
from penstock.service.cluster.finder import IndexFinder
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import GenerationSpec
from penstock.service.policies.routing import POLICIES, slo_aware
from penstock.service.recipe import CoreRecipe
from penstock.service.recorder import FileTape, RecordedCore
from penstock.simulator import world as world_module
from penstock.simulator.network import NetworkFaults
from penstock.simulator.world import World

RECIPE = CoreRecipe(ServiceCoreConfig(name="service"), "slo-aware", kv_index=True)


def record_services(path: Path, monkeypatch: pytest.MonkeyPatch) -> FileTape:
    """The next service of a world writes to the tape that is returned."""
    tape = FileTape(path)

    class Recorded(RecordedCore):
        def __init__(self, config: Any, policy: Any, finder: Any) -> None:
            monkeypatch.setattr(world_module, "ServiceCore", ServiceCore)
            tape.header(RECIPE)
            super().__init__(config, policy, finder, tape)

    monkeypatch.setattr(world_module, "ServiceCore", Recorded)
    return tape


def record_every_service(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[FileTape]:
    """All services of worlds that are made from now on write to a tape each; they are added to the
    list that is returned."""
    tapes: list[FileTape] = []
    names = {policy: name for name, policy in POLICIES.items()}

    class Recorded(RecordedCore):
        def __init__(self, config: Any, policy: Any, finder: Any) -> None:
            if policy not in names:  # of a test: a replay finds it by this name
                names[policy] = policy.__name__
                monkeypatch.setitem(POLICIES, policy.__name__, policy)
            tapes.append(FileTape(folder / "incident"))
            tapes[-1].header(CoreRecipe(config, names[policy], kv_index=finder.listens))
            super().__init__(config, policy, finder, tapes[-1])

    monkeypatch.setattr(world_module, "ServiceCore", Recorded)
    return tapes


def small_world(seed: int, faults: NetworkFaults | None = None, instances: int = 3) -> World:
    """Instances engine-0, ... behind `service`, which leads."""
    world = World(seed, faults)
    names = [f"engine-{number}" for number in range(instances)]
    for name in names:
        world.add_instance(name)
    world.add_service("service", names, policy=slo_aware, finder=IndexFinder)
    world.core("service").lead(1, 0.0)
    return world


def submit_many(world: World, number: int, every_s: float = 0.1) -> None:
    for i in range(number):
        spec = GenerationSpec(
            f"r{i}",
            [(7 * i + 3 * n) % 900 + 1 for n in range(20 + 13 * i % 200)],
            SamplingParams(max_tokens=20 + i % 40, seed=i, ignore_eos=True),
            n=1 + i % 2,
            ttft_slo_s=5.0 if i % 3 else None,
        )
        world.submit("service", spec, 1.0 + every_s * i)


def eventful(seed: int) -> World:
    """Requests on three instances, over a bad network; one is killed and started again, one is
    stopped, one drained; roles are given by hand; clients go away."""
    world = small_world(seed, NetworkFaults(loss=0.02, duplicate=0.02))
    core = world.core("service")
    submit_many(world, 60)
    world.cancel("service", "r20", 3.2)
    world.at(3.0, lambda: world.kill("engine-1", noticed_by="service"))
    world.at(4.0, lambda: world.add_instance("engine-1") and None)
    world.at(5.0, lambda: world.stop("engine-2", 2.0))
    world.run(8.0)
    core.assign("engine-0", "prefill", world.now)
    core.drain_instance("engine-2", world.now)
    world.run(20.0)
    core.close_all(EngineUnavailable("the end"))
    return world
