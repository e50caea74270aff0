"""What each kind of fault does to a cluster, and whom it may keep from being of use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from penstock.protocol.effects import Effect
from penstock.protocol.errors import PenstockError
from penstock.simulator.runner import CostModelRunner
from penstock.simulator.storms.cluster import Cluster
from penstock.simulator.storms.storm import (
    REGISTRY,
    Assignment,
    Crash,
    Cut,
    Drain,
    Fault,
    Halt,
    Hang,
    Lead,
    Leave,
    Noise,
    Raise,
    RegistryLoss,
    ScaleUp,
    Skew,
    Slow,
    SpoilTiers,
    TakeBack,
)


class Strikes:
    """Has the faults of a storm happen."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self._noises: list[Noise] = []
        self._calm = cluster.world.network.faults
        for fault in cluster.storm.faults:
            self._world.at(fault.at_s, partial(self._strike, fault))

    def _strike(self, fault: Fault) -> None:
        cluster, world = self._cluster, self._world
        match fault:
            case Crash():
                cluster.crash(fault)
            case Leave(service=service, again_after_s=again_after_s):
                cluster.leave(service, again_after_s)
            case Halt(node=node, for_s=for_s) if node in cluster.up:
                world.stop(node, for_s)
            case Slow(node=node, factor=factor) if node in cluster.up:
                world.slow_down(node, factor)
                self._after(fault, partial(world.slow_down, node, 1.0))
            case Hang(node=node) if node in cluster.up:
                world.slow_down(node, 1e6)
                world.at(fault.at_s + 5.0, partial(world.slow_down, node, 1.0))  # of later ones
            case Raise(node=node, count=count) if node in cluster.up:
                device = world.node(node).device
                assert device is not None and isinstance(device.runner, CostModelRunner)
                device.runner.num_to_fail += count
            case Cut():
                self._cut(fault)
            case Noise():
                self._noise(fault)
            case RegistryLoss() if cluster.registry is not None and world.lives(REGISTRY):
                cluster.registry.lose()
                self._after(fault, cluster.registry.come_back)
            case SpoilTiers(node=node) if node in cluster.up:
                device = world.node(node).device
                assert device is not None
                device.data_plane.spoil_tiers()
            case TakeBack(node=node, overwrites=overwrites) if node in cluster.up:
                cluster.take_back(node, overwrites=overwrites)
            case Skew(node=node, jump_s=jump_s, drift=drift):
                world.jump_clock(node, jump_s)
                world.drift_clock(node, drift)
                self._after(fault, partial(world.drift_clock, node, 0.0))
            case Drain(service=service, node=node, out=out) if service in cluster.up:
                cluster.drain(service, node, out=out)
            case ScaleUp(node=node) if node not in cluster.instances:
                cluster.start_instance(node)
            case Lead(service=service) if service in cluster.up and cluster.registry is None:
                lead = cluster.services[service].lead
                cluster.tell(service, partial(lead, 2000 + int(world.now * 1000)))
            case Assignment() if fault.service in cluster.up:
                self._assign(fault)
            case _:
                pass  # whom it was to befall is not there

    def _after(self, fault: Fault, call: Callable[[], None]) -> None:
        self._world.at(fault.over_s, call)

    def _cut(self, fault: Cut) -> None:
        for one in fault.these:
            for other in fault.those:
                self._world.cut(one, other, fault.for_s, one_way=fault.one_way)

    def _noise(self, fault: Noise) -> None:
        self._noises.append(fault)
        self._turn_up()

        def over() -> None:
            self._noises.remove(fault)
            self._turn_up()

        self._after(fault, over)

    def _turn_up(self) -> None:
        """Of several noises each has its worst."""
        calm, noises = self._calm, self._noises

        def worst(of: Callable[[Noise], float], least: float) -> float:
            return max([least, *map(of, noises)])

        self._world.network.faults = replace(
            calm,
            loss=worst(lambda n: n.loss, calm.loss),
            duplicate=worst(lambda n: n.duplicate, calm.duplicate),
            jitter_s=worst(lambda n: n.jitter_s, calm.jitter_s),
            reorder=worst(lambda n: n.reorder, calm.reorder),
            late_s=worst(lambda n: n.late_s, calm.late_s),
        )

    def _assign(self, fault: Assignment) -> None:
        core = self._cluster.services[fault.service]
        if fault.node not in core.instances:
            return

        def assign(now: float) -> list[Effect]:
            try:
                return core.assign(fault.node, fault.role, now)
            except PenstockError:
                return []  # it does not lead, or nobody would be left for a part of the work

        self._cluster.tell(fault.service, assign)
