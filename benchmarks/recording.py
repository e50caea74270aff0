"""What --record costs: the service's core with and without a tape, on the same inputs.

    python -m benchmarks.recording

One instance, so many streams, one message with a token for each of them a step; CPU time of the
thread of the core, and of the thread that deflates and writes, in µs for each message and token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from penstock.protocol.instance import Attached, InstanceCard
from penstock.protocol.kv import KvLayout
from penstock.protocol.request import SamplingParams
from penstock.protocol.tokens import TokenRow, Tokens
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import GenerationSpec
from penstock.service.recipe import CoreRecipe
from penstock.service.recorder import FileTape, make_core

RECIPE = CoreRecipe(ServiceCoreConfig(name="bench"), "least-load")
CARD = InstanceCard(
    name="engine-0", incarnation=1, pid=0, model="m", model_digest="m", vocab_size=1000,
    max_model_len=100_000, dtype="bfloat16", device="none",
    layout=KvLayout(1, 1, 8, 16, "bfloat16", 4096), num_blocks=100_000, max_num_seqs=4096,
    max_num_batched_tokens=2048,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for streams in options.streams:
        times = {"plain": [], "recorded": []}  # type: dict[str, list[tuple[float, float, float]]]
        for _ in range(options.repeats):
            times["plain"].append(_once(RECIPE.make, streams, options)[:3])
            with tempfile.TemporaryDirectory() as folder:
                tape = FileTape(Path(folder) / "r")
                found = _once(lambda tape=tape: make_core(RECIPE, tape), streams, options)
                began_s = time.process_time()
                tape.close()
                writing_s = found[2] + time.process_time() - began_s
                times["recorded"].append((found[0], found[1], writing_s))
                size = tape.path.stat().st_size
        plain, recorded = min(times["plain"]), min(times["recorded"])
        steps = options.steps
        print(
            json.dumps(
                {
                    "streams": streams,
                    "submit_us": round(1e6 * plain[1] / streams, 1),
                    "submit_recorded_us": round(1e6 * recorded[1] / streams, 1),
                    "message_us": round(1e6 * plain[0] / steps, 2),
                    "message_recorded_us": round(1e6 * recorded[0] / steps, 2),
                    "token_more_us": round(1e6 * (recorded[0] - plain[0]) / steps / streams, 3),
                    "writer_us": round(1e6 * recorded[2] / steps, 2),
                    "bytes_a_message": round(size / steps, 1),
                }
            )
        )


def _once(
    make: Callable[[], ServiceCore], streams: int, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Seconds of the core's thread for messages and for submits, and of all other threads."""
    core = make()
    core.add_instance("engine-0", 0.0)
    core.on_message("engine-0", Attached(CARD, 2), 0.0)
    specs = [
        GenerationSpec(
            f"req-{n:08x}", [(n + i) % 1000 for i in range(options.prompt)],
            SamplingParams(max_tokens=100_000, seed=n),
        )
        for n in range(streams)
    ]  # fmt: skip
    began_s, all_s = time.thread_time(), time.process_time()
    for spec in specs:
        core.submit(spec, 0.1)
    submits_s = time.thread_time() - began_s
    messages = [
        Tokens(
            "engine-0", 1, step + 1,
            [TokenRow(f"req-{n:08x}/0", 1, step, [step % 1000]) for n in range(streams)],
        )
        for step in range(options.steps)
    ]  # fmt: skip
    all_s += time.thread_time() - began_s - submits_s  # making messages is nobody's work
    began_s = time.thread_time()
    for step, message in enumerate(messages):
        core.on_message("engine-0", message, 0.2 + 0.01 * step)
    messages_s = time.thread_time() - began_s
    return messages_s, submits_s, max(0.0, time.process_time() - all_s - messages_s - submits_s)


if __name__ == "__main__":
    main()
