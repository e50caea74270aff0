"""The runner that computes: a thread that executes batches in order, one ahead of the scheduler.

This is the overlap of the design: while this thread runs step N, the thread that called `launch` is
free to schedule step N+1, publish step N-1 and serve messages; N+1 waits here in the queue when N
ends, so the device goes from one to the next without asking anyone.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from penstock.engine.runtime.executor import StepExecutor
from penstock.engine.scheduler.batch import Batch, StepResult
from penstock.protocol.errors import EngineFailed

log = logging.getLogger(__name__)

_Done = Callable[[StepResult], None]


class TorchRunner:
    """One rank on one device."""

    def __init__(self, executor: StepExecutor) -> None:
        self._executor = executor
        self._queue: queue.SimpleQueue[tuple[Batch, _Done] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="penstock-compute", daemon=True)
        self._thread.start()

    def launch(self, batch: Batch, done: _Done) -> None:
        self._queue.put((batch, done))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._executor.close()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            batch, done = work
            try:
                result = self._executor.execute(batch)
            except BaseException as exc:
                log.exception("the runner is lost")
                reason = f"the engine's runner is lost: {type(exc).__name__}: {exc}"
                done(StepResult(batch.step, [], error=EngineFailed(reason).info(), fatal=True))
                return
            done(result)
