"""What becomes of a choice's text: the events that the output pipeline yields.

They are plain data, cheap to make (one or two for every token), and read by the API alone.
"""

from __future__ import annotations

import msgspec


class ContentDelta(msgspec.Struct, frozen=True, gc=False):
    """More of the answer itself."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    """More of what the model thinks aloud (`reasoning_content`)."""

    text: str


class ToolCallStart(msgspec.Struct, frozen=True, gc=False):
    """A tool call begins; `index` counts the calls of the choice from 0."""

    index: int
    id: str
    name: str


class ToolCallDelta(msgspec.Struct, frozen=True, gc=False):
    """More of the JSON text of call `index`'s arguments; the parts concatenate to all of it."""

    index: int
    arguments: str


ContentEvent = ContentDelta
ToolEvent = ToolCallStart | ToolCallDelta
OutputEvent = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallDelta


def merged(events: list[OutputEvent]) -> list[OutputEvent]:
    """Neighbouring deltas of one kind joined: the form in which two parses can be compared."""
    out: list[OutputEvent] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            out[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            out[-1] = ReasoningDelta(last.text + event.text)
        elif (
            isinstance(event, ToolCallDelta)
            and isinstance(last, ToolCallDelta)
            and last.index == event.index
        ):
            out[-1] = ToolCallDelta(last.index, last.arguments + event.arguments)
        else:
            out.append(event)
    return out
