"""Tokenizers from GGUF metadata against the ones that other people's code makes of the same
vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.gguf_files import sentencepiece_metadata
from tests.helpers.tokenizers import SENTENCES, byte_level, llama2
from tokenizers import decoders, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import TikTokenConverter

from penstock.gguf.metadata import Metadata
from penstock.gguf.tokenizer import GgufTokenizer
from penstock.protocol.errors import CheckpointError, UnsupportedModel

TEXTS = [
    *SENTENCES[:7],
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "two  spaces   three    four\n\n\nlines\r\n\ttabs",
    "it's I'LL don't WE'RE 'S",
    "1 12 123 1234 12345 3.14159 ١٢٣ ½ Ⅷ",
    "CamelCase snake_case kebab-case HTTPServer x/y//z",
    "e\u0301 \u00e9 \ufb01 \u212b \u1e9b\u0323",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}</tool_call>",
    "<s>special</s> <unk> <0x41>",
    "\u0000\u0007\u200b\ufeff\u2028 zero width",
]


def tokenizer_of(values: dict[str, Any]) -> tokenizers.Tokenizer:
    values = {key: value for key, value in values.items() if value is not None}
    text = GgufTokenizer(Metadata(Path("test.gguf"), values)).tokenizer_json()
    return tokenizers.Tokenizer.from_str(text)


@cache
def byte_level_parts() -> tuple[dict[str, int], list[tuple[str, str]], list[dict[str, Any]]]:
    found = json.loads(byte_level())
    merges = [m.split(" ") if isinstance(m, str) else m for m in found["model"]["merges"]]
    return found["model"]["vocab"], [(a, b) for a, b in merges], found["added_tokens"]


def byte_level_metadata(pre: str, **more: Any) -> dict[str, Any]:
    vocab, merges, added = byte_level_parts()
    size = 1 + max([*vocab.values(), *(token["id"] for token in added)])
    tokens, types = [f"[PAD{i}]" for i in range(size)], [5] * size
    for text, i in vocab.items():
        tokens[i], types[i] = text, 1
    for token in added:
        tokens[token["id"]], types[token["id"]] = token["content"], 3 if token["special"] else 4
    values = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        **more,
    }
    return {key: value for key, value in values.items() if value is not None}


def with_added(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    for token in sorted(byte_level_parts()[2], key=lambda token: token["id"]):
        made = tokenizers.AddedToken(token["content"], special=token["special"], normalized=False)
        (backend.add_special_tokens if token["special"] else backend.add_tokens)([made])
    return backend


def gpt2() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(byte_level())


def qwen2() -> tokenizers.Tokenizer:
    """transformers' own, which knows how Qwen cuts text."""
    vocab, merges, _ = byte_level_parts()
    made = transformers.Qwen2Tokenizer(
        vocab=dict(vocab), merges=list(merges), unk_token=None, bos_token=None, eos_token=None,
        pad_token=None,
    )  # fmt: skip
    return with_added(made.backend_tokenizer)


def llama3() -> tokenizers.Tokenizer:
    """By the pattern that transformers' conversion from tiktoken takes for Llama 3."""
    vocab, merges, _ = byte_level_parts()
    pattern = TikTokenConverter(vocab_file=None).pattern
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(dict(vocab), list(merges), ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend = with_added(backend)
    bos = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[bos]
    )
    return backend


def smollm() -> tokenizers.Tokenizer:
    """As SmolLM's tokenizer.json has it: digits one by one, then GPT-2's rule."""
    backend = gpt2()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


ORACLES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "gpt-2": gpt2,
    "qwen2": qwen2,
    "llama-bpe": llama3,
    "smollm": smollm,
}


@cache
def pair(pre: str) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    return tokenizer_of(byte_level_metadata(pre)), ORACLES[pre]()


@pytest.mark.parametrize("pre", ORACLES)
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_ids_are_the_originals(pre: str, text: str) -> None:
    ours, theirs = pair(pre)
    ids = theirs.encode(text).ids
    assert ours.encode(text).ids == ids
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )


@pytest.mark.parametrize("pre", ORACLES)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_byte_level_ids_of_any_text(pre: str, text: str) -> None:
    ours, theirs = pair(pre)
    assert ours.encode(text).ids == theirs.encode(text).ids


