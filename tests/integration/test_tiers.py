"""An engine whose device pool is far too small for what it is asked again and again: hits come from
the host and the disk, and the tokens are those of an engine that never evicts."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from penstock.engine.memory.tiers.index import TierStats
from penstock.llm import LLM
from penstock.protocol.kv import Tier
from penstock.sampling_params import SamplingParams

NUM_BLOCKS = 48
MAX_MODEL_LEN = 256
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def engine(**settings: object) -> LLM:
    return LLM(
        "toy",
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=2,
        num_blocks=NUM_BLOCKS,
        **settings,
    )


def conversations(count: int) -> list[list[int]]:
    """Prompts of 160 tokens, ten blocks each."""
    draw = random.Random(7)
    return [[draw.randrange(1, 200) for _ in range(160)] for _ in range(count)]


def ask(llm: LLM, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """The tokens of each, one after the other, and how many prompt tokens were cached."""
    tokens, cached = [], 0
    for prompt in prompts:
        (out,) = llm.generate([{"prompt_token_ids": prompt}], GREEDY, use_tqdm=False)
        tokens.append(list(out.outputs[0].token_ids))
        cached += out.num_cached_tokens or 0
    return tokens, cached


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what an engine says to each that has never seen another."""
    prompts = conversations(12)
    with LLM("toy", dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_seqs=2,
             enable_prefix_caching=False) as llm:  # fmt: skip
        return prompts, ask(llm, prompts)[0]


def loaded(llm: LLM) -> dict[str, int]:
    """Blocks that have come from each tier."""
    return {tier: s.loaded for tier, s in stats(llm).items()}


def stats(llm: LLM) -> dict[Tier, TierStats]:
    assert llm._engine is not None
    return llm._engine._driver.core.exchange.tiers.stats


def block_bytes(num_blocks: int) -> int:
    with engine() as llm:
        assert llm._engine is not None
        return num_blocks * llm._engine._driver.core.card.layout.block_bytes


@pytest.fixture(scope="module")
def a_block() -> int:
    """Bytes."""
    return block_bytes(1)


def test_hits_come_from_host_and_disk_and_change_no_token(
    undisturbed: tuple[list[list[int]], list[list[int]]], a_block: int, tmp_path: Path
) -> None:
    prompts, expected = undisturbed
    with engine(
        kv_host_cache_bytes=64 * a_block,
        kv_disk_cache_bytes=120 * a_block,
        kv_disk_path=tmp_path,
    ) as llm:
        assert ask(llm, prompts)[0] == expected
        for _ in range(3):  # to and fro, so that the last ones are in the fastest places
            prompts, expected = prompts[::-1], expected[::-1]
            tokens, cached = ask(llm, prompts)
            assert tokens == expected
            assert cached > 0.8 * sum(map(len, prompts)), "most of it is in some tier"
        assert loaded(llm)["host"] > 10 and loaded(llm)["disk"] > 10
        assert all(s.not_loaded == s.not_stored == 0 for s in stats(llm).values())


def test_a_burst_that_waits_for_room_has_its_hits_too(
    undisturbed: tuple[list[list[int]], list[list[int]]], a_block: int
) -> None:
    """When all come at once there is room for two: the others' blocks are loaded as their turn
    comes, not when they arrive."""
    prompts, expected = undisturbed
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    with engine(kv_host_cache_bytes=200 * a_block) as llm:
        ask(llm, prompts)
        outs = llm.generate(asked, GREEDY, use_tqdm=False)
        assert [list(out.outputs[0].token_ids) for out in outs] == expected
        assert sum(out.num_cached_tokens for out in outs) > 0.3 * sum(map(len, prompts))


def test_a_device_pool_alone_has_no_such_hits(
    undisturbed: tuple[list[list[int]], list[list[int]]],
) -> None:
    prompts, expected = undisturbed
    with engine() as llm:
        ask(llm, prompts)
        tokens, cached = ask(llm, prompts)
    assert tokens == expected and cached < 0.1 * sum(map(len, prompts))


def test_garbage_on_the_disk_changes_no_token(
    undisturbed: tuple[list[list[int]], list[list[int]]], a_block: int, tmp_path: Path
) -> None:
    prompts, expected = undisturbed
    with engine(kv_disk_cache_bytes=160 * a_block, kv_disk_path=tmp_path) as llm:
        ask(llm, prompts)
        (file,) = tmp_path.iterdir()
        garbage = np.random.default_rng(0)
        with file.open("r+b") as disk:  # a bit in every other page, and a whole stretch
            for page in range(1, file.stat().st_size // 4096, 2):
                disk.seek(page * 4096 + 2000)
                byte = disk.read(1)[0]
                disk.seek(-1, 1)
                disk.write(bytes([byte ^ (1 << int(garbage.integers(8)))]))
        assert ask(llm, prompts)[0] == expected
        assert stats(llm)["disk"].not_loaded > 0
        assert ask(llm, prompts)[0] == expected


def test_a_full_disk_costs_hits_and_nothing_else(
    undisturbed: tuple[list[list[int]], list[list[int]]], a_block: int, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE stands in for the full disk, after the start."""
    prompts, expected = undisturbed
    with engine(kv_disk_cache_bytes=160 * a_block, kv_disk_path=tmp_path) as llm:
        (file,) = tmp_path.iterdir()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        os.truncate(file, 4096)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            assert ask(llm, prompts)[0] == expected
            assert ask(llm, prompts)[0] == expected
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert stats(llm)["disk"].capacity == 0, "it is given up"


def test_a_disk_without_room_at_the_start_is_no_reason_not_to_serve(
    undisturbed: tuple[list[list[int]], list[list[int]]], tmp_path: Path
) -> None:
    prompts, expected = undisturbed
    room = shutil.disk_usage(tmp_path).total
    with engine(kv_disk_cache_bytes=2 * room, kv_disk_path=tmp_path) as llm:
        assert ask(llm, prompts[:2])[0] == expected[:2]
        assert "disk" not in stats(llm)


#: Serves all prompts, says so, and waits to be killed.
DOOMED = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from tests.integration.test_tiers import ask, conversations, engine
llm = engine(kv_disk_cache_bytes=int(sys.argv[1]), kv_disk_path=Path(sys.argv[2]))
ask(llm, conversations(12))
print("served", flush=True)
sys.stdin.read()
"""


def test_a_killed_engine_finds_its_blocks_again(
    undisturbed: tuple[list[list[int]], list[list[int]]], a_block: int, tmp_path: Path
) -> None:
    prompts, expected = undisturbed
    size = 160 * a_block
    code = DOOMED.format(path=sys.path)
    doomed = subprocess.Popen(
        [sys.executable, "-c", code, str(size), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert doomed.stdout is not None and doomed.stdout.readline() == b"served\n"
    finally:
        doomed.kill()
        doomed.communicate()
    with engine(kv_disk_cache_bytes=size, kv_disk_path=tmp_path) as llm:
        tokens, cached = ask(llm, prompts)
        assert tokens == expected
        assert cached > 0.4 * sum(map(len, prompts))
        assert loaded(llm)["disk"] * 16 >= cached
