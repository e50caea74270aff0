"""Constraints as users write them: what is accepted, what is refused, and that nothing hangs."""

import json
import re

import jsonschema
import pytest
from tests.unit.structured_helpers import small_compiler, small_tokenizer, walk

from penstock.grammar import MAX_NODES, build_tokenizer
from penstock.protocol.errors import InvalidConstraint, InvalidRequest, UnsupportedFeature
from penstock.protocol.request import Constraint
from penstock.service.text.constraints import (
    for_tools,
    from_guided,
    from_response_format,
    validate,
    validate_async,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
PING = {"type": "function", "function": {"name": "ping"}}


def tag_ids(tool_tags: bool) -> dict[str, int]:
    if not tool_tags:
        return {}
    return {tag: small_tokenizer().token_to_id(tag) for tag in ("<tool_call>", "</tool_call>")}


def tool_calls(constraint: Constraint, seed: int, tool_tags: bool) -> tuple[str, list[dict]]:
    tokenizer, compiler = small_tokenizer(tool_tags), small_compiler(tool_tags)
    ids = walk(compiler, constraint, seed, tokenizer)
    text = tokenizer.decode(
        [i for i in ids if i not in compiler.eos_token_ids], skip_special_tokens=False
    )
    pattern = r"<tool_call>\n(.*?)\n</tool_call>"
    assert re.fullmatch(rf"{pattern}(\n{pattern})*", text, re.DOTALL), text
    if tool_tags:
        assert ids[0] == tokenizer.token_to_id("<tool_call>"), "the tag is its own token"
    return text, [json.loads(body) for body in re.findall(pattern, text, re.DOTALL)]


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool_tags", [True, False])
def test_required_tools_in_hermes_format(tool_tags):
    constraint = for_tools([WEATHER, PING], "required", tag_ids=tag_ids(tool_tags))
    validate(constraint, tokenizer=small_compiler(tool_tags).tokenizer)
    seen = set()
    counts = set()
    for seed in range(20):
        text, calls = tool_calls(constraint, seed, tool_tags)
        counts.add(len(calls))
        for call in calls:
            assert list(call) == ["name", "arguments"]
            seen.add(call["name"])
            schema = {
                "get_weather": WEATHER["function"]["parameters"],
                "ping": {"maxProperties": 0},
            }
            jsonschema.validate(call["arguments"], schema[call["name"]])
        assert not re.search(r"[ ]{2}|[{\[] ", text), "whitespace only after a comma or a colon"
    assert seen == {"get_weather", "ping"}
    assert min(counts) == 1 and max(counts) > 1


def test_exactly_one_call_when_parallel_calls_are_off():
    constraint = for_tools(
        [WEATHER, PING], "required", tag_ids=tag_ids(True), parallel_tool_calls=False
    )
    assert all(len(tool_calls(constraint, seed, True)[1]) == 1 for seed in range(10))


def test_a_named_tool_is_called_once():
    choice = {"type": "function", "function": {"name": "ping"}}
    constraint = for_tools([WEATHER, PING], choice, tag_ids=tag_ids(True))
    _, calls = tool_calls(constraint, 0, True)
    assert calls == [{"name": "ping", "arguments": {}}]


def test_each_tool_keeps_its_own_definitions():
    """Two tools that both define "#/$defs/value", differently."""

    def tool(name: str, value: dict) -> dict:
        parameters = {
            "type": "object",
            "properties": {"v": {"$ref": "#/$defs/value"}},
            "required": ["v"],
            "additionalProperties": False,
            "$defs": {"value": value},
        }
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [tool("a", {"const": 1}), tool("b", {"const": "two"})]
    constraint = for_tools(tools, "required", tag_ids={}, parallel_tool_calls=False)
    found = {json.dumps(tool_calls(constraint, seed, False)[1][0]) for seed in range(20)}
    assert found == {
        '{"name": "a", "arguments": {"v": 1}}',
        '{"name": "b", "arguments": {"v": "two"}}',
    }


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_free_tool_choices_constrain_nothing(choice):
    assert for_tools([WEATHER], choice, tag_ids={}) is None


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([], "required", "tool_choice"),
        (None, "required", "tool_choice"),
        ([WEATHER], {"type": "function", "function": {"name": "nope"}}, "tool_choice"),
        ([WEATHER], "always", "tool_choice"),
        ([WEATHER], {"type": "function"}, "tool_choice"),
        ([{"type": "retrieval"}], "required", "tools"),
        ([{"type": "function", "function": {}}], "required", "tools"),
        ([{"type": "function", "function": {"name": "f", "parameters": 5}}], "required", "tools"),
    ],
)
def test_bad_tools_name_the_field(tools, choice, param):
    with pytest.raises(InvalidRequest) as raised:
        for_tools(tools, choice, tag_ids={})
    assert raised.value.param == param