@cache
def sentencepiece_pair() -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Beside it what transformers makes of the same scores."""
    from transformers.convert_slow_tokenizer import generate_merges

    values = sentencepiece_metadata(llama2())
    original = json.loads(llama2())
    scores = dict(
        zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"], strict=True)
    )
    normal = {
        text: score
        for (text, score), kind in zip(
            scores.items(), values["tokenizer.ggml.token_type"], strict=True
        )
        if kind == 1
    }
    original["model"]["merges"] = generate_merges(original["model"]["vocab"], normal)
    return tokenizer_of(values), tokenizers.Tokenizer.from_str(json.dumps(original))


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids_are_the_originals(text: str) -> None:
    ours, theirs = sentencepiece_pair()
    ids = theirs.encode(text).ids
    assert ours.encode(text).ids == ids
    assert ours.encode(text, add_special_tokens=False).ids == ids[1:]
    assert ours.decode(ids) == theirs.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_sentencepiece_ids_of_any_text(text: str) -> None:
    ours, theirs = sentencepiece_pair()
    assert ours.encode(text).ids == theirs.encode(text).ids


def test_no_space_is_put_before_the_text_where_the_file_says_so() -> None:
    values = sentencepiece_metadata(llama2()) | {"tokenizer.ggml.add_space_prefix": False}
    ours = tokenizer_of(values)
    ids = ours.encode("dog", add_special_tokens=False).ids
    assert not (ours.id_to_token(ids[0]) or "").startswith("▁")
    assert ours.decode(ids) == "dog"


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("gpt-2", {}, (0, 0)),
        ("llama-bpe", {}, (1, 0)),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, (0, 0)),
        ("qwen2", {"tokenizer.ggml.add_bos_token": True}, (1, 0)),
        ("gpt-2", {"tokenizer.ggml.add_eos_token": True}, (0, 1)),
    ],
)
def test_bos_and_eos_around_a_prompt(
    pre: str, flags: dict[str, Any], expected: tuple[int, int]
) -> None:
    values = byte_level_metadata(pre, **flags)
    tokenizer = tokenizer_of(values)
    inner = tokenizer.encode("dog", add_special_tokens=False).ids
    bos, eos = values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]
    assert tokenizer.encode("dog").ids == [bos] * expected[0] + inner + [eos] * expected[1]


def test_every_end_of_an_answer_is_known() -> None:
    values = byte_level_metadata("gpt-2")
    tokens = values["tokenizer.ggml.tokens"]
    found = GgufTokenizer(Metadata(Path("x"), values)).eos_token_ids()
    assert found == [tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")]
    values["tokenizer.ggml.eot_token_id"] = tokens.index("<tool_call>")
    found = GgufTokenizer(Metadata(Path("x"), values)).eos_token_ids()
    assert found[1] == tokens.index("<tool_call>")


def test_chat_templates_by_name() -> None:
    plain = byte_level_metadata("gpt-2", **{"tokenizer.chat_template": "A"})
    assert GgufTokenizer(Metadata(Path("x"), plain)).tokenizer_config()["chat_template"] == "A"
    several = plain | {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "B",
    }
    assert GgufTokenizer(Metadata(Path("x"), several)).tokenizer_config()["chat_template"] == [
        {"name": "tool_use", "template": "B"},
        {"name": "default", "template": "A"},
    ]


def test_the_embedded_hugging_face_tokenizer_wins() -> None:
    values = byte_level_metadata("gpt-2", **{"tokenizer.huggingface.json": byte_level()})
    assert GgufTokenizer(Metadata(Path("x"), values)).tokenizer_json() == byte_level()


def test_a_file_that_names_no_rule(caplog: pytest.LogCaptureFixture) -> None:
    """Qwen's is known; for others llama.cpp's default is taken, and said."""
    qwen = byte_level_metadata("x", **{"general.architecture": "qwen2", "tokenizer.ggml.pre": None})
    ids = tokenizer_of(qwen).encode(TEXTS[0]).ids
    assert ids == pair("qwen2")[0].encode(TEXTS[0]).ids
    assert not caplog.records
    other = tokenizer_of(byte_level_metadata("x", **{"tokenizer.ggml.pre": None}))
    assert "tokenizer.ggml.pre" in caplog.text
    assert other.decode(other.encode(TEXTS[0]).ids) == TEXTS[0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokenizer.ggml.model": "t5"}, UnsupportedModel, "'t5' is not supported"),
        ({"tokenizer.ggml.model": None}, CheckpointError, "lacks tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "wonder"}, UnsupportedModel, "'wonder' is not supported"),
        ({"tokenizer.ggml.token_type": [1, 1]}, CheckpointError, "2 entries for"),
        ({"tokenizer.ggml.tokens": 7}, CheckpointError, "expected a list of strings"),
        ({"tokenizer.ggml.merges": ["nothing"]}, CheckpointError, "is no merge"),
        ({"tokenizer.ggml.merges": [""]}, CheckpointError, "is no merge"),
        ({"tokenizer.ggml.merges": None}, CheckpointError, "lacks tokenizer.ggml.merges"),
        ({"tokenizer.ggml.bos_token_id": 1 << 31}, CheckpointError, "an id below"),
        ({"tokenizer.ggml.eos_token_id": "two"}, CheckpointError, "expected an integer"),
    ],
)
def test_what_makes_no_tokenizer(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    values = byte_level_metadata("gpt-2", **change)
    with pytest.raises(error, match=words):
        made = GgufTokenizer(Metadata(Path("test.gguf"), values))
        made.tokenizer_config()
        made.tokenizer_json()
        made.eos_token_ids()
