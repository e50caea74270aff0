"""A process of a world: its core, what it runs on, whether it lives, and the timer it has set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.protocol.effects import Effect
from penstock.simulator.clocks import Clock
from penstock.simulator.counting import CountingRunner
from penstock.simulator.data_plane import SimulatedDataPlane
from penstock.simulator.events import Call
from penstock.simulator.kv import KvMemory
from penstock.simulator.pacing import StepCost
from penstock.simulator.runner import CostModelRunner


class Core(Protocol):
    """What takes part in a world: an `InstanceCore`, a `ServiceCore`, or what a test puts there."""

    def on_message(self, peer: str, message: Any, now: float) -> list[Effect]: ...
    def on_timer(self, now: float) -> list[Effect]: ...


@dataclass(slots=True)
class Device:
    """What an instance computes on."""

    cost: StepCost
    runner: CostModelRunner | CountingRunner
    data_plane: SimulatedDataPlane
    memory: KvMemory

    def slow_down(self, factor: float) -> None:
        """Steps that begin from now on take `factor` times as long as `cost` says."""
        self.runner.cost = self.cost.scaled(factor)

    def close(self) -> None:
        self.runner.close()
        self.data_plane.close()


@dataclass(slots=True, eq=False)
class Node:
    name: str
    core: Core
    clock: Clock
    #: Starts its successor under the same name: the next incarnation, on the same clock.
    start_again: Callable[[], object]
    device: Device | None = None
    #: Instances that it has been told to connect to, and those that have connected to it.
    peers: dict[str, None] = field(default_factory=dict)
    alive: bool = True
    #: It ended by itself: what it had sent before still arrives.
    left: bool = False
    #: While stopped, a process takes in nothing and sets nothing off; it does so afterwards.
    stopped: bool = False
    missed: list[Callable[[], None]] = field(default_factory=list)
    #: When its timer is due (by its clock), and when the queue looks after it (by the world's).
    due_s: float | None = None
    looked_after_s: float = float("inf")

    def when_running(self, call: Call) -> None:
        if self.stopped:
            self.missed.append(call)
        elif self.alive:
            call()

    def end(self) -> None:
        self.alive = False
        if self.device is not None:
            self.device.close()
