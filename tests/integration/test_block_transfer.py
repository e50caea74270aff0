"""Two engines on one host: KV computed by one is used by the other, and never wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engines import Instance, address, engine_thread, handover_plan

PROMPT = [(7 * i * i + 3 * i) % 200 for i in range(100)]
NUM_BLOCKS = len(PROMPT) // 16


class Pair:
    """`owner` and `receiver`, engines in this process that are connected over ipc."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.engines = [engine_thread(folder, name, **settings) for name in ("owner", "receiver")]
        self.owner = Instance(address(folder, "owner"), "owner")
        self.receiver = Instance(address(folder, "receiver"), "receiver")

    def close(self) -> None:
        for instance in (self.owner, self.receiver):
            instance.close()
        for engine in self.engines:
            engine.close()


def pair_with(tmp_path: Path, means: str) -> Pair:
    if means == "mooncake":
        pytest.importorskip("mooncake.engine", reason="the Mooncake transfer engine is missing")
        means = "mooncake,tcp"
    return Pair(tmp_path, kv_transfer=means)


@pytest.fixture(params=["map", "tcp", "mooncake"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    made = pair_with(tmp_path, request.param)
    made.means = request.param  # type: ignore[attr-defined]
    yield made
    made.close()


def test_a_prefix_is_fetched_and_tokens_are_those_of_the_undisturbed_run(pair: Any) -> None:
    expected = pair.owner.run("a", PROMPT)
    fetched = pair.receiver.fetch("b", PROMPT, pair.owner)
    assert (fetched.num_blocks, fetched.means, fetched.reason) == (NUM_BLOCKS, pair.means, "")
    assert pair.receiver.run("b", PROMPT) == expected
    assert pair.receiver.rows["b"][0].cached_tokens == 16 * NUM_BLOCKS


def test_a_submit_names_its_source_itself(pair: Any) -> None:
    expected = pair.owner.run("a", PROMPT)
    source = pair.owner.source(NUM_BLOCKS)
    assert pair.receiver.run("b", PROMPT, kv_source=source) == expected
    assert pair.receiver.rows["b"][0].cached_tokens == 16 * NUM_BLOCKS


def test_prefill_here_and_decode_there(pair: Any) -> None:
    expected = pair.owner.run("undisturbed", PROMPT, block_keys=b"")
    plan = handover_plan(pair.owner, pair.receiver)
    pair.owner.submit("a", PROMPT, plan=plan)
    fetched = pair.receiver.fetch("a", PROMPT, pair.owner)
    first = pair.owner.result("a")
    assert pair.owner.rows["a"][-1].finish == "handover" and len(first) == 1
    rest = pair.receiver.run("a", PROMPT, attempt=2, resumed_ids=first, plan=plan[1:])
    assert first + rest == expected
    assert fetched.num_blocks == NUM_BLOCKS
