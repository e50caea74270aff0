"""Scheduling cases that another framework's authors wrote down (tests/data/README.md).

One of xLLM's blocks is padding and never usable; we have no such block, so a pool here has the
case's `usable_blocks`. Where our semantics differ on purpose, the test says why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.scheduling import Harness, submit

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.stopping import check_stop
from penstock.protocol.errors import ContextLengthExceeded
from penstock.protocol.kv import block_keys, next_key, root_key, split_keys
from penstock.protocol.request import SamplingParams

CASES = {
    case["id"]: case
    for case in json.loads(
        (Path(__file__).parents[1] / "data" / "xllm_cases.json").read_text(encoding="utf-8")
    )["cases"]
}
#: Families of cases that are not about scheduling, and where they belong.
ELSEWHERE = {
    "beam.": "no beam search yet: refused by name at the API",
    "latency.": "the cost model is fitted by the instance's core",
    "suffix.": "no speculative decoding yet",
    "route.": "no KV transfer between tensor-parallel groups yet",
    "enc.": "no encoder cache yet",
    "kv.capacity": "blocks are counted by the memory, not by the scheduler",
    "stop.sequence_beats_ignore_eos": "stop strings are text: the service matches them",
}
ROOT = root_key("cases")


def case(case_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return CASES[case_id]["given"], CASES[case_id]["expect"]


def test_every_case_is_tested_or_has_its_place_elsewhere() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for case_id in CASES:
        tested = f'"{case_id}"' in source
        assert tested or any(case_id.startswith(prefix) for prefix in ELSEWHERE), case_id


# ---- prefix cache -------------------------------------------------------------------------


class Cache:
    """A pool, by token ids: what a sequence does with it, in one call."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_tokens = block_tokens

    def match(self, ids: list[int]) -> int:
        return len(self.pool.match(split_keys(block_keys(ROOT, ids, self.block_tokens))))

    def insert(self, ids: list[int]) -> None:
        keys = split_keys(block_keys(ROOT, ids, self.block_tokens))
        blocks = [self.pool.allocate() for _ in keys]
        for index, key in enumerate(keys):
            self.pool.register(blocks[index], key, keys[index - 1] if index else b"", True)
        self.pool.release(blocks)

    def evict(self, num_blocks: int) -> int:
        """The pool evicts when it must: take what is free, and so many more."""
        before = self.pool.num_keys
        num_wanted = min(self.pool.num_available, self.pool.num_blocks - before + num_blocks)
        taken = [self.pool.allocate() for _ in range(num_wanted)]
        self.pool.release(taken)
        self.pool.check([])
        return before - self.pool.num_keys


def test_prefix_insert_match() -> None:
    given, expect = case("prefix.insert_match")
    cache = Cache(8, given["block_size"])
    assert cache.match(given["tokens"]) == expect["first_match_blocks"]
    cache.insert(given["tokens"])
    assert cache.pool.num_keys == expect["cached_blocks"]
    assert cache.match(given["tokens"]) == expect["second_match_blocks"]


def test_prefix_match_is_position_chained() -> None:
    given, expect = case("prefix.match_is_position_chained")
    cache = Cache(8, given["block_size"])
    cache.insert(given["cached"])
    assert cache.match(given["query"]) == expect["match_blocks"]


def test_prefix_evict_one_drops_the_leaf() -> None:
    given, expect = case("prefix.evict_one_drops_leaf")
    cache = Cache(8, given["block_size"])
    cache.insert(given["cached"])
    assert cache.evict(given["evict"]) == expect["evicted"]
    assert cache.pool.num_keys == expect["cached_blocks"]
    assert cache.match([1, 2, 3, 4]) == expect["match([1,2,3,4])"]
    assert cache.match(given["cached"][4:]) == expect["match(tokens[4:])"]


def test_prefix_two_chains() -> None:
    given, expect = case("prefix.two_chains")
    cache = Cache(8, given["block_size"])
    for ids in given["cached"]:
        cache.insert(ids)
    assert cache.pool.num_keys == expect["cached_blocks"]
    assert [cache.match(ids) for ids in given["cached"]] == [expect["match each"]] * 2


def test_prefix_evict_empty() -> None:
    given, expect = case("prefix.evict_empty")
    cache = Cache(4, 4)
    assert cache.evict(given["evict"]) == 0
    assert cache.pool.num_keys == expect["cached_blocks"]


