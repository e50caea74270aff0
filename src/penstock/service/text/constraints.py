"""Structured output as the APIs write it, turned into a `Constraint` that is known to compile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from functools import cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from penstock.checkpoint import Checkpoint
from penstock.grammar import deep_stack_executor, error_text, limits, to_grammar
from penstock.protocol.errors import InvalidConstraint, InvalidRequest, UnsupportedFeature
from penstock.protocol.request import Constraint

#: Well beyond what the limits in `penstock.grammar` allow for; only a grammar that defeats them
#: gets here.
_COMPILE_TIMEOUT_S = 10.0

_TOOL_OPEN, _TOOL_CLOSE = "<tool_call>", "</tool_call>"
#: JSON in tool calls: compact, or one space after each comma and colon, as models are trained to
#: write it.
_TOOL_JSON = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}
_MAX_TOOL_CALLS = 32


# -- validation ------------------------------------------------------------------------------------


def validate(
    constraint: Constraint, *, tokenizer: LLTokenizer | None = None, param: str | None = None
) -> Constraint:
    """`constraint` itself if it compiles and some output can match it.

    Raises `InvalidConstraint` with llguidance's message, in bounded time and memory whatever the
    input. With the model's `tokenizer` (see `grammar.build_tokenizer`) special tokens in a lark
    grammar are checked too. Takes up to a second for a huge schema: in a coroutine use
    `validate_async`.
    """
    try:
        problem = _submit(constraint, tokenizer).result(_COMPILE_TIMEOUT_S)
    except FutureTimeout:
        problem = _gave_up()
    return _accept(constraint, problem, param)


async def validate_async(
    constraint: Constraint, *, tokenizer: LLTokenizer | None = None, param: str | None = None
) -> Constraint:
    """As `validate`, without holding up the event loop."""
    future = asyncio.wrap_future(_submit(constraint, tokenizer))
    try:
        problem = await asyncio.wait_for(asyncio.shield(future), _COMPILE_TIMEOUT_S)
    except TimeoutError:
        problem = _gave_up()
    return _accept(constraint, problem, param)


def _accept(constraint: Constraint, problem: str, param: str | None) -> Constraint:
    if problem:
        raise InvalidConstraint(f"{constraint.kind} cannot be used: {problem}", param=param)
    return constraint


def _submit(constraint: Constraint, tokenizer: LLTokenizer | None) -> Future[str]:
    return _worker().submit(_problem, constraint, tokenizer)


@cache
def _worker() -> ThreadPoolExecutor:
    return deep_stack_executor("penstock-constraints")


def _gave_up() -> str:
    # The thread cannot be stopped. Leave it to its grammar, and use a new one from here on.
    _worker.cache_clear()
    return f"it did not compile within {_COMPILE_TIMEOUT_S:g} s"


def _problem(constraint: Constraint, tokenizer: LLTokenizer | None) -> str:
    """Why the constraint cannot be used; empty when it can."""
    try:
        grammar = to_grammar(constraint)
    except ValueError as exc:
        return error_text(str(exc))
    if tokenizer is None and constraint.kind == "lark":
        # Without the model's tokenizer nobody knows which special tokens there are.
        return error_text(LLMatcher.validate_grammar(grammar, limits=limits()))
    matcher = LLMatcher(tokenizer or _byte_tokenizer(), grammar, log_level=0, limits=limits())
    if matcher.is_error():
        return error_text(matcher.get_error())
    # A grammar that matches nothing, or grows beyond the limits, shows it at the first mask.
    matcher.compute_bitmask()
    if matcher.is_error():
        return f"no output can match it, or it is too complex ({error_text(matcher.get_error())})"
    return ""


@cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


# -- builders --------------------------------------------------------------------------------------


def from_response_format(value: Mapping[str, Any] | None) -> Constraint | None:
    """OpenAI's `response_format`. None: free text.

    A schema is always enforced. `strict: true` refuses schemas with keywords that cannot be
    enforced; otherwise those keywords (alone) are passed over, as the flag promises no more.
    """
    if value is None:
        return None
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return Constraint("json_object", "")
        case "json_schema":
            outer = value.get("json_schema")
            if not isinstance(outer, Mapping) or not isinstance(outer.get("schema"), Mapping):
                raise InvalidRequest(
                    "response_format of type json_schema needs an object json_schema.schema",
                    param="response_format",
                )
            return _schema(outer["schema"], strict=bool(outer.get("strict")))
        case kind:
            raise UnsupportedFeature(
                f"response_format type {kind!r} is not supported: use text, json_object or "
                "json_schema",
                param="response_format",
            )


_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")


def from_guided(request: Mapping[str, Any]) -> Constraint | None:
    """vLLM's extensions: `structured_outputs: {...}`, or the older guided_json, guided_regex,
    guided_choice and guided_grammar. None: nothing is asked for.

    Raises `InvalidRequest` when more than one is given and `UnsupportedFeature` for the options of
    `structured_outputs` that are not supported.
    """
    wanted: dict[str, tuple[str, Any]] = {}  # field name: (what, value)
    for name, what in _GUIDED.items():
        if request.get(name) is not None:
            wanted[name] = (what, request[name])
    options = request.get("structured_outputs")
    whitespace: dict[str, Any] = {}
    if options is not None:
        if not isinstance(options, Mapping):
            raise InvalidRequest("structured_outputs must be an object", param="structured_outputs")
        whitespace = _whitespace(options)
        for what in _STRUCTURED:
            if options.get(what) not in (None, False):
                wanted[f"structured_outputs.{what}"] = (what, options[what])
    if not wanted:
        return None
    if len(wanted) > 1:
        names = ", ".join(wanted)
        raise InvalidRequest(f"give only one of {names}", param=next(iter(wanted)))
    ((name, (what, value)),) = wanted.items()
    return _guided(name, what, value, whitespace)


def _whitespace(options: Mapping[str, Any]) -> dict[str, Any]:
    known = {*_STRUCTURED, "disable_any_whitespace", "whitespace_pattern", "disable_fallback"}
    for name, value in options.items():
        if name not in known and value not in (None, False):
            raise UnsupportedFeature(
                f"structured_outputs.{name} is not supported", param=f"structured_outputs.{name}"
            )
    if options.get("disable_any_whitespace"):
        return {"whitespace_flexible": False, "whitespace_pattern": None}
    if options.get("whitespace_pattern") is not None:
        return {"whitespace_pattern": options["whitespace_pattern"]}
    return {}


def _guided(name: str, what: str, value: Any, whitespace: dict[str, Any]) -> Constraint:
    if what == "json_object":
        return Constraint("json_object", "")
    if what == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as exc:
                raise InvalidConstraint(f"{name} is not valid JSON: {exc}", param=name) from exc
        if not isinstance(value, Mapping):
            raise InvalidConstraint(f"{name} must be a JSON schema, an object", param=name)
        return _schema(value, strict=True, extra=whitespace)
    if what == "choice":
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise InvalidConstraint(f"{name} must be a list of non-empty strings", param=name)
        return Constraint("choice", json.dumps(value, ensure_ascii=False))
    if not isinstance(value, str):
        raise InvalidConstraint(f"{name} must be a string", param=name)
    if what == "regex":
        return Constraint("regex", value)
    try:
        return Constraint("lark", any_to_lark(value))  # GBNF is recognised and converted
    except Exception as exc:  # the converter raises whatever its parsing runs into
        raise InvalidConstraint(f"{name} is neither Lark nor GBNF: {exc}", param=name) from exc


def _schema(
    schema: Mapping[str, Any], *, strict: bool, extra: Mapping[str, Any] = {}
) -> Constraint:
    settings = {**dict(extra), **({} if strict else {"lenient": True})}
    if settings:
        schema = {**schema, "x-guidance": {**settings, **schema.get("x-guidance", {})}}
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))


# -- tools -----------------------------------------------------------------------------------------


def added_token_ids(checkpoint: Checkpoint) -> dict[str, int]:
    """Text: id of the tokens that the tokenizer never splits, from tokenizer.json."""
    added = checkpoint.json("tokenizer.json").get("added_tokens", [])
    return {str(token["content"]): int(token["id"]) for token in added}


def for_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    *,
    tag_ids: Mapping[str, int],
    parallel_tool_calls: bool = True,
) -> Constraint | None:
    """A grammar for calls in Hermes format; None where the model is free (auto, none).

    "required": one call or more of any tool (exactly one unless `parallel_tool_calls`). A named
    tool: exactly one call of it. `tag_ids` are the tokenizer's added tokens (`added_token_ids`): a
    tag that is a single token is asked for as that token, any other is spelt out.
    """
    if tool_choice in (None, "auto", "none"):
        return None
    functions = [_function(tool) for tool in tools or ()]
    if not functions:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if tool_choice == "required":
        repeat = f' ("\\n" call){{0,{_MAX_TOOL_CALLS - 1}}}' if parallel_tool_calls else ""
    else:
        name = _named(tool_choice)
        functions = [f for f in functions if f["name"] == name]
        if not functions:
            raise InvalidRequest(f"tool_choice names {name!r}, not in tools", param="tool_choice")
        repeat = ""
    opened, closed = _tag(_TOOL_OPEN, tag_ids), _tag(_TOOL_CLOSE, tag_ids)
    schema = json.dumps(_calls_schema(functions), ensure_ascii=False)
    return Constraint(
        "lark",
        f'start: call{repeat}\ncall: {opened} "\\n" body "\\n" {closed}\nbody: %json {schema}\n',
    )


def _tag(tag: str, tag_ids: Mapping[str, int]) -> str:
    return f"<[{tag_ids[tag]}]>" if tag in tag_ids else json.dumps(tag)


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise UnsupportedFeature("only tools of type function are supported", param="tools")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRequest("every function in tools needs a name", param="tools")
    return function


def _named(tool_choice: str | Mapping[str, Any]) -> str:
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(
            'tool_choice must be "auto", "none", "required" or '
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    return function["name"]


def _calls_schema(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One schema for a call of any of `functions`. Each one's parameters become a definition."""
    definitions, calls = {}, []
    for index, function in enumerate(functions):
        key = f"tool{index}"
        definitions[key] = _parameters(function, f"#/$defs/{key}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"$ref": f"#/$defs/{key}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    lenient = not all(function.get("strict") for function in functions)
    return {
        "x-guidance": {**_TOOL_JSON, "lenient": lenient},
        "anyOf": calls,
        "$defs": definitions,
    }


def _parameters(function: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The schema of the arguments, its references rebased to `root`. Without one: no arguments."""
    parameters = function.get("parameters")
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise InvalidRequest(
            f"parameters of {function['name']!r} must be a JSON schema", param="tools"
        )
    try:
        return {"type": "object", **_rebase(parameters, root)}
    except RecursionError:
        raise InvalidConstraint(
            f"parameters of {function['name']!r} are too deeply nested", param="tools"
        ) from None


def _rebase(value: Any, root: str) -> Any:
    if isinstance(value, Mapping):
        return {
            key: root + inner[1:]
            if key == "$ref" and isinstance(inner, str) and inner.startswith("#")
            else _rebase(inner, root)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_rebase(inner, root) for inner in value]
    return value
