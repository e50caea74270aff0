"""Failures that a cluster file asks for."""

from __future__ import annotations

from functools import partial

from penstock.simulator.build import SERVICE, Deployment
from penstock.simulator.spec import FaultSpec

#: To a frozen process that nobody wakes.
_FOR_GOOD_S = 1e9


def schedule(
    deployment: Deployment, faults: tuple[FaultSpec, ...], begins_s: float
) -> dict[FaultSpec, str]:
    """`begins_s`: when on the world's clock the first request arrives. What is returned says, when
    the world has been run, which did not happen, and why."""
    idle = dict.fromkeys(faults, "the run was over by then")
    for fault in faults:
        deployment.world.at(begins_s + fault.at_s, partial(_happen, deployment, fault, idle))
    return idle


def _happen(deployment: Deployment, fault: FaultSpec, idle: dict[FaultSpec, str]) -> None:
    world, name = deployment.world, fault.instance
    if not world.lives(name):
        idle[fault] = "the instance was down"
        return
    idle.pop(fault, None)
    match fault.kind:
        case "crash":
            world.kill(name, noticed_by=SERVICE)
            if fault.for_s is not None:
                world.at(world.now + fault.for_s, partial(deployment.start_again, name))
        case "freeze":
            world.stop(name, _FOR_GOOD_S if fault.for_s is None else fault.for_s)
        case "slow":
            world.slow_down(name, fault.times)
            if fault.for_s is not None:
                world.at(world.now + fault.for_s, partial(world.slow_down, name, 1.0))
