"""Tool calls and reasoning out of streamed text; JSON recognised as it comes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.protocol.errors import ConfigError
from penstock.service.text.events import (
    ContentDelta,
    OutputEvent,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
    merged,
)
from penstock.service.text.json_scan import JsonScanner
from penstock.service.text.reasoning import ThinkParser, reasoning_parser_factory
from penstock.service.text.tools import HermesToolParser, call_ids, tool_parser_factory


def parse(text: str, cuts: list[int] = []) -> list[OutputEvent]:  # noqa: B006
    parser = HermesToolParser(call_ids("r"))
    return feed(parser, text, cuts)


def feed(parser, text: str, cuts: list[int]) -> list[OutputEvent]:
    events: list[OutputEvent] = []
    position = 0
    for cut in cuts:
        events += parser.push(text[position : position + cut])
        position += cut
    events += parser.push(text[position:])
    events += parser.finish()
    assert all(e != ContentDelta("") for e in events)
    return merged(events)


def calls(events: list[OutputEvent]) -> list[tuple[str, str]]:
    """(name, arguments) of each call."""
    found: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            assert event.index == len(found)
            found.append((event.name, ""))
        elif isinstance(event, ToolCallDelta):
            name, arguments = found[event.index]
            found[event.index] = (name, arguments + event.arguments)
    return found


def content(events: list[OutputEvent]) -> str:
    return "".join(e.text for e in events if isinstance(e, ContentDelta))


def tagged(inner: str) -> str:
    return f"<tool_call>\n{inner}\n</tool_call>"


# --- JSON as it comes ---

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                 max_size=3),
    max_leaves=8,
)  # fmt: skip
dumped = st.builds(
    lambda value, ascii, indent: json.dumps(value, ensure_ascii=ascii, indent=indent),
    values, st.booleans(), st.sampled_from([None, 1]),
)  # fmt: skip


def strict(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def scan(text: str, step: int) -> tuple[bool, bool, int]:
    scanner, position = JsonScanner(), 0
    while position < len(text) and not scanner.done and not scanner.failed:
        end = min(len(text), position - position % step + step)
        position = scanner.feed(text[:end], position)
    return scanner.done, scanner.failed, position


@given(text=dumped, step=st.integers(1, 7))
def test_the_scanner_finds_the_end_of_every_json_value(text: str, step: int) -> None:
    whole = f"[{text}]"
    assert scan(whole + " tail", step) == (True, False, len(whole))


@given(
    text=dumped.flatmap(
        lambda t: st.builds(
            lambda at, char: f"[{t[: at % (len(t) + 1)]}{char}{t[at % (len(t) + 1) + 1 :]}]",
            st.integers(0, 200), st.sampled_from([*'{}[]",:\\ue-+.019x\n', ""]),
        )
    ),
    step=st.integers(1, 7),
)  # fmt: skip
def test_the_scanner_accepts_what_json_loads_accepts(text: str, step: int) -> None:
    done, failed, end = scan(text, step)
    if done:
        assert strict(text[:end])
    assert (done and end == len(text)) == strict(text)
    assert failed or done or not strict(text)


# --- calls ---


def test_one_call() -> None:
    text = tagged('{"name": "get_weather", "arguments": {"city": "Oslo", "days": [1, 2]}}')
    assert parse(text) == [
        ToolCallStart(0, call_ids("r")(), "get_weather"),
        ToolCallDelta(0, '{"city": "Oslo", "days": [1, 2]}'),
    ]


def test_the_name_comes_as_soon_as_it_is_complete_and_arguments_as_they_come() -> None:
    parser = HermesToolParser(lambda: "id")
    assert parser.push('<tool_call>{"name": "f') == []
    assert parser.push('"') == [ToolCallStart(0, "id", "f")]
    assert parser.push(', "arguments": {"a"') == [ToolCallDelta(0, '{"a"')]
    assert parser.push(": 1}}") == [ToolCallDelta(0, ": 1}")]
    assert parser.push("</tool_call>") + parser.finish() == []


names = st.text(min_size=1, max_size=6)
objects = st.dictionaries(st.text(max_size=6), values, max_size=3)


@given(
    asked=st.lists(st.tuples(names, objects), max_size=3),
    name_first=st.booleans(),
    parameters=st.booleans(),
)
def test_arguments_are_the_models_own_text(asked, name_first, parameters) -> None:
    key = "parameters" if parameters else "arguments"
    texts = []
    for name, arguments in asked:
        pair = [("name", name), (key, arguments)]
        texts.append(tagged(json.dumps(dict(pair if name_first else reversed(pair)))))
    events = parse("\n".join(texts))
    assert calls(events) == [(name, json.dumps(arguments)) for name, arguments in asked]
    assert content(events) == ""


def test_content_around_calls_stays_and_white_space_next_to_tags_goes() -> None:
    call = tagged('{"name": "f", "arguments": {}}')
    events = parse(f"Let me see.\n\n{call}\n\n{call}\n Done. \n")
    assert content(events) == "Let me see.Done. \n"
    assert calls(events) == [("f", "{}")] * 2


def test_a_tag_inside_an_argument_is_text() -> None:
    arguments = '{"s": "</tool_call><tool_call>\\"}"}'
    assert calls(parse(tagged(f'{{"name": "f", "arguments": {arguments}}}'))) == [("f", arguments)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('"{\\"a\\": 1}"', '{"a": 1}'), ("null", "{}"), (None, "{}")],
)
def test_arguments_that_are_not_written_as_an_object(arguments, expected) -> None:
    rest = "" if arguments is None else f', "arguments": {arguments}'
    assert calls(parse(tagged(f'{{"name": "f"{rest}}}'))) == [("f", expected)]
    if arguments is not None:
        swapped = tagged(f'{{"arguments": {arguments}, "name": "f"}}')
        assert calls(parse(swapped)) == [("f", expected)]


@pytest.mark.parametrize(
    "inner",
    [
        "not json at all",
        '{"arguments": {"a": 1}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"arguments": {"a": }, "name": "f"}',
        '{"arguments": [1], "name": "f"}',
        "{'name': 'f'}",
        "[]",
        "",
        '{"name": ' + "9" * 5000 + "}",
        '{"arguments": ' + "9" * 5000 + ', "name": "f"}',
        '{"x": ' + "[" * 1000,
    ],
)
def test_what_is_no_call_is_content_and_nothing_is_lost(inner: str) -> None:
    text = "Look: " + tagged(inner) + " there"
    events = parse(text)
    assert calls(events) == []
    assert content(events) == text


def test_a_call_that_breaks_off_keeps_what_was_sent_and_shows_the_rest() -> None:
    events = parse(tagged('{"name": "f", "arguments": {"a": 1, oops}}'))
    assert calls(events) == [("f", '{"a": 1, ')]
    assert content(events) == "oops}}\n</tool_call>"


def test_output_that_ends_inside_a_call() -> None:
    assert calls(parse('<tool_call>{"name": "f", "arguments": {"a": "x')) == [("f", '{"a": "x')]
    assert content(parse('<tool_call>{"name": "f')) == '<tool_call>{"name": "f'
    assert calls(parse('<tool_call>{"name": "f", "arguments": {}}')) == [("f", "{}")]
    assert content(parse("so <tool_ca")) == "so <tool_ca"


def test_a_broken_call_does_not_take_the_next_one_with_it() -> None:
    events = parse("<tool_call>" + tagged('{"name": "f", "arguments": {}}'))
    assert calls(events) == [("f", "{}")]
    assert content(events) == "<tool_call>"


fragments = st.lists(
    st.one_of(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "\n", " ", "<", "<tool", '{"name": "f", "arguments": ',
             '{"a": 1}', "}", "}}", '"', '{"arguments": {"b": [null]}, "name": "g"}', "text", "\\",
             "<think>", "</think>", "</thi"]
        ),
        st.text(max_size=3),
    ),
    max_size=14,
).map("".join)  # fmt: skip
cut_lists = st.lists(st.integers(0, 5), max_size=40)


@given(text=fragments, cuts=cut_lists)
def test_any_cut_gives_the_same_calls(text: str, cuts: list[int]) -> None:
    assert parse(text, cuts) == parse(text)


@given(text=fragments)
def test_without_a_call_the_content_is_the_text(text: str) -> None:
    events = parse(text)
    if not calls(events):
        assert content(events) == text


@given(text=st.text("ab<>/_ \n", max_size=40), cuts=cut_lists)
def test_only_white_space_and_a_possible_tag_are_held_back(text: str, cuts: list[int]) -> None:
    parser = HermesToolParser(lambda: "id")
    sent, position = "", 0
    for cut in cuts:
        sent += content(parser.push(text[position : position + cut]))
        position += cut
        held = text[len(sent) : position].lstrip(" \t\n\r")
        assert len(held) < len("<tool_call>")
        assert "<tool_call>".startswith(held)


def test_ids_are_those_of_openai_and_repeat_in_a_replay() -> None:
    first, again, other = call_ids("r", 0), call_ids("r", 0), call_ids("r", 1)
    ids = [first(), first(), other()]
    assert len(set(ids)) == 3 and [again(), again()] == ids[:2]
    assert all(i.startswith("call_") and len(i) == 29 for i in ids)


def test_parsers_by_name() -> None:
    for name in ("hermes", "qwen"):
        make = tool_parser_factory(name)
        assert make is not None
        assert isinstance(make(lambda: "id"), HermesToolParser)
    assert tool_parser_factory("none") is None and tool_parser_factory(None) is None
    assert reasoning_parser_factory("none") is None and reasoning_parser_factory(None) is None
    with pytest.raises(ConfigError, match=r"mistral.*hermes, qwen, none"):
        tool_parser_factory("mistral")
    with pytest.raises(ConfigError, match=r"xyz.*qwen3, deepseek_r1, none"):
        reasoning_parser_factory("xyz")


# --- reasoning ---


@pytest.mark.parametrize(
    ("text", "inside", "thought", "answer"),
    [
        ("<think>\nHm.\n</think>\n\nYes.\n", False, "Hm.", "Yes.\n"),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
        ("<think>Hm.</think>Yes.", True, "Hm.", "Yes."),
        ("Plain <think> answer", False, "", "Plain <think> answer"),
        ("<think>never ends </thi", False, "never ends </thi", ""),
        ("still thinking", True, "still thinking", ""),
        ("<thinner>", False, "", "<thinner>"),
        ("<thi", False, "", "<thi"),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_split_off(text: str, inside: bool, thought: str, answer: str) -> None:
    for cuts in ([], [1] * len(text)):
        events = feed(ThinkParser(inside), text, cuts)
        assert content(events) == answer
        assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == thought


@given(text=fragments, cuts=cut_lists, inside=st.booleans())
def test_any_cut_gives_the_same_reasoning(text: str, cuts: list[int], inside: bool) -> None:
    assert feed(ThinkParser(inside), text, cuts) == feed(ThinkParser(inside), text, [])


@pytest.mark.parametrize(
    ("name", "prompt", "inside"),
    [
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("deepseek_r1", "<｜Assistant｜>", True),
        ("deepseek_r1", "<｜Assistant｜></think>\n\n", False),
    ],
)
def test_the_end_of_the_prompt_says_where_a_reply_begins(name, prompt, inside) -> None:
    make = reasoning_parser_factory(name)
    assert make is not None
    events = feed(make(prompt), "words", [])
    assert events == [ReasoningDelta("words") if inside else ContentDelta("words")]
