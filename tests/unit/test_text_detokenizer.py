"""Incremental detokenization, against the whole decode of `tokenizers` itself."""

from __future__ import annotations

from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.tokenizers import KINDS, SENTENCES

from penstock.service.text.detokenizer import TableDetokenizer, WindowDetokenizer, make_detokenizer
from penstock.service.text.pieces import fallback_byte
from penstock.service.text.tokenizer import Tokenizer

TABLE_KINDS = ("byte_level", "llama2", "metaspace")


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(KINDS[kind]()))


@cache
def oracle_of(kind: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(KINDS[kind]())


def pieces_of(kind: str, ids: list[int], cuts: list[int], prompt: list[int], skip: bool) -> str:
    detokenizer = make_detokenizer(tokenizer_of(kind), prompt, skip_special_tokens=skip)
    out, position = [], 0
    for cut in [*cuts, len(ids)]:
        out.append(detokenizer.push(ids[position : position + cut]))
        position += cut
    return "".join(out) + detokenizer.finish()


def as_shown(kind: str, ids: list[int], prompt: list[int], skip: bool) -> str:
    """What the whole decode says that `ids` add behind `prompt`."""
    oracle = oracle_of(kind)
    before = oracle.decode(prompt, skip_special_tokens=skip)
    whole = oracle.decode(prompt + ids, skip_special_tokens=skip)
    assert whole.startswith(before)
    return whole[len(before) :]


scripts = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("aé ñ ß я 日 本 語 ก ﷽ 한 😀 👍🏽 \n\t"),
        st.sampled_from(" ▁\N{ZERO WIDTH JOINER}\N{COMBINING ACUTE ACCENT}"),
    ),
    max_size=40,
)
cuts = st.lists(st.integers(1, 4), max_size=30)


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_tables_are_in_use_where_they_should_be(kind: str) -> None:
    assert isinstance(make_detokenizer(tokenizer_of(kind)), TableDetokenizer)


def test_a_decoder_that_looks_at_neighbours_is_decoded_in_windows() -> None:
    assert isinstance(make_detokenizer(tokenizer_of("wordpiece")), WindowDetokenizer)


@pytest.mark.parametrize("kind", TABLE_KINDS)
@given(text=scripts, before=scripts, cut=cuts, skip=st.booleans())
def test_text_comes_out_as_the_whole_decode_has_it(kind, text, before, cut, skip) -> None:
    oracle = oracle_of(kind)
    prompt = oracle.encode(before).ids if before else []
    ids = oracle.encode(text, add_special_tokens=False).ids
    shown = pieces_of(kind, ids, cut, prompt, skip)
    assert shown == as_shown(kind, ids, prompt, skip)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@given(data=st.data(), cut=cuts, skip=st.booleans())
def test_any_ids_come_out_as_the_whole_decode_has_them(kind, data, cut, skip) -> None:
    size = tokenizer_of(kind).vocab_size
    # Beyond the vocabulary, too: a model's vocabulary is often padded.
    ids = data.draw(st.lists(st.integers(0, size + 50), max_size=40))
    whole = oracle_of(kind).decode(ids, skip_special_tokens=skip)
    assert pieces_of(kind, ids, cut, [], skip) == whole


def _byte_runs_are_utf8(ids: list[int], skip: bool) -> bool:
    tokenizer, run = tokenizer_of("llama2"), b""
    for token_id in [*ids, None]:
        if token_id is not None and skip and tokenizer.is_special(token_id):
            continue  # filtered before the decoder sees the run
        token = None if token_id is None else tokenizer.token(token_id)
        byte = fallback_byte(token) if token is not None else None
        if byte is not None:
            run += bytes((byte,))
        elif token is not None or token_id is None:
            try:
                run.decode()
            except UnicodeDecodeError:
                return False
            run = b""
    return True


