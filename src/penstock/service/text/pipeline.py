"""One choice's way from token ids to events: detokenize, stop strings, reasoning, tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.service.text.detokenizer import Detokenizer, make_detokenizer
from penstock.service.text.events import ContentDelta, OutputEvent
from penstock.service.text.reasoning import ReasoningParser
from penstock.service.text.stops import StopChecker
from penstock.service.text.tokenizer import Tokenizer
from penstock.service.text.tools import IdFactory, ToolParser

#: How much of the prompt's end a reasoning parser gets to see.
_PROMPT_END_TOKENS = 32


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a request wants done with its text; names as in vLLM.

    Stop strings are not looked for in the first `min_tokens` tokens. The parsers are made anew for
    each choice: `reasoning` from the prompt's end, `tools` from the choice's ids for calls.
    """

    stops: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    reasoning: Callable[[str], ReasoningParser] | None = None
    tools: Callable[[IdFactory], ToolParser] | None = None


_PLAIN_TEXT = OutputOptions()


class OutputPipeline:
    """`push` each delta's ids, `finish` after the last.

    A push that completes a stop string sets `stop_string` and ends the text: it returns everything
    up to there, and what is pushed after it is ignored. `num_tokens` counts the tokens of the
    answer: all pushed, up to and including the one that completed the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        options: OutputOptions = _PLAIN_TEXT,
        *,
        new_call_id: IdFactory | None = None,
    ) -> None:
        self._stops = (
            StopChecker(options.stops, options.include_stop_str_in_output)
            if options.stops
            else None
        )
        self._reasoning: ReasoningParser | None = None
        if options.reasoning is not None:
            end = tokenizer.decode(prompt_ids[-_PROMPT_END_TOKENS:], skip_special_tokens=False)
            self._reasoning = options.reasoning(end)
        self._tools: ToolParser | None = None
        if options.tools is not None:
            assert new_call_id is not None, "a tool parser needs ids for its calls"
            self._tools = options.tools(new_call_id)
        self._include_stop_token = options.include_stop_str_in_output
        self._min_tokens = options.min_tokens
        self._plain = self._stops is None and self._reasoning is None and self._tools is None
        self._detokenizer = self._make_detokenizer(tokenizer, prompt_ids, options)
        self._finished = False
        self.num_tokens = 0
        #: The stop string that ended the text.
        self.stop_string: str | None = None

    @property
    def num_tool_calls(self) -> int:
        return self._tools.num_calls if self._tools is not None else 0

    def push(self, ids: Sequence[int], stop_token: int | None = None) -> list[OutputEvent]:
        """`stop_token`: the id that ended the sequence, if one did; it is also the last of `ids`.

        It is left out of the text unless `include_stop_str_in_output`.
        """
        if stop_token is not None and not self._include_stop_token:
            assert ids[-1] == stop_token, "a stop token is the last of its row"
            events = self.push(ids[:-1])
            self.num_tokens += self.stop_string is None
            return events
        if self._plain:  # the hot path: nothing but text
            self.num_tokens += len(ids)
            text = self._detokenizer.push(ids)
            return [ContentDelta(text)] if text else []
        if self._stops is None:
            self.num_tokens += len(ids)
            return self._parse(self._detokenizer.push(ids))
        events = self._parse(self._up_to_stop(self._stops, ids))
        return events if self.stop_string is None else events + self.finish()

    def finish(self) -> list[OutputEvent]:
        """Everything held back. A second call, or one after a stop string, yields nothing."""
        if self._finished:
            return []
        self._finished = True
        text = ""
        if self.stop_string is None:
            text = self._detokenizer.finish()
            if self._stops is not None:
                text, self.stop_string = self._stops.push(text)
                text += self._stops.flush()
        events = self._parse(text)
        if self._reasoning is not None:
            for event in self._reasoning.finish():
                events += self._parse_tools(event)
        if self._tools is not None:
            events += self._tools.finish()
        return events

    def _up_to_stop(self, stops: StopChecker, ids: Sequence[int]) -> str:
        """A token at a time, so that the one that completes a stop string is known."""
        out: list[str] = []
        for token_id in ids:
            if self.stop_string is not None:
                break
            self.num_tokens += 1
            text = self._detokenizer.push((token_id,))
            if self.num_tokens > self._min_tokens:
                text, self.stop_string = stops.push(text)
            out.append(text)
        return "".join(out)

    def _parse(self, text: str) -> list[OutputEvent]:
        if not text:
            return []
        if self._reasoning is None:
            return self._parse_tools(ContentDelta(text))
        events: list[OutputEvent] = []
        for event in self._reasoning.push(text):
            events += self._parse_tools(event)
        return events

    def _parse_tools(self, event: OutputEvent) -> list[OutputEvent]:
        """Calls stand in the answer only, never in the reasoning."""
        if self._tools is None or not isinstance(event, ContentDelta):
            return [event]
        return list(self._tools.push(event.text))

    def _make_detokenizer(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], options: OutputOptions
    ) -> Detokenizer:
        tags = [tag for parser in (self._reasoning, self._tools) if parser for tag in parser.tags]
        keep = {tokenizer.token_to_id(tag) for tag in tags} - {None}
        return make_detokenizer(
            tokenizer,
            prompt_ids,
            skip_special_tokens=options.skip_special_tokens,
            keep=frozenset(token_id for token_id in keep if token_id is not None),
        )
