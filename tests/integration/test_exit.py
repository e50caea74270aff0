"""A program that ends without closing its engine, in the middle of a step, ends in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, threading, time
from penstock import LLM, SamplingParams
llm = LLM("toy", kv_cache_bytes=64 << 20)
long = SamplingParams(max_tokens=1500, ignore_eos=True, temperature=0.0)
work = lambda: llm.generate(["once upon a time"] * 8, long, use_tqdm=False)
if sys.argv[1] == "exit":
    threading.Thread(target=work, daemon=True).start()
    time.sleep(float(sys.argv[2]))
    sys.exit(7)
print("ready", flush=True)
work()
"""


@pytest.mark.parametrize("after_s", ["0.05", "0.2", "0.3"])
def test_exit_in_the_middle_of_a_step(after_s: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "exit", after_s],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 7, done.stderr[-2000:]


def test_interrupted_in_the_middle_of_a_step() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    # Python's own way of ending on an interrupt, neither a crash nor a hang.
    assert process.returncode in (1, -signal.SIGINT, 130), stderr[-2000:]
    assert b"KeyboardInterrupt" in stderr
