"""An engine process whose device is a cost model, on a real clock.

    python -m penstock.simulator.real_time MODEL --hardware h100:llama3.1-8b:bf16 --registry URL

Everything but the device is production's: the core and its scheduler, the driver, sockets,
heartbeats, the registry. It takes the flags of `penstock worker`, and a router cannot tell it from
an engine that computes. MODEL lends its name and its vocabulary; sequences end at their max_tokens.
Simulated and real clusters of these are what `benchmarks/simulator_validation.py` compares.
"""

from __future__ import annotations

import argparse
import heapq
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from penstock.checkpoint import resolve
from penstock.cli import logs
from penstock.cli.worker import worker_config
from penstock.engine.build import Engine
from penstock.engine.config import EngineConfig, WorkerConfig
from penstock.engine.core import CoreConfig, InstanceCore
from penstock.engine.instance import run_worker
from penstock.engine.runtime.runner import Runner
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.transfer.jobs import Import, Job, Load, Moved, Store
from penstock.loadgen.costs import InstanceModel, hardware_or_file
from penstock.protocol.errors import ConfigError, PenstockError
from penstock.protocol.instance import InstanceCard
from penstock.protocol.kv import BLOCK_TOKENS, KvLayout
from penstock.simulator.counting import CountingRunner
from penstock.simulator.kv import KvMemory
from penstock.simulator.pacing import StepCost
from penstock.simulator.runner import CostModelRunner
from penstock.simulator.spec import LinkSpec, PoolSpec
from penstock.trace import NO_TRACE, Trace

Call = Callable[[], None]
#: What `PoolSpec` has where nothing is said.
_POOL = PoolSpec(count=1, hardware="")