def test_prefix_evict_all_frees_the_blocks() -> None:
    given, expect = case("prefix.evict_all_frees_blocks")
    cache = Cache(given["total_blocks"], given["block_size"])
    cache.insert(given["cached"])
    assert cache.evict(given["evict"]) == expect["evicted"]
    assert expect["free_blocks"] == "all"
    assert cache.pool.num_available == given["total_blocks"] and cache.pool.num_reusable == 0
    assert cache.match(given["cached"]) == expect["match_blocks"]


def test_hash_is_order_sensitive() -> None:
    given, expect = case("hash.order_sensitive")
    a, b, c = (next_key(ROOT, given[name]) for name in "abc")
    assert (a == b) is expect["hash(a)==hash(b)"]
    assert (a == c) is expect["hash(a)==hash(c)"]


# ---- chunks, memory, preemption -----------------------------------------------------------


@pytest.mark.parametrize(
    "case_id", ["chunk.first_step_10", "chunk.first_step_1024", "chunk.first_step_2048"]
)
def test_chunk_first_step(case_id: str) -> None:
    given, expect = case(case_id)
    harness = Harness(
        200,
        max_num_seqs=given["max_seqs"],
        max_num_batched_tokens=given["token_budget"],
        max_chunk_tokens=given["chunk"],
        block_tokens=given["block_size"],
    )
    harness.scheduler.add(submit("r", given["prompt"]))
    batch = harness.step()
    assert batch is not None and batch.num_tokens == expect["scheduled_tokens"]


def test_chunk_token_budget_1() -> None:
    given, expect = case("chunk.token_budget_1")
    harness = Harness(
        64,
        max_num_seqs=given["max_seqs"],
        max_num_batched_tokens=given["token_budget"],
        max_chunk_tokens=given["chunk"],
    )
    for i, prompt in enumerate(given["prompts"]):
        harness.scheduler.add(submit(f"r{i}", prompt))
    batch = harness.step()
    assert batch is not None and len(batch.rows) == expect["scheduled_sequences"]


def test_chunk_blocks_exhausted() -> None:
    """What the whole pool could not hold is refused at once here, rather than left waiting."""
    given, expect = case("chunk.blocks_exhausted")
    harness = Harness(
        given["num_blocks"] - 1,
        max_num_batched_tokens=given["token_budget"],
        block_tokens=given["block_size"],
    )
    fits, does_not = given["prompts"]
    harness.scheduler.add(submit("fits", fits, block_tokens=given["block_size"]))
    with pytest.raises(ContextLengthExceeded, match=r"1000 tokens.*at most 8"):
        harness.scheduler.add(submit("does not", does_not, block_tokens=given["block_size"]))
    batch = harness.step()
    assert batch is not None and len(batch.rows) == expect["scheduled_sequences"]


def test_chunk_mixed_decode_and_prefill() -> None:
    """The last step differs: we admit a prompt only when all of it will fit, so the second long
    one waits (batch of 6) instead of taking 1024 tokens' worth of blocks it cannot go on from."""
    given, expect = case("chunk.mixed_decode_prefill")
    block_tokens = given["block_size"]
    harness = Harness(
        given["num_blocks"] - 1,
        max_num_batched_tokens=given["token_budget"],
        max_model_len=12_000,
        block_tokens=block_tokens,
    )
    batches = []
    for step, prompts in enumerate([[100, 200, 300], [], [400, 500], [10_000], [10_000]]):
        for prompt in prompts:
            name = f"r{step}.{prompt}"
            harness.scheduler.add(submit(name, prompt, block_tokens=block_tokens, max_tokens=99))
        batches.append(harness.step())
        if step == 0:
            assert harness.scheduler.stats.kv_blocks_used == expect["blocks used after step 1"]
    sizes = [len(batch.rows) for batch in batches if batch]
    assert sizes == [*expect["batch_sizes"][:4], 6]
    assert batches[3] and batches[3].rows[-1].num_tokens == expect["tokens of 4th-step long prompt"]
    assert harness.scheduler.stats.waiting["online"] == 1


def test_chunk_preempt_on_full() -> None:
    given, expect = case("chunk.preempt_on_full")
    harness = small_pool(given)
    for i, prompt in enumerate(given["prompts"]):
        harness.scheduler.add(submit(f"r{i}", prompt, block_tokens=given["block_size"]))
    sizes = []
    for step in range(4):
        batch = harness.step()
        sizes.append(len(batch.rows) if batch else 0)
        if step == 2:
            waiting = harness.scheduler.stats.waiting["online"]
            assert waiting == expect["waiting_after_step3"]
    assert sizes == expect["batch_sizes"]


def small_pool(given: dict[str, Any]) -> Harness:
    return Harness(
        given["usable_blocks"],
        max_num_batched_tokens=10_000,
        max_model_len=10_000,
        block_tokens=given["block_size"],
    )


def running(harness: Harness) -> list[str]:
    return [s.key[1] for s in harness.scheduler.live() if s.slot >= 0]


# ---- online and offline, priorities -------------------------------------------------------


def test_online_decode_preempts_offline_decode() -> None:
    given, expect = case("coloc.online_decode_preempts_offline_decode")
    harness = small_pool(given)
    for offline, prompt in zip(given["offline"], given["prompts"]):
        name = "offline" if offline else "online"
        request = submit(name, prompt, block_tokens=given["block_size"], offline=offline)
        harness.scheduler.add(request)
    sizes = [len(batch.rows) for batch in (harness.step() for _ in range(3)) if batch]
    assert sizes == expect["batch_sizes"]
    assert expect["survivor_offline"] is False and running(harness) == ["online"]
    assert harness.scheduler.stats.waiting["offline"] == expect["waiting"]


def test_online_prefill_preempts_offline_decode() -> None:
    given, expect = case("coloc.online_prefill_preempts_offline_decode")
    harness = small_pool(given)
    block_tokens = given["block_size"]
    for i, prompt in enumerate(given["offline_prompts"]):
        harness.scheduler.add(submit(f"off{i}", prompt, block_tokens=block_tokens, offline=True))
    harness.step()
    harness.scheduler.add(submit("on", given["then_online_prompt"], block_tokens=block_tokens))
    harness.step()
    assert sorted(running(harness)) == ["off0", "on"] and expect["running"] == 2
    stats = harness.scheduler.stats
    assert stats.waiting["offline"] == expect["waiting"]
    assert stats.kv_blocks_total - stats.kv_blocks_used == expect["free_blocks"]


def test_no_useless_eviction() -> None:
    given, expect = case("coloc.no_useless_eviction")
    harness = small_pool(given)
    block_tokens = given["block_size"]
    for i, entry in enumerate(given["running"]):
        request = submit(
            f"r{i}", entry["prompt"], block_tokens=block_tokens, offline=entry["offline"]
        )
        harness.scheduler.add(request)
    harness.step()
    harness.scheduler.add(submit("new", given["then_online_prompt"], block_tokens=block_tokens))
    harness.step()
    assert running(harness) == ["r0", "r1"] and expect["running"] == 2
    assert harness.scheduler.stats.waiting == {"online": len(expect["waiting"]), "offline": 0}
    assert harness.scheduler.stats.preemptions == 0


def test_priority_order_and_preemption() -> None:
    given, expect = case("prio.order_and_preempt")
    level = {"HIGH": 0, "NORMAL": 1, "LOW": 2}
    harness = small_pool(given)
    block_tokens = given["block_size"]
    for i, (prompt, name) in enumerate(zip(given["prompts"], given["priorities"])):
        harness.scheduler.add(
            submit(f"{name}{i}", prompt, block_tokens=block_tokens, priority=level[name])
        )
    harness.step()
    names = [name.rstrip("0123456789") for name in running(harness)]
    assert sorted(names) == sorted(expect["first_batch"])
    then = given["then"]
    harness.scheduler.add(
        submit("HIGH", then["prompt"], block_tokens=block_tokens, priority=level[then["priority"]])
    )
    batch = harness.step()
    assert batch is not None and len(batch.rows) == expect["next_batch_size"]
    batch = harness.step()
    assert batch is not None and len(batch.rows) == expect["then_batch_size_after_preempt"]
    assert running(harness) == ["NORMAL2", "HIGH"]


# ---- what is left of a prompt, under a budget ---------------------------------------------


@pytest.mark.parametrize("case_id", ["pd.chunk_budget_32_64", "pd.chunk_budget_80_64"])
def test_chunk_of_a_prompt_that_is_partly_done(case_id: str) -> None:
    given, expect = case(case_id)
    harness = Harness(
        64,
        max_num_batched_tokens=given["remaining_budget"],
        max_chunk_tokens=given["max_chunk"],
    )
    prompt = list(range(given["prompt_tokens"]))
    harness.scheduler.add(submit("first", prompt[: given["kv_tokens_done"] + 1], max_tokens=1))
    harness.run()
    harness.scheduler.add(submit("second", prompt))
    batch = harness.step()
    assert batch is not None
    (row,) = batch.rows
    assert (row.start, row.num_tokens) == (given["kv_tokens_done"], expect["next_tokens"])
    assert row.start + row.num_tokens == expect["max_tokens"]


def test_no_chunk_without_budget() -> None:
    given, expect = case("pd.chunk_budget_32_0")
    harness = Harness(64, depth=1, max_num_batched_tokens=given["kv_tokens_done"])
    harness.scheduler.add(submit("prompt", given["prompt_tokens"], offline=True))
    harness.step()
    harness.scheduler.add(submit("rival", given["kv_tokens_done"]))  # takes the whole budget
    batch = harness.step()
    assert batch is not None and len(batch.rows) == 1
    (seq,) = (s for s in harness.scheduler.live() if s.key[1] == "prompt")
    assert expect["next_tokens"] == 0 and seq.num_computed == expect["max_tokens"]


def test_prefix_is_applied_before_the_budget() -> None:
    given, expect = case("pd.prefix_applied_before_budget")
    block_tokens = given["block_size"]
    harness = Harness(
        given["num_blocks"] - 1,
        max_num_batched_tokens=given["token_budget"],
        max_chunk_tokens=given["chunk"],
        block_tokens=block_tokens,
    )
    first = submit("first", given["cached"] + [99], block_tokens=block_tokens, max_tokens=1)
    harness.scheduler.add(first)
    harness.run()
    harness.scheduler.add(submit("second", given["prompt"], block_tokens=block_tokens))
    batch = harness.launch()
    assert batch is not None
    (row,) = batch.rows
    assert (row.start, row.num_tokens) == (expect["kv_tokens"], expect["scheduled_tokens"])
    (seq,) = harness.scheduler.live()
    assert len(seq.blocks) == expect["blocks"]
    assert seq.num_keyed_blocks == expect["shared_blocks"]


def test_choices_share_their_prompt() -> None:
    """xLLM expands a request into its choices after the prefill. Here they are sequences from the
    start, and those that would compute the same blocks wait for the first to have done so."""
    given, expect = case("pd.best_of_not_expanded_on_prefill")
    harness = Harness(32, block_tokens=4)
    for choice in range(given["best_of"]):
        harness.scheduler.add(
            submit(f"c{choice}", given["prompt"], block_tokens=4, choice=choice, group="g")
        )
    sizes = [len(batch.rows) for batch in (harness.step() for _ in range(2)) if batch]
    assert sizes == [expect["sequences_before_prefill"], expect["sequences_after_seq0_prefill"]]


# ---- stopping -----------------------------------------------------------------------------


def finish(sampling: SamplingParams, eos: int, last_id: int) -> str | None:
    stop = check_stop(sampling, (eos,), last_id, 1, 10)
    return stop.reason if stop else None


def test_stop_ignore_eos() -> None:
    given, expect = case("stop.ignore_eos")
    sampling = SamplingParams(max_tokens=10, ignore_eos=given["ignore_eos"])
    assert finish(sampling, given["eos"], given["tokens"][-1]) == expect["finish"]


def test_stop_ignore_eos_does_not_touch_stop_token_ids() -> None:
    """On purpose not as in xLLM, which then ignores stop tokens, too: ids that the caller asked
    for stop, as in vLLM. A model's own further end markers are eos ids here, and are ignored."""
    given, expect = case("stop.ignore_eos_skips_stop_token_set")
    asked_for = SamplingParams(
        max_tokens=10, ignore_eos=True, stop_token_ids=tuple(given["stop_tokens"])
    )
    for last_id in given["last_token"]:
        assert finish(asked_for, given["eos"], last_id) == "stop"
    of_the_model = SamplingParams(max_tokens=10, ignore_eos=True)
    ends = [check_stop(of_the_model, given["stop_tokens"], i, 1, 10) for i in given["last_token"]]
    assert ends == expect["finish"]


def test_stop_second_end_marker() -> None:
    given, expect = case("stop.second_end_marker")
    sampling = SamplingParams(max_tokens=10, stop_token_ids=tuple(given["stop_tokens"]))
    assert finish(sampling, given["eos"], given["tokens"][-1]) == expect["finish"]
