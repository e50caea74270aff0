"""A completion as OpenAI's chunks, or as one document."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from penstock.protocol.tokens import TokenLogprobs
from penstock.service.api.context import Envelope
from penstock.service.api.logprobs import CompletionLogprobsBuilder, joined, prompt_logprobs
from penstock.service.api.requests_completion import CompletionRequest
from penstock.service.api.responses import (
    Completion,
    CompletionChoice,
    CompletionFinish,
    CompletionLogprobs,
    PromptLogprob,
    Usage,
)
from penstock.service.api.run import Choice, Run, Update
from penstock.service.text.events import ContentDelta, OutputEvent
from penstock.service.text.tokenizer import Tokenizer

_json = msgspec.json.Encoder()


@dataclass(slots=True)
class _Collected:
    """What has come of one choice."""

    builder: CompletionLogprobsBuilder
    text: list[str] = field(default_factory=list)
    logprobs: list[CompletionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    echoed: bool = False


class CompletionRenderer:
    def __init__(
        self,
        envelope: Envelope,
        request: CompletionRequest,
        tokenizer: Tokenizer,
        prompt_texts: list[str],
    ) -> None:
        options = request.stream_options
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._prompt_texts = prompt_texts
        self._n = request.n or 1
        self._echo = bool(request.echo)
        self._wants_logprobs = request.logprobs is not None
        self._num_prompt_top = request.prompt_logprobs
        self._include_usage = bool(options and options.include_usage)
        self._every_usage = bool(options and options.continuous_usage_stats)
        size = self._n * len(prompt_texts)
        self._choices = [
            _Collected(CompletionLogprobsBuilder(request.logprobs or 0, tokenizer))
            for _ in range(size)
        ]
        self._plain = not (self._wants_logprobs or self._every_usage or self._echo)
        self._around = [self._around_text(i) for i in range(size)] if self._plain else []
        self._run: Run

    def attach(self, run: Run) -> None:
        self._run = run

    # --- streamed ---

    def chunk(self, update: Update) -> bytes:
        if self._plain and update.finish is None:
            text = _text(update.events)
            if not text:
                return b""
            before, after = self._around[update.choice.index]
            return before + _json.encode(text) + after
        collected = self._choices[update.choice.index]
        collected.prompt_logprobs += update.prompt_logprobs or ()
        starts = bool(update.choice.num_tokens) or update.finish is not None
        if not starts:
            return b""  # prompt logprobs only: they are echoed with the first token
        text, logprobs = self._gain(update, collected)
        if not text and logprobs is None and update.finish is None:
            return b""
        choice = update.choice
        last = update.finish is not None
        chunk = CompletionChoice(
            choice.index,
            text,
            logprobs,
            _finish_reason(choice) if last else None,
            choice.stop_reason if last else None,
        )
        return self._event([chunk], self._running_usage())

    def end(self) -> bytes:
        return self._event([], self._run.usage()) if self._include_usage else b""

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the JSON text in the commonest chunk."""
        mark = "\x00"  # JSON-escaped, so that it can be found again
        event = self._event([CompletionChoice(index, mark)], self._running_usage())
        before, _, after = event.partition(_json.encode(mark))
        return before, after

    def _event(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> bytes:
        return b"data: " + _json.encode(self._document(choices, usage)) + b"\n\n"

    def _running_usage(self) -> Usage | UnsetType | None:
        if self._every_usage:
            return self._run.usage()
        return None if self._include_usage else UNSET

    # --- whole ---

    def collect(self, update: Update) -> None:
        collected = self._choices[update.choice.index]
        collected.prompt_logprobs += update.prompt_logprobs or ()
        if update.choice.num_tokens or update.finish is not None:
            text, logprobs = self._gain(update, collected)
            collected.text.append(text)
            if logprobs is not None:
                collected.logprobs.append(logprobs)

    def whole(self) -> bytes:
        choices = [self._choice(choice) for choice in self._run.choices]
        return _json.encode(self._document(choices, self._run.usage()))

    def _choice(self, choice: Choice) -> CompletionChoice:
        collected = self._choices[choice.index]
        prompt: list[PromptLogprob] | UnsetType = UNSET
        if self._num_prompt_top is not None:
            entries = collected.prompt_logprobs
            prompt = prompt_logprobs(entries, self._num_prompt_top, self._tokenizer)
        return CompletionChoice(
            choice.index,
            "".join(collected.text),
            joined(collected.logprobs) if self._wants_logprobs else None,
            _finish_reason(choice),
            choice.stop_reason,
            prompt,
        )

    # --- both ---

    def _gain(self, update: Update, collected: _Collected) -> tuple[str, CompletionLogprobs | None]:
        """New text and logprobs; with the first of a choice comes the echo of its prompt."""
        text = _text(update.events)
        parts: list[CompletionLogprobs] = []
        if self._echo and not collected.echoed:
            collected.echoed = True
            text = self._prompt_texts[update.choice.index // self._n] + text
            if self._wants_logprobs:
                parts.append(collected.builder.first(update.choice.job.spec.prompt_ids[0]))
                parts.append(collected.builder.build(collected.prompt_logprobs))
        if self._wants_logprobs and update.logprobs:
            parts.append(collected.builder.build(update.logprobs))
        return text, joined(parts) if parts else None

    def _document(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        return Completion(**self._envelope, choices=choices, usage=usage)


def _finish_reason(choice: Choice) -> CompletionFinish:
    return "length" if choice.finish == "length" else "stop"


def _text(events: list[OutputEvent]) -> str:
    """Without parsers behind it, a pipeline yields nothing but content."""
    return "".join([event.text for event in events if isinstance(event, ContentDelta)])
