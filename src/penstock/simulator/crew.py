"""Many simulations of one trace, on as many processes as there are to be used.

Every run is a function of its task alone, so results do not depend on how many processes there are.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import NotEnoughMemory
from penstock.simulator import experiment
from penstock.simulator.outcome import Outcome
from penstock.simulator.spec import ClusterSpec
from penstock.simulator.stretch import busiest, dealt, faster

T = TypeVar("T")
#: How far each of the tasks is, from 0 to 1.
Progress = Callable[[Sequence[float]], None]
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run. `window_s`: only the busiest stretch of the trace, which then comes `speed` times as
    fast. `deal`: a seed for `stretch.dealt`."""

    spec: ClusterSpec
    speed: float = 1.0
    seed: int = 0
    mode: str = "exact"
    window_s: float | None = None
    deal: int = 0


class Crew(Generic[T]):
    """`measure(outcome, task)` makes of an outcome what is kept of it; with several processes it
    has to be a function of a module. A context manager; `run` as often as wanted."""

    def __init__(
        self,
        requests: Sequence[TraceRequest],
        measure: Callable[[Outcome, Task], T],
        jobs: int = 1,
    ) -> None:
        self._requests, self._measure, self._jobs = requests, measure, jobs
        self._pool: ProcessPoolExecutor | None = None
        self._shares: Any = None

    def __enter__(self) -> Crew[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:  # nobody waits for what is left: an interrupt ends it now
            for process in list(self._pool._processes.values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Sequence[Task], progress: Progress = lambda shares: None) -> list[T]:
        """Results in the order of `tasks`. Errors of a run are raised here."""
        if self._jobs == 1 or len(tasks) == 1:
            return self._run_here(tasks, progress)
        pool, shares = self._processes(len(tasks))
        futures: list[Future[T]] = [pool.submit(_run, i, task) for i, task in enumerate(tasks)]
        left: set[Future[T]] = set(futures)
        while left:
            done, left = wait(left, _LOOK_EVERY_S)
            for future in done:
                if (exc := future.exception()) is not None:
                    if isinstance(exc, BrokenProcessPool):
                        raise NotEnoughMemory(
                            "a process of the simulation was killed: is there enough memory? "
                            "--jobs 1 takes the least"
                        ) from exc
                    raise exc
            progress([1.0 if f.done() else shares[i] for i, f in enumerate(futures)])
        return [future.result() for future in futures]

    def _run_here(self, tasks: Sequence[Task], progress: Progress) -> list[T]:
        shares = [0.0] * len(tasks)
        results = []
        for place, task in enumerate(tasks):

            def tell(share: float, place: int = place) -> None:
                shares[place] = share
                progress(shares)

            results.append(_result(task, self._requests, self._measure, tell))
            tell(1.0)
        return results

    def _processes(self, num_tasks: int) -> tuple[ProcessPoolExecutor, Any]:
        if self._shares is None or len(self._shares) < num_tasks:
            self.__exit__(None, None, None)
            context = multiprocessing.get_context("spawn")  # the same on every platform
            self._shares = context.Array("d", max(num_tasks, 64), lock=False)
            self._pool = ProcessPoolExecutor(
                self._jobs, context, _begin, (self._requests, self._measure, self._shares)
            )
        assert self._pool is not None
        self._shares[:] = [0.0] * len(self._shares)
        return self._pool, self._shares


@dataclass(slots=True)
class _Process:
    requests: Sequence[TraceRequest]
    measure: Callable[[Outcome, Task], Any]
    shares: Any


_process: _Process | None = None


def _begin(requests: Sequence[TraceRequest], measure: Any, shares: Any) -> None:
    global _process
    _process = _Process(requests, measure, shares)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Who is killed cannot end its processes, and these would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(place: int, task: Task) -> Any:
    process = _process
    assert process is not None

    def tell(share: float) -> None:
        process.shares[place] = share

    return _result(task, process.requests, process.measure, tell)


def _result(
    task: Task,
    requests: Sequence[TraceRequest],
    measure: Callable[[Outcome, Task], T],
    progress: Callable[[float], None],
) -> T:
    chosen = faster(dealt(busiest(requests, task.window_s), task.deal), task.speed)
    outcome = experiment.run(task.spec, chosen, seed=task.seed, mode=task.mode, progress=progress)
    return measure(outcome, task)
