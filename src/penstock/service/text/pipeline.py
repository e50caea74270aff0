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


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a request wants done with its text; names as in vLLM.

    Stop strings are not looked for in the first `min_tokens` tokens. The parsers are made anew for
    each choice: `reasoning` from the prompt's text, `tools` from the choice's ids for calls.
    """

    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    reasoning: Callable[[str], ReasoningParser] | None = None
    tools: Callable[[IdFactory], ToolParser] | None = None


class OutputPipeline:
    """`push` each delta's ids; after the last, or once `stop_hit` is set, `finish`.

    `num_tokens` counts the tokens that belong to the answer: all pushed, up to and including the
    one that completed a stop string. What is pushed after a hit is ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        options: OutputOptions,
        *,
        prompt_text: str = "",
        new_call_id: IdFactory | None = None,
    ) -> None:
        self._stops = (
            StopChecker(options.stop, options.include_stop_str_in_output) if options.stop else None
        )
        self._reasoning = options.reasoning(prompt_text) if options.reasoning else None
        self._tools: ToolParser | None = None
        if options.tools is not None:
            assert new_call_id is not None, "a tool parser needs ids for its calls"
            self._tools = options.tools(new_call_id)
        self._include_stop_token = options.include_stop_str_in_output
        self._min_tokens = options.min_tokens
        self._plain = self._stops is None and self._reasoning is None and self._tools is None
        self._detokenizer = self._make_detokenizer(tokenizer, prompt_ids, options)
        self.num_tokens = 0
        self.stop_hit: str | None = None

    @property
    def num_tool_calls(self) -> int:
        return self._tools.num_calls if self._tools is not None else 0

    def push(self, ids: Sequence[int], stop_token: int | None = None) -> list[OutputEvent]:
        """`stop_token`: the id that ended the sequence, if one did; it is also the last of `ids`.

        It is left out of the text unless `include_stop_str_in_output`.
        """
        if stop_token is not None:
            assert ids[-1] == stop_token, "a stop token is the last of its row"
            if not self._include_stop_token:
                return self._push_before_stop(ids[:-1])
        if self._plain:  # the hot path: nothing but text
            self.num_tokens += len(ids)
            text = self._detokenizer.push(ids)
            return [ContentDelta(text)] if text else []
        if self._stops is None:
            self.num_tokens += len(ids)
            return self._parse(self._detokenizer.push(ids))
        return self._parse(self._up_to_stop(self._stops, ids))

    def finish(self) -> list[OutputEvent]:
        """Everything held back. Call once."""
        text = ""
        if self.stop_hit is None:
            text = self._detokenizer.finish()
            if self._stops is not None:
                text, self.stop_hit = self._stops.push(text)
                text += self._stops.flush()
        events = self._parse(text)
        if self._reasoning is not None:
            for event in self._reasoning.finish():
                events += self._parse_tools(event)
        if self._tools is not None:
            events += self._tools.finish()
        return events

    def _push_before_stop(self, ids: Sequence[int]) -> list[OutputEvent]:
        events = self.push(ids)
        if self.stop_hit is None:
            self.num_tokens += 1
        return events

    def _up_to_stop(self, stops: StopChecker, ids: Sequence[int]) -> str:
        """A token at a time, so that the one that completes a stop string is known."""
        out: list[str] = []
        for token_id in ids:
            if self.stop_hit is not None:
                break
            self.num_tokens += 1
            text = self._detokenizer.push((token_id,))
            if self.num_tokens > self._min_tokens:
                text, self.stop_hit = stops.push(text)
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