@given(
    ids=st.lists(
        st.one_of(st.integers(0, 650), st.sampled_from([1, 2, *range(3, 131)])), max_size=40
    ),
    cut=cuts,
    skip=st.booleans(),
)
def test_byte_fallback_with_valid_runs_is_exact(ids, cut, skip) -> None:
    tokenizer = tokenizer_of("llama2")
    if not _byte_runs_are_utf8(ids, skip):
        # Only what no decoder agrees on is left out: see the next test for what is shown then.
        ids = [i for i in ids if (fallback_byte(tokenizer.token(i) or "") or 0) < 0x80]
    whole = oracle_of("llama2").decode(ids, skip_special_tokens=skip)
    assert pieces_of("llama2", ids, cut, [], skip) == whole


def test_an_invalid_run_of_byte_tokens_keeps_the_characters_that_were_whole() -> None:
    """The whole decode turns all of a run into replacement characters when any byte of it is
    wrong. What has been sent cannot be taken back, so here only the wrong bytes are replaced."""
    ids = [tokenizer_of("llama2").token_to_id(f"<0x{b:02X}>") for b in "é".encode() + b"\xf0\x9f"]
    assert pieces_of("llama2", ids, [1] * 4, [], True) == "é\ufffd\ufffd"
    assert oracle_of("llama2").decode(ids) == "\ufffd" * 4


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_a_character_appears_when_its_last_byte_does(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = "x🇳🇴 日本"
    seen = ""
    detokenizer = make_detokenizer(tokenizer)
    for token_id in oracle_of(kind).encode(text, add_special_tokens=False).ids:
        seen += detokenizer.push([token_id])
        assert "\ufffd" not in seen
    assert seen + detokenizer.finish() == oracle_of(kind).decode(
        oracle_of(kind).encode(text, add_special_tokens=False).ids
    )


def test_a_character_begun_by_the_prompt_is_completed_by_the_output() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = [tokenizer.token_to_id(c) for c in "ðŁĺĢ"]  # the four bytes of U+1F600
    detokenizer = make_detokenizer(tokenizer, ids[:2])
    assert [detokenizer.push([i]) for i in ids[2:]] == ["", "😀"]


def test_replacement_characters_come_only_once_the_bytes_are_truly_wrong() -> None:
    tokenizer = tokenizer_of("byte_level")
    lead, plain = tokenizer.token_to_id("ð"), tokenizer.token_to_id("a")
    detokenizer = make_detokenizer(tokenizer)
    assert detokenizer.push([lead]) == ""
    assert detokenizer.push([plain]) == "\ufffda"
    assert detokenizer.push([lead]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_special_tokens_that_a_parser_needs_are_kept() -> None:
    tokenizer = tokenizer_of("byte_level")
    end, tag = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<tool_call>")
    assert make_detokenizer(tokenizer).push([tag, end]) == "<tool_call>"
    assert make_detokenizer(tokenizer, keep=frozenset([end])).push([end]) == "<|im_end|>"
    assert make_detokenizer(tokenizer, skip_special_tokens=False).push([end]) == "<|im_end|>"


@pytest.mark.parametrize("sentence", SENTENCES[:7])
def test_windows_give_the_words_of_the_whole_decode(sentence: str) -> None:
    """WordPiece's whole decode tidies spaces around punctuation with hindsight; words agree."""
    ids = oracle_of("wordpiece").encode(sentence, add_special_tokens=False).ids
    whole = oracle_of("wordpiece").decode(ids)
    shown = pieces_of("wordpiece", ids, [1] * len(ids), [], True)
    assert "".join(shown.split()) == "".join(whole.split())


@given(data=st.data())
def test_windows_take_any_ids(data) -> None:
    size = tokenizer_of("wordpiece").vocab_size
    ids = data.draw(st.lists(st.integers(0, size + 20), max_size=40))
    shown = pieces_of("wordpiece", ids, [1] * len(ids), [], True)
    whole = oracle_of("wordpiece").decode(ids)
    assert "".join(shown.split()) == "".join(whole.split())


def test_a_table_does_not_grow_with_ids_that_do_not_exist() -> None:
    tokenizer = tokenizer_of("byte_level")
    table = tokenizer.pieces(True)
    size = len(table)
    assert make_detokenizer(tokenizer).push(list(range(10**6, 10**6 + 1000))) == ""
    assert make_detokenizer(tokenizer).push([-1]) == ""
    assert len(table) == size
