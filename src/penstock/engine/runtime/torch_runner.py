"""The runner that computes: a thread that executes batches in order, one ahead of the scheduler.

This is the overlap of the design: while this thread runs step N, the thread that called `launch` is
free to schedule step N+1, publish step N-1 and serve messages; N+1 waits here in the queue when N
ends, so the device goes from one to the next without asking anyone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from penstock.engine.memory.premap import NoPremapper, Premapper
from penstock.engine.runtime.executor import StepExecutor
from penstock.engine.scheduler.batch import Batch, StepResult
from penstock.protocol.errors import EngineFailed

log = logging.getLogger(__name__)

T = TypeVar("T")
_Done = Callable[[StepResult], None]
#: Long enough to be put to sleep; the kernel's timer slack makes some 60 us of it.
_BLINK_S = 1e-6


class TorchRunner:
    """One rank on one device. `call` what loads the model, `serve` its executor, then `launch`."""

    def __init__(self) -> None:
        self._executor: StepExecutor | None = None
        self._premapper: Premapper | NoPremapper = NoPremapper()
        self._lost = False
        self._launched = self._ended = 0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="penstock-compute", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the compute thread and wait for it; raises what it raises.

        All that computes belongs there, loading included. OpenMP keeps a pool of threads for each
        thread that has computed something, and once the pools together have more threads than there
        are cores, libgomp sends waiting threads to sleep after a few spins: waking them at each of
        some hundred parallel regions took 17 ms of the 45 of a decode step (0.6B, two cores).
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as exc:
                future.set_exception(exc)

        self._queue.put(run)
        return future.result()

    def serve(
        self, executor: StepExecutor, premapper: Premapper | NoPremapper | None = None
    ) -> None:
        self._executor = executor
        self._premapper = premapper or self._premapper

    def launch(self, batch: Batch, done: _Done) -> None:
        self._premapper.launched(batch)
        idle = self._launched == self._ended
        self._launched += 1
        self._queue.put(partial(self._step, batch, done))
        if idle:
            # The compute thread has just been woken, and our caller would hold the interpreter for
            # the rest of its turn, publishing: let the step go first.
            time.sleep(_BLINK_S)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._premapper.close()
        if self._executor is not None:
            self._executor.close()

    def _run(self) -> None:
        while not self._lost and (work := self._queue.get()) is not None:
            work()

    def _step(self, batch: Batch, done: _Done) -> None:
        assert self._executor is not None
        self._premapper.starts(batch)
        try:
            result = self._executor.execute(batch)
        except BaseException as exc:
            log.exception("the runner is lost")
            self._lost = True
            reason = f"the engine's runner is lost: {type(exc).__name__}: {exc}"
            result = StepResult(batch.step, [], error=EngineFailed(reason).info(), fatal=True)
        self._premapper.ended()
        self._ended += 1
        done(result)
