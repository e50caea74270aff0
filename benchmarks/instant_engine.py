"""An engine instance that returns tokens at once: what is left is service, protocol and scheduler.

python -m benchmarks.instant_engine --address ipc:///tmp/instant.sock --model toy
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from penstock.checkpoint import resolve
from penstock.engine.core import InstanceCore
from penstock.engine.instance import InstanceDriver
from penstock.engine.scheduler.batch import Batch, RowResult, StepResult
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.protocol.instance import InstanceCard
from penstock.protocol.kv import BLOCK_TOKENS, KvLayout
from penstock.protocol.transport.open import listen

MAX_MODEL_LEN = 8192
MAX_NUM_SEQS = 256


class InstantRunner:
    """Each row samples the next of a fixed list of ids, in no time."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def launch(self, batch: Batch, done: Callable[[StepResult], None]) -> None:
        ids, step = self._ids, batch.step
        token = [ids[step % len(ids)]]
        rows = [RowResult(row.slot, token if row.samples else []) for row in batch.rows]
        done(StepResult(step, rows, 1e-6))

    def close(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--model", default="toy")
    options = parser.parse_args()
    vocab_size = int(resolve(options.model).config["vocab_size"])
    num_blocks = MAX_NUM_SEQS * MAX_MODEL_LEN // BLOCK_TOKENS
    config = SchedulerConfig(
        max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=8192, max_model_len=MAX_MODEL_LEN
    )
    card = InstanceCard(
        name="instant",
        incarnation=1,
        pid=os.getpid(),
        model=options.model,
        model_digest="instant",
        vocab_size=vocab_size,
        max_model_len=MAX_MODEL_LEN,
        dtype="none",
        device="none",
        layout=KvLayout(1, 1, 8, BLOCK_TOKENS, "float32", 1024),
        num_blocks=num_blocks,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=8192,
    )
    # Ids of ordinary words: what a model would say most of the time.
    runner = InstantRunner(list(range(300, min(1300, vocab_size))))
    driver = InstanceDriver(InstanceCore(card, Scheduler(config, num_blocks)), runner)
    driver.warm_up()
    driver.run(listen(options.address, "instant"))


if __name__ == "__main__":
    main()
