"""The toy model on prose that it has not read: what few bits may cost, through the real engine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from penstock.checkpoint import TOY, Checkpoint, resolve
from penstock.engine.quantization.convert import quantize_checkpoint
from penstock.engine.quantization.schemes import SCHEMES
from penstock.llm import LLM
from penstock.perplexity import eval_texts, perplexity_of
from penstock.protocol.errors import CheckpointError

#: Of the forty windows; all of them give the figure that the model card has.
WINDOWS = 6


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return eval_texts(resolve("toy"))[::7][:WINDOWS]


def measure(model: str, texts: list[str], **engine: object) -> float:
    return perplexity_of(model, texts, kv_cache_bytes=64 << 20, **engine)[0]


@pytest.fixture(scope="module")
def exact(texts: list[str]) -> float:
    """transformers, float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOY)
    loss, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            loss += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(loss / count)


def test_float32_is_that_of_transformers(texts: list[str], exact: float) -> None:
    assert measure("toy", texts, dtype="float32") == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("scheme", "worse"), [("int8", 0.004), ("int4", 0.02)])
def test_what_few_bits_cost(
    scheme: str, worse: float, texts: list[str], exact: float, tmp_path: Path
) -> None:
    """While loading, and from the file that `penstock quantize` writes: the same, to the bit."""
    loaded = measure("toy", texts, quantization=scheme)
    assert exact * 0.99 < loaded < exact * (1 + worse)
    quantize_checkpoint(resolve("toy"), tmp_path / "out", SCHEMES[scheme])
    assert measure(str(tmp_path / "out"), texts) == loaded


def test_the_windows_are_those_of_the_model_card() -> None:
    """As tools.train_toy.evaluate drew them: 512 tokens each."""
    texts = eval_texts(resolve("toy"))
    with LLM("toy", kv_cache_bytes=8 << 20, max_model_len=64, max_num_seqs=1) as llm:
        lengths = [len(llm.get_tokenizer().encode(text)) for text in texts]
    assert lengths == [512] * 40


def test_a_text_file_of_something_else(tmp_path: Path) -> None:
    assert eval_texts(Checkpoint(tmp_path)) == []
    (tmp_path / "eval_text.json").write_text(json.dumps({"texts": "one"}))
    with pytest.raises(CheckpointError, match="texts is no list of strings"):
        eval_texts(Checkpoint(tmp_path))
