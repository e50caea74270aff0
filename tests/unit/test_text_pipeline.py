"""One choice's way from ids to events: the parts together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.tokenizers import SENTENCES, write_tokenizer

from penstock.checkpoint import Checkpoint
from penstock.protocol.errors import ConfigError, InvalidRequest
from penstock.service.text.events import (
    ContentDelta,
    OutputEvent,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
    merged,
)
from penstock.service.text.pipeline import OutputPipeline
from penstock.service.text.texts import Texts, random_call_id


@pytest.fixture(scope="module")
def texts(tmp_path_factory: Any) -> Texts:
    folder: Path = tmp_path_factory.mktemp("text")
    # Tags as special tokens, as some checkpoints have them: they must reach the parsers all the
    # same.
    write_tokenizer(folder, "byte_level", all_special=True)
    return Texts.from_checkpoint(
        Checkpoint(folder), tool_call_parser="hermes", reasoning_parser="qwen3"
    )


def run(pipeline: OutputPipeline, ids: list[int], cuts: list[int] | None = None, **last: Any):
    events: list[OutputEvent] = []
    position = 0
    for cut in [1] * len(ids) if cuts is None else cuts:
        part = ids[position : position + cut]
        position += cut
        if position >= len(ids):
            events += pipeline.push(part, **last)
            break
        events += pipeline.push(part)
    else:
        events += pipeline.push(ids[position:], **last)
    return merged(events + pipeline.finish())


def content(events: list[OutputEvent]) -> str:
    return "".join(e.text for e in events if isinstance(e, ContentDelta))


def encode(texts: Texts, text: str) -> list[int]:
    return texts.tokenizer.encode(text, add_special_tokens=False)


FULL = (
    "<think>\nThe user wants 🌦 weather.\n</think>\n\nLet me look.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Tromsø", "units": "°C"}}\n</tool_call>'
)
PARSED = [
    ReasoningDelta("The user wants 🌦 weather."),
    ContentDelta("Let me look."),
    ToolCallStart(0, "call_1", "get_weather"),
    ToolCallDelta(0, '{"city": "Tromsø", "units": "°C"}'),
]
cut_lists = st.lists(st.integers(0, 4), max_size=60)


@given(cuts=cut_lists, stops=st.sampled_from([(), ("Nothing",), ("lo", "xyz")]))
def test_all_parts_together(texts: Texts, cuts: list[int], stops: tuple[str, ...]) -> None:
    pipeline = texts.pipeline(stops=stops, tools=True, reasoning=True, new_call_id=lambda: "call_1")
    events = run(pipeline, encode(texts, FULL), cuts)
    if "lo" in stops:
        assert events == [PARSED[0], ContentDelta("Let me ")]
        assert pipeline.stop_string == "lo"
    else:
        assert events == PARSED
        assert pipeline.num_tool_calls == 1
        assert pipeline.num_tokens == len(encode(texts, FULL))


@pytest.mark.parametrize("sentence", SENTENCES[:7])
def test_plain_text(texts: Texts, sentence: str) -> None:
    ids = encode(texts, sentence)
    pipeline = texts.pipeline()
    assert run(pipeline, ids) == [ContentDelta(sentence)]
    assert pipeline.num_tokens == len(ids) and pipeline.stop_string is None


def test_without_the_wish_for_them_tags_are_what_the_vocabulary_says(texts: Texts) -> None:
    ids = encode(texts, FULL)
    assert content(run(texts.pipeline(), ids)) == texts.tokenizer.decode(ids)
    assert content(run(texts.pipeline(skip_special_tokens=False), ids)) == FULL


def test_the_token_that_stops_is_left_out_unless_asked_for(texts: Texts) -> None:
    ids = encode(texts, "Hello<|im_end|>")
    for include, shown in ((False, "Hello"), (True, "Hello<|im_end|>")):
        for stops in ((), ("xyz",)):
            pipeline = texts.pipeline(
                skip_special_tokens=False, include_stop_str_in_output=include, stops=stops
            )
            assert content(run(pipeline, ids, stop_token=ids[-1])) == shown
            assert pipeline.num_tokens == len(ids)


def test_tokens_after_the_stop_string_do_not_count(texts: Texts) -> None:
    ids = encode(texts, "The dog and the dog")
    upto = len(encode(texts, "The dog"))
    for cuts in ([1] * len(ids), [len(ids)], [2, 2, 2]):
        pipeline = texts.pipeline(stops=("dog",))
        assert content(run(pipeline, ids, cuts)) == "The "
        assert (pipeline.stop_string, pipeline.num_tokens) == ("dog", upto)
        assert pipeline.push(ids) == [] and pipeline.finish() == []
        assert pipeline.num_tokens == upto


def test_stop_strings_are_not_looked_for_in_the_first_tokens(texts: Texts) -> None:
    ids = encode(texts, "The dog and the dog too")
    upto = len(encode(texts, "The dog"))
    pipeline = texts.pipeline(stops=("dog",), min_tokens=upto)
    assert content(run(pipeline, ids)) == "The dog and the "


def test_a_stop_string_that_ends_with_replaced_bytes(texts: Texts) -> None:
    lead = texts.tokenizer.token_to_id("ð")
    pipeline = texts.pipeline(stops=("\ufffd",))
    assert run(pipeline, [*encode(texts, "ab"), lead]) == [ContentDelta("ab")]
    assert pipeline.stop_string == "\ufffd"


def test_a_prompt_that_opens_the_thinking(texts: Texts) -> None:
    ids = encode(texts, "Hm.</think>Yes.")
    opened = encode(texts, "<|im_start|>assistant\n<think>\n")
    events = run(texts.pipeline(opened, reasoning=True), ids)
    assert events == [ReasoningDelta("Hm."), ContentDelta("Yes.")]
    closed = encode(texts, "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert run(texts.pipeline(closed, reasoning=True), encode(texts, "Yes.")) == [
        ContentDelta("Yes.")
    ]


@given(ids=st.lists(st.integers(0, 720), max_size=40), cuts=cut_lists)
def test_any_ids_in_any_pieces_give_the_same_events(texts: Texts, ids, cuts) -> None:
    def make() -> OutputPipeline:
        return texts.pipeline(
            stops=("ab", "é "), tools=True, reasoning=True, new_call_id=lambda: "id"
        )

    one, other = make(), make()
    assert run(one, ids, cuts) == run(other, ids, [len(ids)])
    assert one.stop_string == other.stop_string and one.num_tokens == other.num_tokens


def test_a_stop_token_that_is_not_the_last_is_a_broken_invariant(texts: Texts) -> None:
    with pytest.raises(AssertionError):
        texts.pipeline().push([5, 6], stop_token=5)


def test_unhappy_options(texts: Texts, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        texts.pipeline(stops=("",))
    write_tokenizer(tmp_path, "byte_level")
    for flag in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ConfigError, match="no-such"):
            Texts.from_checkpoint(Checkpoint(tmp_path), **{flag: "no-such"})


def test_texts_without_parsers_leave_tags_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "byte_level", chat_template="{{ messages[0].content }}")
    plain = Texts.from_checkpoint(Checkpoint(tmp_path))
    events = run(plain.pipeline(tools=True, reasoning=True), encode(plain, FULL))
    assert events == [ContentDelta(FULL)]
    assert plain.render_chat([{"role": "user", "content": "Hi"}]) == "Hi"


def test_random_ids_for_calls_look_like_openais() -> None:
    found = {random_call_id() for _ in range(100)}
    assert len(found) == 100
    assert all(i.startswith("call_") and len(i) == 29 for i in found)
