"""The whole engine under the offline API, against `transformers` on the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock import LLM, SamplingParams
from penstock.protocol.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from penstock.protocol.request import Constraint
from tests.helpers.checkpoints import make_checkpoint

#: Two best logits closer than this may come out in either order after different roundings.
CLEAR_MARGIN = 1e-4
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPTS = [[7, 11, 300, 5] * k + [k, 2 * k, 17] for k in range(1, 13)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    make_checkpoint(folder, "qwen3")
    return folder


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32", num_blocks=256, device="cpu") as llm:
        yield llm


def check_greedy(oracle: Any, prompt_ids: list[int], output_ids: list[int]) -> None:
    """Each id is the best under the oracle, or the oracle sees no clear best there."""
    ids = torch.tensor([prompt_ids + output_ids])
    with torch.inference_mode():
        logits_TV = oracle(ids).logits[0].float()
    for i, token_id in enumerate(output_ids):
        row = logits_TV[len(prompt_ids) + i - 1]
        assert row.max() - row[token_id] < CLEAR_MARGIN, f"output token {i}"


def test_greedy_matches_transformers(llm: LLM, oracle: Any) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == PROMPTS
    for output in outputs:
        assert len(output.outputs[0].token_ids) == 24
        assert output.outputs[0].finish_reason == "length"
        check_greedy(oracle, output.prompt_token_ids, output.outputs[0].token_ids)


def test_a_shared_prefix_is_found_and_changes_nothing(llm: LLM, oracle: Any) -> None:
    stem = [(13 * i) % 331 for i in range(100)]
    first, second = (llm.generate([[*stem, 40 + k]], GREEDY, use_tqdm=False)[0] for k in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 96  # six whole blocks of 16
    check_greedy(oracle, second.prompt_token_ids, second.outputs[0].token_ids)


def test_chunked_and_preempted_runs_match_the_oracle(checkpoint: Path, oracle: Any) -> None:
    """Chunks of at most 16 tokens, and a pool that cannot hold half of what runs."""
    with LLM(
        str(checkpoint),
        dtype="float32",
        device="cpu",
        max_model_len=128,
        num_blocks=10,
        max_num_batched_tokens=16,
        max_num_seqs=8,
    ) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        core = llm._engine._driver.core
        assert core.scheduler.stats.preemptions > 0
        core.scheduler.check()
    for output in outputs:
        check_greedy(oracle, output.prompt_token_ids, output.outputs[0].token_ids)


def test_plain_memory_is_an_oracle_for_mapped_memory(checkpoint: Path, llm: LLM) -> None:
    with LLM(str(checkpoint), dtype="float32", device="cpu", kv_memory="plain") as plain:
        expected = plain.generate(PROMPTS, GREEDY, use_tqdm=False)
    found = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for a, b in zip(expected, found, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids


def test_logprobs_are_the_models(llm: LLM, oracle: Any) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=3, prompt_logprobs=2,
                            ignore_eos=True)  # fmt: skip
    prompt = PROMPTS[4]
    output = llm.generate([prompt], params, use_tqdm=False)[0]
    done = output.outputs[0]
    with torch.inference_mode():
        logits_TV = oracle(torch.tensor([prompt + done.token_ids])).logits[0]
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    assert done.logprobs is not None and output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for i, found in enumerate(output.prompt_logprobs[1:], start=1):
        assert found is not None and prompt[i] in found
        for token_id, entry in found.items():
            assert entry.logprob == pytest.approx(float(logprobs_TV[i - 1, token_id]), abs=1e-4)
    for i, (token_id, found) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        row_V = logprobs_TV[len(prompt) + i - 1]
        assert len(found) in (3, 4)
        assert found[token_id].logprob == pytest.approx(float(row_V[token_id]), abs=1e-4)
    assert done.cumulative_logprob == pytest.approx(
        sum(f[t].logprob for t, f in zip(done.token_ids, done.logprobs, strict=True))
    )


def test_a_seed_draws_the_same_alone_and_in_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=42, n=3, ignore_eos=True)
    alone = llm.generate([PROMPTS[0]], params, use_tqdm=False)[0]
    company = llm.generate([PROMPTS[0], *PROMPTS], params, use_tqdm=False)[0]
    texts = [o.token_ids for o in alone.outputs]
    assert texts == [o.token_ids for o in company.outputs]
    assert len({tuple(t) for t in texts}) == 3  # choices of one seed differ


def test_constraints_hold(llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=40, temperature=1.0, constraint=Constraint("regex", r"[0-9]{3}-[a-c]{2}")
    )
    import re

    for output in llm.generate(["x"] * 8, params, use_tqdm=False):
        assert re.fullmatch(r"[0-9]{3}-[a-c]{2}", output.outputs[0].text)
        assert output.outputs[0].finish_reason == "stop"


def test_stop_strings_end_a_choice_and_free_it(llm: LLM) -> None:
    whole = llm.generate([PROMPTS[3]], GREEDY, use_tqdm=False)[0].outputs[0].text
    stop = whole[len(whole) // 2 :][:2]
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, stop=stop)
    done = llm.generate([PROMPTS[3]], params, use_tqdm=False)[0].outputs[0]
    assert done.text == whole[: whole.index(stop)]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)


def test_user_mistakes_are_value_errors_and_run_nothing(llm: LLM) -> None:
    for bad in ({"temperature": -1}, {"top_p": 0}, {"n": 0}, {"max_tokens": 0}, {"stop": [""]},
                {"seed": 2**64}, {"top_k": 2**40}):  # fmt: skip
        with pytest.raises(InvalidRequest):
            SamplingParams(**bad)
    with pytest.raises(InvalidRequest, match="token ids"):
        llm.generate([[1, 10**6]], GREEDY, use_tqdm=False)
    with pytest.raises(ContextLengthExceeded, match=str(llm.max_model_len)):
        llm.generate([[1] * (llm.max_model_len + 1)], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="2 prompts and 1"):
        llm.generate(PROMPTS[:2], [GREEDY], use_tqdm=False)


def test_more_sequences_than_fit_at_once_all_come_out(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, temperature=1.0, n=40, seed=1)
    outputs = llm.generate([[5, 6, 7]] * 30, params, use_tqdm=False)
    assert [len(o.outputs) for o in outputs] == [40] * 30
    assert all(c.finish_reason for o in outputs for c in o.outputs)


def test_a_failed_start_gives_its_memory_back(checkpoint: Path) -> None:
    def pools() -> int:
        links = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
        return sum("penstock-kv" in str(link) for link in links)

    before = pools()
    for _ in range(2):
        with pytest.raises(ConfigError, match="nonsense"):
            LLM(str(checkpoint), attention_backend="nonsense")
    assert pools() == before


def test_prompts_as_vllm_writes_them(llm: LLM) -> None:
    forms = [PROMPTS[0], {"prompt_token_ids": PROMPTS[0]}]
    ids = [llm.generate(form, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for form in forms]
    assert ids[0] == ids[1]
    with pytest.raises(InvalidRequest, match="prompt_token_ids"):
        llm.generate([{"text": "x"}], GREEDY, use_tqdm=False)