class Alarm:
    """`at(when_s, call)` on `time.monotonic`: calls are made in order by a thread of their own."""

    def __init__(self) -> None:
        self._calls: list[tuple[float, int, Call]] = []
        self._number = 0
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="penstock-alarm", daemon=True)
        self._thread.start()

    def at(self, when_s: float, call: Call) -> None:
        with self._changed:
            self._number += 1
            heapq.heappush(self._calls, (when_s, self._number, call))
            if self._calls[0][1] == self._number:
                self._changed.notify()

    def close(self) -> None:
        """What is still to come does not. Returns once no call is being made."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            call()

    def _next(self) -> Call | None:
        """Waits for it. None: there is no next."""
        with self._changed:
            while not self._ended:
                now_s = time.monotonic()
                if self._calls and self._calls[0][0] <= now_s:
                    return heapq.heappop(self._calls)[2]
                self._changed.wait(self._calls[0][0] - now_s if self._calls else None)
        return None


class RealTimeRunner:
    """A runner of the simulator that is told the time by an `Alarm`."""

    def __init__(self, runner: CountingRunner | CostModelRunner, alarm: Alarm) -> None:
        self._runner = runner
        self._alarm = alarm
        self.launch = runner.launch

    def close(self) -> None:
        self._runner.close()
        self._alarm.close()


@dataclass(slots=True)
class TimedMover:
    """A data plane that takes the time of the bytes and moves none: for runners that look at no
    block. All that was offered comes."""

    alarm: Alarm
    block_bytes: int
    link: LinkSpec
    means: dict[str, str] = field(default_factory=lambda: {"tcp": ""})
    endpoints: dict[str, str] = field(default_factory=lambda: {"tcp": f"timed://{os.getpid()}"})

    def offer(self, key_of: Callable[[int], bytes | None]) -> None: ...

    def start(self, job: Job, done: Callable[[Moved], None]) -> None:
        if not isinstance(job, (Import, Load, Store)):
            return
        began_s = time.monotonic()
        num_bytes = len(job.blocks) * self.block_bytes
        seconds = self.link.latency_s + num_bytes * 8 / (self.link.kv_gbit * 1e9)
        moved = Moved(job.number, (True,) * len(job.blocks), num_bytes, seconds)
        self.alarm.at(began_s + seconds, partial(done, moved))

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SimulatedDevice:
    """What `build` puts in the place of a device. `hashed`: each token is a hash of all before it
    (`simulator.runner`), and KV stays where it is; else all tokens are alike, and blocks move."""

    model: InstanceModel
    hashed: bool = False
    link: LinkSpec = field(default_factory=LinkSpec)

    def build(
        self,
        config: EngineConfig,
        *,
        name: str,
        incarnation: int,
        core_config: CoreConfig | None = None,
        trace: Trace = NO_TRACE,
        address: str | None = None,
        registry: str | None = None,
        weights_fd: int | None = None,
    ) -> Engine:
        """In the place of `engine.build.build_engine`; there are no weights to load or to share."""
        vocab_size = _vocab_size(config)
        scheduler = SchedulerConfig(
            max_num_seqs=config.max_num_seqs or _POOL.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens or _POOL.max_num_batched_tokens,
            max_model_len=config.max_model_len or _POOL.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        block_bytes = self.model.kv_bytes_per_token * BLOCK_TOKENS
        num_blocks = config.num_blocks or self.model.kv_tokens // BLOCK_TOKENS
        alarm = Alarm()
        memory = KvMemory(num_blocks, BLOCK_TOKENS)
        mover = TimedMover(alarm, block_bytes, self.link)
        if self.hashed:
            mover.means, mover.endpoints = {}, {}
        card = InstanceCard(
            name=name,
            incarnation=incarnation,
            pid=os.getpid(),
            model=config.model,
            model_digest=f"simulated {config.model}",
            vocab_size=vocab_size,
            max_model_len=scheduler.max_model_len,
            dtype="bfloat16",
            device=f"simulated {self.model.name}",
            layout=KvLayout(1, 1, 8, BLOCK_TOKENS, "bfloat16", block_bytes),
            num_blocks=num_blocks,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            endpoints=dict(mover.endpoints),
        )
        core = InstanceCore(
            card,
            Scheduler(scheduler, num_blocks, 0, memory.generations),
            core_config,
            means=mover.means,
            endpoints=mover.endpoints,
        )
        return Engine(core, self._runner(alarm, vocab_size, memory), mover)

    def _runner(self, alarm: Alarm, vocab_size: int, memory: KvMemory) -> Runner:
        c = self.model.cost
        cost = StepCost(
            c.base_s, c.per_token_s, c.per_row_s, c.per_context_token_s, c.per_attention_s
        )
        clock, at = time.monotonic, alarm.at
        if self.hashed:
            return RealTimeRunner(CostModelRunner(cost, vocab_size, clock, at, memory), alarm)
        return RealTimeRunner(CountingRunner(cost, clock, at), alarm)


def _vocab_size(config: EngineConfig) -> int:
    found = resolve(config.model, revision=config.revision).config.get("vocab_size")
    if not isinstance(found, int) or found < 1:
        raise ConfigError(f"config.json of {config.model} has no vocab_size")
    return found


def read(arguments: Sequence[str]) -> tuple[WorkerConfig, SimulatedDevice]:
    """Raises `ConfigError`."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--hardware", help="a name that `penstock simulate` knows, or a file")
    own.add_argument("--hashed-tokens", action="store_true")
    own.add_argument("--link-gbit", type=float, default=LinkSpec().kv_gbit)
    options, rest = own.parse_known_args(list(arguments))
    if options.hardware is None:
        raise ConfigError("which hardware? Give --hardware h100:llama3.1-8b:bf16, or a file")
    link = LinkSpec(kv_gbit=options.link_gbit)
    device = SimulatedDevice(hardware_or_file(options.hardware), options.hashed_tokens, link)
    return worker_config(rest), device


def main() -> int:
    try:
        config, device = read(sys.argv[1:])
        logs.set_up(config.log_level, name=config.name)
        return run_worker(config, device.build)
    except PenstockError as exc:
        print(f"{Path(__file__).stem}: {exc.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
