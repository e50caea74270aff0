"""The offline API in awkward places: twice, in threads, closed or interrupted in the middle."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock import LLM, SamplingParams
from penstock.protocol.errors import PenstockError
from tests.helpers.server import environment

SETTINGS = {"dtype": "float32", "kv_cache_memory_bytes": 16 << 20}
SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=450, temperature=0.0, ignore_eos=True)


@pytest.fixture
def llm(checkpoint: str) -> Iterator[LLM]:
    with LLM(checkpoint, **SETTINGS) as llm:
        yield llm


def ids(llm: LLM, params: SamplingParams = SHORT, prompt: int = 7) -> list[int]:
    return llm.generate([[prompt] * 5], params, use_tqdm=False)[0].outputs[0].token_ids


def test_two_in_one_process(llm: LLM, checkpoint: str) -> None:
    with LLM(checkpoint, **SETTINGS) as other, ThreadPoolExecutor(2) as pool:
        assert len(set(map(tuple, pool.map(ids, [llm, other] * 4)))) == 1
    assert len(ids(llm)) == 6  # the end of one is not the end of the other


def test_made_and_used_in_a_thread(checkpoint: str) -> None:
    def work() -> int:
        with LLM(checkpoint, **SETTINGS) as llm:
            return len(ids(llm))

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result(60) == 6


def test_used_by_many_threads(llm: LLM) -> None:
    expected = {p: ids(llm, prompt=p) for p in range(5, 13)}
    with ThreadPoolExecutor(8) as pool:
        futures = {p: pool.submit(ids, llm, SHORT, p) for p in expected}
        assert {p: f.result(60) for p, f in futures.items()} == expected


def test_closed_while_it_generates(checkpoint: str) -> None:
    llm = LLM(checkpoint, **SETTINGS)
    with ThreadPoolExecutor(1) as pool:
        many = pool.submit(llm.generate, [[5 + i] * 9 for i in range(60)], LONG, use_tqdm=False)
        time.sleep(0.3)
        llm.close()
        with pytest.raises(PenstockError):
            many.result(30)


def test_used_after_close(checkpoint: str) -> None:
    llm = LLM(checkpoint, **SETTINGS)
    llm.close()
    llm.close()
    with pytest.raises(PenstockError, match="closed"):
        ids(llm)


def test_ctrl_c(llm: LLM) -> None:
    """Ends the call at once; what it wanted is freed, and the next call is served."""
    main = threading.main_thread()
    timer = threading.Timer(0.3, signal.pthread_kill, (main.ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5 + i] * 9 for i in range(64)] * 4, LONG, use_tqdm=False)
    assert len(ids(llm)) == 6
    deadline_s = time.monotonic() + 10.0
    while llm._driver.core.journal:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("end", ["", "llm.close()", "raise SystemExit(0)", "del llm"])
def test_the_interpreter_ends_cleanly(checkpoint: str, end: str) -> None:
    script = f"""
from penstock import LLM, SamplingParams
llm = LLM({checkpoint!r}, dtype="float32", kv_cache_memory_bytes=16 << 20)
print(len(llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.split()[-1] == "3", done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr
