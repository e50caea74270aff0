"""Messages to a prompt, by the checkpoint's chat template.

Templates are programs that came with a checkpoint. They run in `template_sandbox`, with the names
that transformers gives them; what they raise becomes `TemplateFailed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from penstock.checkpoint import Checkpoint
from penstock.protocol.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequest,
    PenstockError,
    TemplateFailed,
)
from penstock.service.text.template_sandbox import CompiledTemplate
from penstock.service.text.tokenizer import Tokenizer

Message = dict[str, Any]

#: What `chat_template_kwargs` may not replace.
RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
     "raise_exception", "strftime_now")
)  # fmt: skip
_CONTINUE_HERE = "PENSTOCK_CONTINUES_HERE "
_PROBE = "penstockprobe"


class Template(Protocol):
    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, to be tokenised with `add_special_tokens=False`.

        Raises `TemplateFailed` with the template's own words, `InvalidRequest` for messages that
        no template can render.
        """


class NoChatTemplate:
    """A checkpoint without a template (a base model): every rendering is refused."""

    def render(self, messages: Sequence[Message], **_: Any) -> str:
        raise InvalidRequest(
            "this model has no chat template: use /v1/completions, or start the server with "
            "--chat-template FILE"
        )


class ChatTemplate:
    """One template for plain chats and, where the checkpoint has it, another for tools."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`sources` by name: "default", "tool_use". Raises `TemplateFailed` for bad syntax."""
        self._templates = {name: CompiledTemplate(source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens)
        self._formats = {
            name: _accepted_formats(template, self._special_tokens)
            for name, template in self._templates.items()
        }

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        name = self._choose(bool(tools))
        template = self._templates[name]
        accepts = self._formats[name]
        knows_developer = "developer" in template.source
        chat = [
            _prepare(message, f"messages[{i}]", accepts, knows_developer)
            for i, message in enumerate(messages)
        ]
        if not chat:
            raise InvalidRequest("messages must not be empty", param="messages")
        final = ""
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequest(
                    "continue_final_message and add_generation_prompt exclude each other",
                    param="continue_final_message",
                )
            final = _mark_end(chat)
        variables: dict[str, Any] = {
            **self._special_tokens,
            **_checked(kwargs),
            "messages": chat,
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = template.render(variables)
        return _cut_at_mark(text, final) if continue_final_message else text

    def content_formats(self, tools: bool = False) -> frozenset[str]:
        """How the template takes a message's content: "string", "parts", or both."""
        return self._formats[self._choose(tools)]

    def _choose(self, tools: bool) -> str:
        if tools and "tool_use" in self._templates:
            return "tool_use"
        if "default" in self._templates:
            return "default"
        raise InvalidRequest(
            f"the checkpoint has chat templates named {', '.join(sorted(self._templates))} but no "
            "default one: choose with --chat-template FILE"
        )


def load_chat_template(
    checkpoint: Checkpoint, tokenizer: Tokenizer, override: str | None = None
) -> Template:
    """The template of `--chat-template` (a file or the template itself), else the checkpoint's.

    Raises `ConfigError` or `CheckpointError` for one that is no template.
    """
    sources = {"default": _read_override(override)} if override else _sources(checkpoint)
    if not sources:
        return NoChatTemplate()
    blame: type[PenstockError] = ConfigError if override else CheckpointError
    try:
        return ChatTemplate(sources, tokenizer.special_tokens)
    except TemplateFailed as exc:
        raise blame(f"the chat template cannot be compiled: {exc.message}") from exc


def _read_override(override: str) -> str:
    try:
        if (file := Path(override).expanduser()).is_file():
            return file.read_text(encoding="utf-8")
    except (OSError, ValueError):  # a template is seldom a legal file name
        pass
    if "{{" in override or "{%" in override:
        return override
    raise ConfigError(f"--chat-template: there is no file {override}, and it is no template either")


def _sources(checkpoint: Checkpoint) -> dict[str, str]:
    """Files of their own win over tokenizer_config.json, as in transformers."""
    sources: dict[str, str] = {}
    main = checkpoint.path / "chat_template.jinja"
    try:
        if main.is_file():
            sources["default"] = main.read_text(encoding="utf-8")
        for file in sorted((checkpoint.path / "additional_chat_templates").glob("*.jinja")):
            sources[file.stem] = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"the chat template files cannot be read: {exc}") from exc
    if sources:
        return sources
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = checkpoint.json(name).get("chat_template")
        if isinstance(found, str):
            return {"default": found}
        if isinstance(found, list):
            try:
                return {entry["name"]: entry["template"] for entry in found}
            except (KeyError, TypeError) as exc:
                raise CheckpointError(f"{name}: chat_template is no list of templates") from exc
    return {}


def _accepted_formats(
    template: CompiledTemplate, special_tokens: Mapping[str, str]
) -> frozenset[str]:
    """Ask the template itself: which form of content does it show, and show as text?"""
    formats = set()
    parts = [{"type": "text", "text": _PROBE}]
    for name, content in (("string", _PROBE), ("parts", parts)):
        variables = {
            **special_tokens,
            "messages": [{"role": "user", "content": content}],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            shown = template.render(variables)
        except TemplateFailed:
            continue
        dumped = f"'{_PROBE}'" in shown or f'"{_PROBE}"' in shown
        if _PROBE in shown and not (name == "parts" and dumped):
            formats.add(name)
    return frozenset(formats or ("string",))


def _prepare(
    message: Message, where: str, accepts: frozenset[str], knows_developer: bool
) -> Message:
    """A message as templates expect it: content in a form they take, arguments as objects."""
    ready = dict(message)
    ready["content"] = _content(message.get("content"), where, accepts)
    if not ready.get("tool_calls"):
        ready.pop("tool_calls", None)
    else:
        ready["tool_calls"] = [
            _with_parsed_arguments(call, f"{where}.tool_calls[{i}]")
            for i, call in enumerate(ready["tool_calls"])
        ]
    if ready.get("role") == "developer" and not knows_developer:
        ready["role"] = "system"
    return ready


def _content(content: Any, where: str, accepts: frozenset[str]) -> Any:
    if content is None:
        content = ""
    if isinstance(content, str):
        return content if "string" in accepts else [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise InvalidRequest(
            "content must be a string or a list of parts", param=f"{where}.content"
        )
    if "parts" in accepts:
        return [dict(part) if isinstance(part, Mapping) else part for part in content]
    texts = []
    for i, part in enumerate(content):
        text = part if isinstance(part, str) else part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise InvalidRequest(
                f"this model's chat template takes text only, not {part.get('type')!r}",
                param=f"{where}.content[{i}]",
            )
        texts.append(text)
    return "\n".join(texts)


def _with_parsed_arguments(call: Any, where: str) -> dict[str, Any]:
    ready = dict(call)
    function = dict(ready.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except ValueError as exc:
            raise InvalidRequest(
                f"arguments are not JSON: {exc}", param=f"{where}.function.arguments"
            ) from exc
    elif arguments is None:
        function["arguments"] = {}
    ready["function"] = function
    return ready


def _checked(kwargs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    for name in kwargs or {}:
        if name in RESERVED:
            raise InvalidRequest(f"{name} cannot be set here", param=f"chat_template_kwargs.{name}")
    return kwargs or {}


def _mark_end(chat: list[Message]) -> str:
    """Put a mark behind the last text of the last message; returns that text."""
    last = chat[-1]
    content = last["content"]
    if isinstance(content, str) and content:
        last["content"] = content + _CONTINUE_HERE
        return content
    for i in range(len(content) - 1, -1, -1) if isinstance(content, list) else ():
        part = content[i]
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            content[i] = {**part, "text": part["text"] + _CONTINUE_HERE}
            return str(part["text"])
    raise InvalidRequest(
        "continue_final_message: the final message has no text to continue",
        param="continue_final_message",
    )


def _cut_at_mark(text: str, final: str) -> str:
    mark = text.rfind(_CONTINUE_HERE.strip())
    if mark < 0 or final.strip() not in text:
        raise InvalidRequest(
            "continue_final_message: the chat template does not show the final message as it is",
            param="continue_final_message",
        )
    if text.startswith(_CONTINUE_HERE, mark):
        return text[:mark]
    return text[:mark].rstrip()  # the template trims messages, so trim ours as it would
