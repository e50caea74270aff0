"""What the model thinks aloud, apart from what it answers: `<think>…</think>` at the start.

White space around the tags is dropped. Without an opening tag at the start, whether the text is
reasoning depends on the model: DeepSeek-R1's replies begin inside it, and so do those of any model
whose chat template ends the prompt with an open tag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from penstock.protocol.errors import ConfigError
from penstock.service.text.events import ContentDelta, ReasoningDelta
from penstock.service.text.tags import WHITESPACE, undecided

OPEN = "<think>"
CLOSE = "</think>"


class ReasoningParser(Protocol):
    tags: tuple[str, ...]

    def push(self, text: str) -> list[ReasoningDelta | ContentDelta]: ...

    def finish(self) -> list[ReasoningDelta | ContentDelta]: ...


class ThinkParser:
    """`starts_inside`: text that does not begin with the opening tag is reasoning."""

    tags: tuple[str, ...] = (OPEN, CLOSE)

    def __init__(self, starts_inside: bool = False) -> None:
        self._starts_inside = starts_inside
        self._state = "start"
        self._trim = True  # white space that comes now is the format's
        self._held = ""

    def push(self, text: str) -> list[ReasoningDelta | ContentDelta]:
        if self._state == "outside" and not self._trim:
            return [ContentDelta(text)] if text else []
        text, self._held = self._held + text, ""
        if self._state == "start":
            return self._start(text)
        return self._inside(text) if self._state == "inside" else self._outside(text)

    def finish(self) -> list[ReasoningDelta | ContentDelta]:
        held, self._held = self._held, ""
        if not held:
            return []
        inside = self._state == "inside" or (self._state == "start" and self._starts_inside)
        return [ReasoningDelta(held) if inside else ContentDelta(held)]

    def _start(self, text: str) -> list[ReasoningDelta | ContentDelta]:
        bare = text.lstrip(WHITESPACE)
        if len(bare) < len(OPEN) and OPEN.startswith(bare):
            self._held = text
            return []
        if bare.startswith(OPEN):
            self._state = "inside"
            return self._inside(bare[len(OPEN) :])
        if self._starts_inside:
            self._state = "inside"
            return self._inside(text)
        self._state, self._trim = "outside", False
        return [ContentDelta(text)]

    def _inside(self, text: str) -> list[ReasoningDelta | ContentDelta]:
        if self._trim:
            text = text.lstrip(WHITESPACE)
        at = text.find(CLOSE)
        if at < 0:
            border = len(text) - undecided(text, (CLOSE,))
            self._held = text[border:]
            self._trim = self._trim and border == 0
            return [ReasoningDelta(text[:border])] if border else []
        thought = text[:at].rstrip(WHITESPACE)
        self._state, self._trim = "outside", True
        events: list[ReasoningDelta | ContentDelta] = [ReasoningDelta(thought)] if thought else []
        return events + self._outside(text[at + len(CLOSE) :])

    def _outside(self, text: str) -> list[ReasoningDelta | ContentDelta]:
        text = text.lstrip(WHITESPACE)
        if not text:
            return []
        self._trim = False
        return [ContentDelta(text)]


_STARTS_INSIDE = {"qwen3": False, "deepseek_r1": True}
REASONING_PARSERS = (*_STARTS_INSIDE, "none")


def reasoning_parser_factory(name: str | None) -> Callable[[str], ReasoningParser] | None:
    """What `--reasoning-parser NAME` makes of a prompt's text; None for "none".

    The prompt's end decides first: an open tag there means that the reply begins inside it, and a
    closed one (thinking switched off by the template) that it does not. Raises `ConfigError`.
    """
    if name is None or name == "none":
        return None
    if name not in _STARTS_INSIDE:
        raise ConfigError(
            f"--reasoning-parser {name}: there is no such parser; choose from "
            f"{', '.join(REASONING_PARSERS)}"
        )
    default = _STARTS_INSIDE[name]

    def make(prompt: str) -> ReasoningParser:
        end = prompt.rstrip(WHITESPACE)
        if end.endswith((OPEN, CLOSE)):
            return ThinkParser(end.endswith(OPEN))
        return ThinkParser(default)

    return make
