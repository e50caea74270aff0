"""The runner's thread: order, failures of a step, and the loss of the runner itself."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from penstock.engine.runtime.torch_runner import TorchRunner
from penstock.engine.scheduler.batch import Batch, StepResult


class Executor:
    def __init__(self, lost_at: int | None = None) -> None:
        self.lost_at = lost_at
        self.executed: list[int] = []
        self.closed = False

    def execute(self, batch: Batch) -> StepResult:
        if batch.step == self.lost_at:
            raise MemoryError("no memory to map")
        self.executed.append(batch.step)
        return StepResult(batch.step, [])

    def close(self) -> None:
        self.closed = True


@pytest.mark.filterwarnings("error")
def test_batches_finish_in_launch_order_each_once() -> None:
    executor: Any = Executor()
    runner = TorchRunner()
    runner.serve(executor)
    done: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    for step in range(50):
        runner.launch(Batch(step, []), done.put)
    assert [done.get(timeout=10).step for _ in range(50)] == list(range(50))
    runner.close()
    assert executor.closed and executor.executed == list(range(50)) and done.empty()


def test_a_batch_that_cannot_be_applied_loses_the_runner() -> None:
    executor: Any = Executor(lost_at=1)
    runner = TorchRunner()
    runner.serve(executor)
    done: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    for step in range(3):
        runner.launch(Batch(step, []), done.put)
    first, second = done.get(timeout=10), done.get(timeout=10)
    assert not first.fatal
    assert second.fatal and second.error is not None and "no memory to map" in second.error.message
    runner.close()
    assert executor.executed == [0] and done.empty()  # nothing ran on slots that cannot be trusted


def test_what_is_called_runs_on_the_thread_that_computes() -> None:
    runner = TorchRunner()
    assert runner.call(lambda: threading.current_thread().name) == "penstock-compute"
    with pytest.raises(ValueError, match="no such model"):
        runner.call(fail)
    runner.close()


def fail() -> None:
    raise ValueError("no such model")
