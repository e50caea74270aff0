"""Tokenizers from checkpoint folders, against transformers on the same folder."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers.tokenizers import KINDS, SENTENCES, byte_level, write_tokenizer
from tokenizers import Regex, pre_tokenizers

from penstock.checkpoint import Checkpoint
from penstock.protocol.errors import CheckpointError, InvalidRequest
from penstock.service.text.pieces import BYTE_OF_CHAR
from penstock.service.text.tokenizer import INLINE_CHARS, Tokenizer

folder_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(Checkpoint(folder))


def oracle(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True, "add_eos_token": True}])
def test_ids_are_those_of_transformers(
    tmp_path: Path, kind: str, add_special_tokens: bool, config: dict[str, Any]
) -> None:
    write_tokenizer(tmp_path, kind, **config)
    ours, theirs = load(tmp_path), oracle(tmp_path)
    texts = [*SENTENCES[:7], "", " ", "<|im_start|>user\n<s>hi</s> <tool_call>[UNK]"]
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=add_special_tokens)
        ids = ours.encode(text, add_special_tokens)
        assert ids == expected
        for skip in (True, False):
            whole = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == whole
    assert ours.encode_batch(texts, add_special_tokens) == [
        ours.encode(text, add_special_tokens) for text in texts
    ]
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    write_tokenizer(tmp_path, kind, additional_special_tokens=["<tool_call>", "<|new|>"])
    ours, theirs = load(tmp_path), oracle(tmp_path)
    assert ours.eos_token == theirs.eos_token and ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token == theirs.bos_token and ours.bos_token_id == theirs.bos_token_id
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert {i for i in range(ours.vocab_size) if ours.is_special(i)} == special
    assert ours.token_to_id("<|new|>") == theirs.convert_tokens_to_ids("<|new|>")
    named = {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
    assert ours.special_tokens == named


def test_special_tokens_may_be_objects_or_stand_in_their_own_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama2")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "x"}')
    ours = load(tmp_path)
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    assert ours.token_to_id("x") != ours.eos_token_id


def test_tokens_that_only_the_config_lists_are_added(tmp_path: Path) -> None:
    size = load(write_tokenizer(tmp_path, "byte_level")).vocab_size
    token = {"content": "<|late|>", "special": True, "normalized": False}
    ours = load(write_tokenizer(tmp_path, "byte_level", added_tokens_decoder={str(size): token}))
    assert ours.encode("a<|late|>")[-1] == size == ours.vocab_size - 1
    assert ours.decode([size]) == ""


def test_what_ends_a_generation(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama2")
    assert load(tmp_path).eos_token_ids == (2,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert load(tmp_path).eos_token_ids == (2, 5)


# --- bytes of tokens ---


def test_the_byte_alphabet_is_gpt2s() -> None:
    assert set(BYTE_OF_CHAR) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF_CHAR.values()) == list(range(256))
    tokenizer = tokenizers.Tokenizer.from_str(byte_level())
    for char, byte in BYTE_OF_CHAR.items():
        if byte < 0x80:
            assert tokenizer.decode([tokenizer.token_to_id(char)]) == chr(byte)


@folder_fixture
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
@pytest.mark.parametrize("kind", ["byte_level", "llama2"])
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(
    tmp_path_factory: Any, kind: str, text: str
) -> None:
    ours = Tokenizer(tokenizers.Tokenizer.from_str(KINDS[kind]()))
    ids = ours.encode(text, add_special_tokens=False)
    joined = b"".join(map(ours.id_to_bytes, ids)).decode()
    shown = text if kind == "byte_level" else (text and " " + text).replace("▁", " ")
    assert joined == shown


def test_single_tokens() -> None:
    ours = Tokenizer(tokenizers.Tokenizer.from_str(KINDS["llama2"]()))
    byte = ours.token_to_id("<0xF0>")
    assert byte is not None
    assert (ours.id_to_bytes(byte), ours.token_text(byte)) == (b"\xf0", "\ufffd")
    assert ours.token_text(1) == "<s>"
    for absent in (-1, ours.vocab_size, 2**40):
        assert (ours.id_to_bytes(absent), ours.token(absent)) == (b"", None)
    assert ours.decode([-1, 2**40, 1], skip_special_tokens=False) == "<s>"
    wordpiece = Tokenizer(tokenizers.Tokenizer.from_str(KINDS["wordpiece"]()))
    assert wordpiece.token_text(wordpiece.encode("the")[0]) == "the"


# --- unhappy paths ---


def test_half_a_surrogate_pair_is_the_callers_mistake(tmp_path: Path) -> None:
    ours = load(write_tokenizer(tmp_path, "byte_level"))
    with pytest.raises(InvalidRequest, match="surrogate"):
        ours.encode("ab\ud800c")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", byte_level().encode()[:5000], b"\xff\xfe", b"version https"],
)
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load(tmp_path)


def test_a_missing_tokenizer_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="copy it"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"SentencePiece.*save_pretrained"):
        load(tmp_path)


# --- vocab.json and merges.txt ---


def write_slow_files(folder: Path, **config: Any) -> tokenizers.Tokenizer:
    """The old form of the byte-level tokenizer; returns it with Qwen2's way of cutting text."""
    backend = tokenizers.Tokenizer.from_str(byte_level())
    backend.model.save(str(folder))
    merged = {"eos_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(merged))
    return backend


def test_qwen2_and_gpt2_are_read_from_vocab_and_merges(tmp_path: Path) -> None:
    added = {
        str(i): token.__getstate__()
        for i, token in tokenizers.Tokenizer.from_str(byte_level())
        .get_added_tokens_decoder()
        .items()
    }
    for kind in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        backend = write_slow_files(tmp_path, tokenizer_class=kind, added_tokens_decoder=added)
        if kind == "Qwen2Tokenizer":
            backend.normalizer = tokenizers.normalizers.NFC()
            digits_apart = Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(digits_apart, behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        ours = load(tmp_path)
        for text in [*SENTENCES[:7], "<|im_start|>it's 1234\r\n\n x<tool_call>"]:
            ids = ours.encode(text)
            assert ids == backend.encode(text).ids
            assert ours.decode(ids, skip_special_tokens=False) == text


def test_added_tokens_may_be_in_their_own_file(tmp_path: Path) -> None:
    backend = write_slow_files(tmp_path, tokenizer_class="Qwen2Tokenizer")
    size = backend.get_vocab_size(with_added_tokens=False)
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<tool_call>": size + 1, "<|x|>": size})
    )
    ours = load(tmp_path)
    assert ours.encode("<|x|><tool_call>") == [size, size + 1]
    assert not ours.is_special(size + 1)


def test_other_slow_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    write_slow_files(tmp_path, tokenizer_class="CodeGenTokenizer")
    with pytest.raises(CheckpointError, match=r"CodeGenTokenizer.*save_pretrained"):
        load(tmp_path)
    (tmp_path / "merges.txt").write_text("not a merge at all\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(CheckpointError, match=r"merges\.txt cannot be read"):
        load(tmp_path)


# --- long text ---


async def test_long_text_is_encoded_beside_the_event_loop(tmp_path: Path) -> None:
    ours = load(write_tokenizer(tmp_path, "byte_level"))
    used: list[threading.Thread] = []
    encode = ours.encode

    def noting(*args: Any) -> list[int]:
        used.append(threading.current_thread())
        return encode(*args)

    ours.encode = noting  # type: ignore[method-assign]
    short, long = SENTENCES[0], SENTENCES[0] * (INLINE_CHARS // 20)
    assert await ours.encode_async(short) == encode(short)
    assert await ours.encode_async(long, False) == encode(long, False)
    assert used[0] is threading.main_thread() and used[1] is not threading.main_thread()


async def test_the_event_loop_turns_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    ours = load(write_tokenizer(tmp_path, "byte_level"))
    task = asyncio.create_task(ours.encode_async(" ".join(SENTENCES) * 100))
    turns = 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 10