# -- response_format and vLLM's names ----------------------------------------------------------


def test_response_format():
    assert from_response_format(None) is None
    assert from_response_format({"type": "text"}) is None
    assert from_response_format({"type": "json_object"}).kind == "json_object"
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    value = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    constraint = from_response_format(value)
    assert constraint.kind == "json_schema" and json.loads(constraint.text) == schema


def test_strict_refuses_what_it_cannot_enforce_and_lenient_passes_it_over():
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
        "not": {"const": 1},
    }

    def constraint(strict: bool) -> Constraint:
        return from_response_format(
            {"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}}
        )

    with pytest.raises(InvalidConstraint):
        validate(constraint(True))
    lenient = validate(constraint(False))
    ids = walk(small_compiler(), lenient, 0, small_tokenizer())
    assert "a" in json.loads(small_tokenizer().decode(ids[:-1]))


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"type": "json_schema"}, InvalidRequest),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, InvalidRequest),
        ({"type": "structural_tag"}, UnsupportedFeature),
        ({}, UnsupportedFeature),
    ],
)
def test_bad_response_formats(value, error):
    with pytest.raises(error) as raised:
        from_response_format(value)
    assert raised.value.param == "response_format"


@pytest.mark.parametrize(
    ("request_fields", "kind"),
    [
        ({"guided_json": {"type": "object"}}, "json_schema"),
        ({"guided_json": '{"type": "object"}'}, "json_schema"),
        ({"guided_regex": "[a-z]+"}, "regex"),
        ({"guided_choice": ["a", "b"]}, "choice"),
        ({"guided_grammar": 'root ::= "a" | "b" root'}, "lark"),
        ({"guided_grammar": 'start: "a"+'}, "lark"),
        ({"structured_outputs": {"json": {"type": "string"}}}, "json_schema"),
        ({"structured_outputs": {"json_object": True}}, "json_object"),
        ({"structured_outputs": {"choice": ["x"], "regex": None}}, "choice"),
    ],
)
def test_guided(request_fields, kind):
    constraint = from_guided({"model": "m", **request_fields})
    assert constraint.kind == kind
    assert validate(constraint) is constraint


def test_nothing_guided():
    assert from_guided({"model": "m", "guided_json": None}) is None
    assert from_guided({"structured_outputs": {"json_object": False}}) is None


def test_whitespace_can_be_switched_off():
    options = {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 3}}
    compact = from_guided({"structured_outputs": {**options, "disable_any_whitespace": True}})
    for seed in range(10):
        ids = walk(small_compiler(), compact, seed, small_tokenizer())
        assert not re.search(r"\s", small_tokenizer().decode(ids[:-1]))


@pytest.mark.parametrize(
    ("request_fields", "error"),
    [
        ({"guided_json": "{", }, InvalidConstraint),
        ({"guided_json": "[" * 100_000}, InvalidConstraint),
        ({"guided_json": [1]}, InvalidConstraint),
        ({"guided_regex": 5}, InvalidConstraint),
        ({"guided_choice": "ab"}, InvalidConstraint),
        ({"guided_choice": ["a", ""]}, InvalidConstraint),
        ({"guided_regex": "a", "guided_choice": ["a"]}, InvalidRequest),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, InvalidRequest),
        ({"structured_outputs": {"structural_tag": "{}"}}, UnsupportedFeature),
        ({"structured_outputs": 5}, InvalidRequest),
    ],
)  # fmt: skip
def test_bad_guided(request_fields, error):
    with pytest.raises(error):
        from_guided(request_fields)


# -- validation --------------------------------------------------------------------------------


def nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + "{}" + closing * depth


