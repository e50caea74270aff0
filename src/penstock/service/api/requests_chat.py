"""The body of /v1/chat/completions, and its messages as a chat template wants them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from penstock.protocol.errors import InvalidRequest
from penstock.service.api.requests import GenerationRequest, NumLogprobs, PositiveCount

FunctionName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.\-]+$")]


class TextPart(Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class FunctionCall(Struct, kw_only=True, forbid_unknown_fields=True):
    name: FunctionName
    arguments: str


class ToolCall(Struct, kw_only=True, forbid_unknown_fields=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    #: Streams number their calls; clients that send accumulated deltas back leave it in.
    index: int | None = None


class _Message(Struct, kw_only=True, tag_field="role", forbid_unknown_fields=True):
    name: str | None = None


class SystemMessage(_Message, tag="system"):
    content: Content


class DeveloperMessage(_Message, tag="developer"):
    content: Content


class UserMessage(_Message, tag="user"):
    content: Content


class ToolMessage(_Message, tag="tool"):
    content: Content
    tool_call_id: str


class AssistantMessage(_Message, tag="assistant"):
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    # An openai client sends these back, as null or empty, with every message it has received.
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class FunctionDef(Struct, kw_only=True, forbid_unknown_fields=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionDef


class FunctionRef(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str


class NamedToolChoice(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionRef


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: PositiveCount | None = None
    max_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as plain dicts with what was given, as `Template.render` takes them."""
    out: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        one = {k: v for k, v in msgspec.to_builtins(message).items() if v is not None}
        if isinstance(message, AssistantMessage):
            _complete_assistant(one, f"messages[{i}]")
        out.append(one)
    return out


def _complete_assistant(one: dict[str, Any], where: str) -> None:
    """Content may be null beside tool calls; a refusal stands in for the content it replaced."""
    one.pop("annotations", None)
    refusal = one.pop("refusal", None)
    if "content" not in one:
        if not one.get("tool_calls") and refusal is None:
            raise InvalidRequest(
                "an assistant message needs content or tool_calls", param=f"{where}.content"
            )
        one["content"] = refusal or ""
    for call in one.get("tool_calls", ()):
        call.pop("index", None)


def template_tools(tools: list[Tool]) -> list[dict[str, Any]]:
    """Tools as OpenAI writes them, without what the caller left out.

    Functions without parameters get an empty object's schema, which every template can show.
    """
    out = []
    for tool in tools:
        function = {k: v for k, v in msgspec.to_builtins(tool.function).items() if v is not None}
        function.setdefault("parameters", {"type": "object", "properties": {}})
        out.append({"type": "function", "function": function})
    return out
