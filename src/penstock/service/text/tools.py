"""Tool calls out of a model's text.

Hermes format, which Qwen uses as well:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

A parser is pushed text and yields events at once: the name when it is complete, the arguments as
they come, byte for byte as the model wrote them. However the text is cut, the events merge to the
same. White space around a call is dropped; what is between the tags but is no call is content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Protocol

from penstock.protocol.errors import ConfigError
from penstock.service.text.events import (
    ContentDelta,
    ContentEvent,
    ToolCallDelta,
    ToolCallStart,
    ToolEvent,
)
from penstock.service.text.json_scan import WHITESPACE, JsonScanner
from penstock.service.text.tags import first_tag, undecided

IdFactory = Callable[[], str]

_ARGUMENT_KEYS = ("arguments", "parameters")


def call_ids(request_id: str, choice: int = 0) -> IdFactory:
    """Ids for the calls of one choice: "call_" and 24 hex digits, the same in every replay."""
    count = 0

    def next_id() -> str:
        nonlocal count
        digest = hashlib.sha256(f"{request_id}/{choice}/{count}".encode()).hexdigest()
        count += 1
        return "call_" + digest[:24]

    return next_id


class ToolParser(Protocol):
    #: Texts that must reach the parser even where the vocabulary has them as special tokens.
    tags: tuple[str, ...]
    #: Calls begun so far; a choice that has any ends with finish_reason "tool_calls".
    num_calls: int

    def push(self, text: str) -> list[ToolEvent | ContentEvent]: ...

    def finish(self) -> list[ToolEvent | ContentEvent]:
        """The text is over: whatever was held back."""


class HermesToolParser:
    """See the module. Outside a tag the parser holds back only white space and a possible tag."""

    OPEN = "<tool_call>"
    CLOSE = "</tool_call>"
    tags: tuple[str, ...] = (OPEN, CLOSE)

    def __init__(self, new_id: IdFactory) -> None:
        self.num_calls = 0
        self._new_id = new_id
        self._held = ""  # text outside calls that is not decided yet
        self._call: _Call | None = None
        self._close_expected = False
        self._after_call = False  # white space that comes now is the format's
        self._events: list[ToolEvent | ContentEvent] = []

    def push(self, text: str) -> list[ToolEvent | ContentEvent]:
        text, self._held = self._held + text, ""
        position = 0
        while position < len(text):
            if self._call is None:
                position = self._outside(text, position)
            else:
                position = self._inside(self._call, text, position)
        return self._take_events()

    def finish(self) -> list[ToolEvent | ContentEvent]:
        if self._call is not None and not self._call.started:
            self._content(self._call.raw)
        elif not (self._after_call and not self._held.strip(WHITESPACE)):
            self._content(self._held)
        self._call, self._held = None, ""
        return self._take_events()

    def _outside(self, text: str, position: int) -> int:
        rest = text[position:]
        if self._after_call:
            rest = rest.lstrip(WHITESPACE)
        tags = self.tags if self._close_expected else (self.OPEN,)
        at, tag = first_tag(rest, tags)
        if at < 0:
            border = len(rest) - undecided(rest, tags)
            self._content(rest[:border])
            self._held = rest[border:]
            return len(text)
        before = rest[:at].rstrip(WHITESPACE)
        self._content(before)
        self._close_expected = False
        if tag == self.OPEN:
            self._call = _Call(rest[len(before) : at] + tag, self._begin, self._arguments)
        else:
            self._after_call = True
        return len(text) - len(rest) + at + len(tag)

    def _inside(self, call: _Call, text: str, position: int) -> int:
        end = call.feed(text, position)
        if call.failed:
            if not call.started:
                self._content(call.raw)
            self._call = None
            self._after_call = False
        elif call.closed:
            self._call = None
            self._close_expected = self._after_call = True
        return end

    def _begin(self, name: str) -> None:
        self._events.append(ToolCallStart(self.num_calls, self._new_id(), name))
        self.num_calls += 1

    def _arguments(self, text: str) -> None:
        self._events.append(ToolCallDelta(self.num_calls - 1, text))

    def _content(self, text: str) -> None:
        if text:
            self._after_call = False
            self._events.append(ContentDelta(text))

    def _take_events(self) -> list[ToolEvent | ContentEvent]:
        events, self._events = self._events, []
        return events


class _Call:
    """The object between the tags, read as it comes: its keys may be in any order.

    `raw` is everything so far, tag included, as long as the call has not started: until then it can
    still turn out to be mere text.
    """

    def __init__(
        self, raw: str, begin: Callable[[str], None], arguments: Callable[[str], None]
    ) -> None:
        self.raw = raw
        self.failed = False
        self.closed = False
        self.started = False
        self._begin = begin
        self._emit = arguments
        self._expects = "open"
        self._scanner: JsonScanner | None = None
        self._key = ""
        self._value: list[str] = []  # of a key or a value that is needed whole
        self._waiting: list[str] = []  # arguments that came before the name
        self._has_arguments = False
        self._streams = False  # the value being read is the arguments object

    def feed(self, text: str, position: int) -> int:
        while position < len(text) and not self.failed and not self.closed:
            start = position
            was_started = self.started
            if self._scanner is not None:
                position = self._scalar(self._scanner, text, position)
            elif text[position] in WHITESPACE or self._structure(text[position]):
                position += 1
            elif self._scanner is None:  # neither taken nor the start of a value
                self.failed = True
            if not was_started:
                self.raw += text[start:position]
        return position

    def _structure(self, char: str) -> bool:
        """Take one character of the outer object, or start a scanner at it (and not take it)."""
        expects = self._expects
        if expects == "open" and char == "{":
            self._expects = "key_or_end"
        elif expects in ("key", "key_or_end") and char == '"':
            self._scan("in_key")
            return False
        elif expects == "colon" and char == ":":
            self._expects = "value"
        elif expects == "value":
            self._scan("in_value")
            self._streams = self._key in _ARGUMENT_KEYS and char == "{"
            return False
        elif expects == "comma_or_end" and char == ",":
            self._expects = "key"
        elif expects in ("comma_or_end", "key_or_end") and char == "}" and self.started:
            if not self._has_arguments:
                self._emit("{}")
            self.closed = True
        else:
            return False
        return True

    def _scan(self, expects: str) -> None:
        self._expects = expects
        self._scanner = JsonScanner()
        self._value = []

    def _scalar(self, scanner: JsonScanner, text: str, position: int) -> int:
        end = scanner.feed(text, position)
        part = text[position:end]
        if not self._streams:
            self._value.append(part)
        elif self.started and part:
            self._emit(part)
        else:
            self._waiting.append(part)
        if scanner.failed:
            self.failed = True
        elif scanner.done:
            self._scanner = None
            if self._expects == "in_key":
                self._key_done()
            else:
                self._value_done()
        return end

    def _key_done(self) -> None:
        self._key = json.loads("".join(self._value))
        repeated = (self._key == "name" and self.started) or (
            self._key in _ARGUMENT_KEYS and self._has_arguments
        )
        self.failed = repeated
        self._expects = "colon"

    def _value_done(self) -> None:
        self._expects = "comma_or_end"
        if self._streams:
            self._streams, self._has_arguments = False, True
        elif self._key in _ARGUMENT_KEYS:
            self._arguments_done("".join(self._value))
        elif self._key == "name":
            self._name_done("".join(self._value))

    def _name_done(self, value: str) -> None:
        name = json.loads(value) if value.startswith('"') else ""
        if not name:
            self.failed = True
            return
        self.started = True
        self._begin(name)
        if self._waiting:
            self._emit("".join(self._waiting))

    def _arguments_done(self, value: str) -> None:
        """Arguments that are no object: null for none, or the object once more inside a string."""
        text = json.loads(value) if value.startswith('"') else "{}"
        if not (value == "null" or value.startswith('"')) or not _is_object(text):
            self.failed = True
            return
        self._has_arguments = True
        if self.started:
            self._emit(text)
        else:
            self._waiting.append(text)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


_PARSERS: dict[str, Callable[[IdFactory], ToolParser] | None] = {
    "hermes": HermesToolParser,
    "qwen": HermesToolParser,
    "none": None,
}
TOOL_PARSERS = tuple(_PARSERS)


def tool_parser_factory(name: str | None) -> Callable[[IdFactory], ToolParser] | None:
    """What `--tool-call-parser NAME` makes; None for "none". Raises `ConfigError`."""
    if name is None:
        return None
    if name not in _PARSERS:
        raise ConfigError(
            f"--tool-call-parser {name}: there is no such parser; choose from "
            f"{', '.join(TOOL_PARSERS)}"
        )
    return _PARSERS[name]