def chain(link: str, count: int) -> str:
    """`count` definitions, each referring to the next."""
    links = ",".join(f'"d{i}":' + link.replace("NEXT", f"d{i + 1}") for i in range(count))
    return f'{{"$ref":"#/$defs/d0","$defs":{{{links},"d{count}":{{"type":"null"}}}}}}'


REFUSED = {
    "not json": ("json_schema", "{"),
    "unknown type": ("json_schema", '{"type": "strong"}'),
    "lookahead": ("json_schema", '{"type": "string", "pattern": "(?=a)b"}'),
    "matches nothing": ("json_schema", '{"$ref": "#"}'),
    "unresolved": ("json_schema", '{"$ref": "#/$defs/nope"}'),
    "remote": ("json_schema", '{"$ref": "https://example.com/schema.json"}'),
    "deep": ("json_schema", nested('{"type":"array","items":', "}", 20_000)),
    "long chain": ("json_schema", chain('{"items":{"$ref":"#/$defs/NEXT"}}', 3000)),
    "large": ("json_schema", json.dumps({"enum": ["x" * 300_000]})),
    "many properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}),
    ),
    "product of anyOf": (
        "json_schema",
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"{c}{i}": {"type": "string"}}} for c in "ab"]}
                    for i in range(24)
                ]
            }
        ),
    ),
    "fine multipleOf": ("json_schema", '{"type": "integer", "multipleOf": 999983}'),
    "hidden multipleOf": ("lark", 'start: %json {"type":"integer","multiple\\u004ff":999983}'),
    "bad regex": ("regex", "a("),
    "back reference": ("regex", r"(a)\1"),
    "deep regex": ("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "long regex": ("regex", "a|" * 50_000 + "b"),
    "empty grammar": ("lark", ""),
    "not a grammar": ("lark", "start = a"),
    "undefined rule": ("lark", "start: nope"),
    "recursive terminal": ("lark", 'start: A\nA: A "x" | "x"'),
    "deep grammar": ("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "rule chain": (
        "lark",
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4000)) + '\nr4000: "a"',
    ),
    "doubling terminals": (
        "lark",
        "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "a"',
    ),
    "no choice": ("choice", "[]"),
    "choice is no list": ("choice", '{"a": 1}'),
    "choice of numbers": ("choice", "[1]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    kind, text = REFUSED[name]
    with pytest.raises(InvalidConstraint) as raised:
        validate(Constraint(kind, text), param="response_format")
    assert raised.value.param == "response_format"
    assert raised.value.message.startswith(kind)
    assert len(raised.value.message) < 500


ACCEPTED = {
    "recursive": (
        "json_schema",
        '{"type": "object", "properties": {"child": {"$ref": "#"}, "n": {"type": "integer"}}}',
    ),
    # Each of these overruns an 8 MB stack in llguidance; within the limits it must not.
    "chain in the limits": ("json_schema", chain('{"items":{"$ref":"#/$defs/NEXT"}}', 1900)),
    "rule chain in the limits": (
        "lark",
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3900)) + '\nr3900: "a"',
    ),
    "expensive to match": ("regex", "(a|b)*a(a|b){1000}c"),
    "nested quantifiers": ("regex", "(x+x+)+y"),
    "huge repeat": ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "many choices": ("choice", json.dumps([f"choice {i}" for i in range(3000)])),
    "special token": ("lark", 'start: <tool_call> "a"'),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    constraint = Constraint(*ACCEPTED[name])
    assert validate(constraint) is constraint


async def test_validate_in_a_coroutine():
    assert await validate_async(Constraint("regex", "a+")) == Constraint("regex", "a+")
    with pytest.raises(InvalidConstraint):
        await validate_async(Constraint("regex", "a("))


def test_special_tokens_are_checked_against_the_tokenizer():
    tokenizer = small_tokenizer()
    view = build_tokenizer(tokenizer.to_str(), tokenizer.get_vocab_size(), [0])
    validate(Constraint("lark", 'start: <tool_call> "a"'), tokenizer=view)
    with pytest.raises(InvalidConstraint, match="unknown special token"):
        validate(Constraint("lark", 'start: <nope> "a"'), tokenizer=view)


def test_the_limit_on_nodes_is_stated():
    text = json.dumps({"anyOf": [{}] * (MAX_NODES + 1)})
    with pytest.raises(InvalidConstraint, match=str(MAX_NODES)):
        validate(Constraint("json_schema", text))
