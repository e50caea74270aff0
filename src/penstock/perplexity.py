"""Perplexity of a checkpoint on a text that it carries, through the engine that serves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from penstock.checkpoint import Checkpoint
from penstock.llm import LLM
from penstock.protocol.errors import CheckpointError
from penstock.sampling_params import SamplingParams

#: In a checkpoint's folder: {"texts": [...]}, each a window of its own.
TEXT_FILE = "eval_text.json"


def eval_texts(checkpoint: Checkpoint) -> list[str]:
    """The texts of a checkpoint's `eval_text.json`; none if it has no such file."""
    found = checkpoint.json(TEXT_FILE).get("texts", [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"{checkpoint.path / TEXT_FILE}: texts is no list of strings")
    return found


def perplexity(llm: LLM, texts: Sequence[str]) -> tuple[float, int]:
    """exp of the mean negative log-likelihood of each text's tokens given those before, and how
    many tokens that is over. Texts are cut at what the model's context holds."""
    encode = llm.get_tokenizer().encode
    prompts = [encode(text)[: llm.max_model_len - 1] for text in texts]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    total, count = 0.0, 0
    for output in llm.generate([ids for ids in prompts if ids], params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:]):
            assert entry is not None
            total -= entry[token].logprob
            count += 1
    if not count:
        raise CheckpointError("the texts for perplexity have no two tokens: give longer ones")
    return math.exp(total / count), count


def perplexity_of(
    model: str, texts: Sequence[str], *, kv_cache_bytes: int | None = None, **engine: Any
) -> tuple[float, int]:
    """`perplexity` of a model that is loaded for it; `engine` as for `LLM`."""
    with LLM(model, kv_cache_bytes=kv_cache_bytes, max_num_seqs=8, **engine) as llm:
        return perplexity(llm, texts)
