"""One engine under measurement: JSON jobs on standard input, JSON results on standard output.

    PYTHON worker.py KIND '{"model": ..., ...}'

Run by `benchmarks.compare` with the Python of the engine's own venv, so nothing of ours is imported
here. KIND names the module beside this file that drives the engine; it has `load(settings)`, which
gives an `Engine`. Each engine is driven through its own public API, by token ids, greedily and past
any end-of-sequence token.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

#: Linux: what becomes of a process whose parent ends, however that ended.
PR_SET_PDEATHSIG = 1


class NotAvailable(Exception):
    """The engine is there, but has not got what is asked of it."""


@dataclass
class Generated:
    #: `time.perf_counter()` when the caller had its first token; None where it cannot be seen.
    first_token_at_s: float | None
    ids: list[list[int]]


class Engine(Protocol):
    version: str
    #: Bytes that a decode step has to read, if the engine knows better than its files' sizes.
    weight_bytes: int | None

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> Generated: ...


def memory() -> dict[str, int]:
    """Bytes: the peak (with shared memory), and what is resident now, by its kind."""
    wanted = {"VmHWM": "peak_bytes", "RssAnon": "anon_bytes", "RssFile": "file_bytes",
              "RssShmem": "shared_bytes"}  # fmt: skip
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in wanted:
            found[wanted[key]] = 1024 * int(value.split()[0])
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            found["pss_bytes"] = 1024 * int(line.split()[1])
    return found


def run(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    started_s = time.perf_counter()
    made = engine.generate(job["prompts"], job["max_tokens"])
    elapsed_s = time.perf_counter() - started_s
    result: dict[str, Any] = {"elapsed_s": elapsed_s, "num_tokens": sum(map(len, made.ids))}
    if made.first_token_at_s is not None:
        result["first_token_s"] = made.first_token_at_s - started_s
    if job.get("want_ids"):
        result["ids"] = made.ids
    return result | memory()


def main() -> None:
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between our lines

    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    try:
        engine: Engine = importlib.import_module(f"{kind}_engine").load(settings)
    except (NotAvailable, ImportError) as exc:
        say(unavailable=str(exc))
        return
    engine.generate([list(range(100, 116))], [1])
    say(version=engine.version, weight_bytes=engine.weight_bytes, **memory())
    for line in sys.stdin:
        say(**run(engine, json.loads(line)))
    os._exit(0)  # some engines take their time to take themselves apart


if __name__ == "__main__":
    # The engines' modules say `from worker import ...`: this module must not exist twice.
    sys.modules["worker"] = sys.modules["__main__"]
    main()
