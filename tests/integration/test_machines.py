"""Other machines than this one: narrower vectors, no compiler, one core, a spoilt cache.

Each runs the toy in a process of its own, in float32, and must say what this machine says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engine.platforms.cpu import kernels

needs_compiler = pytest.mark.skipif(kernels.load() is None, reason="needs a C++ compiler")

PROGRAM = """
import json, sys, torch
from penstock import LLM, SamplingParams
llm = LLM("toy", dtype=sys.argv[1], max_num_seqs=4, kv_cache_bytes=16 << 20)
prompts = ["The capital of France is", "Two and two make", "Once upon a time there"]
done = llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
                    use_tqdm=False)
print(json.dumps({"ids": [each.outputs[0].token_ids for each in done],
                  "kernels": llm._driver.card.kernels, "threads": torch.get_num_threads()}))
"""


def run(dtype: str = "float32", cores: str | None = None, **environment: str) -> dict:
    command = [sys.executable, "-c", PROGRAM, dtype]
    if cores is not None:
        command = ["taskset", "-c", cores, *command]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"said": done.stderr}


@pytest.fixture(scope="module")
def here() -> dict:
    return run()


@needs_compiler
def test_without_avx512(here: dict) -> None:
    """AVX2 kernels of ours beside torch and oneDNN held to AVX2."""
    masked = run(PENSTOCK_MARCH="haswell", ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert masked["ids"] == here["ids"]
    assert masked["kernels"]["linear"] != "torch"


@needs_compiler
def test_without_any_vectors_worth_the_name(here: dict) -> None:
    assert run(PENSTOCK_MARCH="x86-64", ATEN_CPU_CAPABILITY="default")["ids"] == here["ids"]


@needs_compiler
def test_bfloat16_without_avx512() -> None:
    """There torch has no fast bfloat16 at all; ours unpacks it. The same weights, other roundings:
    most tokens agree."""
    masked = run("bfloat16", PENSTOCK_MARCH="haswell", ONEDNN_MAX_CPU_ISA="AVX2")
    plain = run("bfloat16")
    first = [ids[0] for ids in plain["ids"]]
    assert [ids[0] for ids in masked["ids"]] == first
    assert masked["kernels"]["linear"] == "native"


def test_without_a_compiler(here: dict, tmp_path: Path) -> None:
    bare = run(CXX="/nonexistent/g++", PENSTOCK_CACHE=str(tmp_path))
    assert bare["ids"] == here["ids"]
    assert bare["said"].count("no native CPU kernels") == 1


def test_one_core(here: dict) -> None:
    core = str(min(os.sched_getaffinity(0)))
    alone = run(cores=core)
    assert alone["ids"] == here["ids"] and alone["threads"] == 1


@needs_compiler
def test_a_spoilt_cache_is_compiled_again(here: dict, tmp_path: Path) -> None:
    library = kernels.build(cache=tmp_path)
    library.write_bytes(b"\x7fELF" + os.urandom(5000))
    again = run(PENSTOCK_CACHE=str(tmp_path))
    assert again["ids"] == here["ids"] and again["kernels"] == here["kernels"]
