"""A process of a world: its core, what it runs on, whether it lives, and the timer it has set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.engine.core import InstanceCore
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.protocol.effects import Effect
from penstock.protocol.instance import InstanceCard
from penstock.protocol.kv import KvLayout
from penstock.simulator.clocks import Clock
from penstock.simulator.counting import CountingRunner
from penstock.simulator.data_plane import SimulatedDataPlane
from penstock.simulator.events import Call
from penstock.simulator.kv import KvMemory
from penstock.simulator.pacing import StepCost
from penstock.simulator.runner import CostModelRunner

VOCAB_SIZE = 1000


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
    #: Whether it computes, and talks to others that do.
    is_instance: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_instance = isinstance(self.core, InstanceCore)

    def when_running(self, call: Call) -> None:
        if self.stopped:
            self.missed.append(call)
        elif self.alive:
            call()

    def end(self) -> None:
        self.alive = False
        if self.device is not None:
            self.device.close()


def card_of(
    name: str, incarnation: int, config: SchedulerConfig, num_blocks: int, host: str
) -> InstanceCard:
    return InstanceCard(
        name=name,
        incarnation=incarnation,
        pid=0,
        model="simulated",
        model_digest="simulated",
        vocab_size=VOCAB_SIZE,
        max_model_len=config.max_model_len,
        dtype="float32",
        device="simulated",
        layout=KvLayout(1, 1, 8, config.block_tokens, "float32", 4096),
        num_blocks=num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        host=host,
        endpoints={"control": f"sim://{name}"},
    )
