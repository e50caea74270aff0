"""A chat answer as OpenAI's chunks, or as one document."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from penstock.protocol.tokens import TokenLogprobs
from penstock.service.api.context import Envelope
from penstock.service.api.logprobs import chat_logprobs, prompt_logprobs
from penstock.service.api.requests_chat import ChatRequest, NamedToolChoice
from penstock.service.api.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatFinish,
    ChatLogprobs,
    ChatMessageOut,
    FunctionDelta,
    FunctionOut,
    PromptLogprob,
    ToolCallDeltaOut,
    ToolCallOut,
    Usage,
)
from penstock.service.api.run import Choice, Run, Update
from penstock.service.text.events import (
    ContentDelta,
    OutputEvent,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
)
from penstock.service.text.events import merged as merged_events
from penstock.service.text.tokenizer import Tokenizer

_json = msgspec.json.Encoder()


@dataclass(slots=True)
class _Collected:
    """What has come of one choice."""

    role_sent: bool = False
    called: bool = False
    events: list[OutputEvent] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


class ChatRenderer:
    def __init__(self, envelope: Envelope, request: ChatRequest, tokenizer: Tokenizer) -> None:
        options = request.stream_options
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._num_top = (request.top_logprobs or 0) if request.logprobs else None
        self._num_prompt_top = request.prompt_logprobs
        # OpenAI (and vLLM) say "stop" where one function was forced by name.
        self._named = isinstance(request.tool_choice, NamedToolChoice)
        self._include_usage = bool(options and options.include_usage)
        self._every_usage = bool(options and options.continuous_usage_stats)
        self._choices = [_Collected() for _ in range(request.n or 1)]
        self._plain = self._num_top is None and not self._every_usage
        self._around = (
            [self._around_content(i) for i in range(request.n or 1)] if self._plain else []
        )
        self._run: Run

    def attach(self, run: Run) -> None:
        self._run = run

    # --- streamed ---

    def chunk(self, update: Update) -> bytes:
        events = update.events
        collected = self._choices[update.choice.index]
        if len(events) == 1 and update.finish is None and self._plain and collected.role_sent:
            event = events[0]
            if isinstance(event, ContentDelta):
                before, after = self._around[update.choice.index]
                return before + _json.encode(event.text) + after
        return self._chunks(update, collected)

    def end(self) -> bytes:
        if not self._include_usage:
            return b""
        return self._event([], self._run.usage())

    def _chunks(self, update: Update, collected: _Collected) -> bytes:
        index = update.choice.index
        logprobs = self._logprobs(update.logprobs or None)
        deltas = [_delta(event) for event in merged_events(update.events)]
        collected.called |= any(isinstance(event, ToolCallStart) for event in update.events)
        if logprobs is not None and not deltas:
            deltas = [ChatDelta(content="")]
        out = []
        if (deltas or update.finish) and not collected.role_sent:
            collected.role_sent = True
            starts_with_call = bool(deltas) and deltas[0].tool_calls is not UNSET
            first = ChatDelta(
                role="assistant", content=None if starts_with_call else "", refusal=None
            )
            out.append(self._event([ChatChunkChoice(index, first)], self._running_usage()))
        for delta in deltas:
            out.append(
                self._event([ChatChunkChoice(index, delta, logprobs)], self._running_usage())
            )
            logprobs = None
        if update.finish is not None:
            last = ChatChunkChoice(
                index,
                ChatDelta(),
                finish_reason=self._finish_reason(update.finish, collected),
                stop_reason=update.choice.stop_reason,
            )
            out.append(self._event([last], self._running_usage()))
        return b"".join(out)

    def _around_content(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the JSON text of the content in the commonest chunk."""
        mark = "\x00"  # JSON-escaped, so that it can be found again
        delta = ChatDelta(content=mark)
        event = self._event([ChatChunkChoice(index, delta)], self._running_usage())
        before, _, after = event.partition(_json.encode(mark))
        return before, after

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> bytes:
        chunk = ChatCompletionChunk(**self._envelope, choices=choices, usage=usage)
        return b"data: " + _json.encode(chunk) + b"\n\n"

    def _running_usage(self) -> Usage | UnsetType | None:
        """On every chunk: vLLM's running count, OpenAI's null, or nothing."""
        if self._every_usage:
            return self._run.usage()
        return None if self._include_usage else UNSET

    # --- whole ---

    def collect(self, update: Update) -> None:
        collected = self._choices[update.choice.index]
        collected.events += update.events
        collected.logprobs += update.logprobs or ()
        collected.prompt_logprobs += update.prompt_logprobs or ()

    def whole(self) -> bytes:
        run = self._run
        choices = [self._choice(choice) for choice in run.choices]
        prompt: list[PromptLogprob] | UnsetType = UNSET
        if self._num_prompt_top is not None:
            entries = self._choices[0].prompt_logprobs
            prompt = prompt_logprobs(entries, self._num_prompt_top, self._tokenizer)
        return _json.encode(
            ChatCompletion(
                **self._envelope, choices=choices, usage=run.usage(), prompt_logprobs=prompt
            )
        )

    def _choice(self, choice: Choice) -> ChatChoice:
        collected = self._choices[choice.index]
        message = _message(collected.events)
        collected.called = message.tool_calls is not UNSET
        assert choice.finish is not None
        return ChatChoice(
            choice.index,
            message,
            None if self._num_top is None else self._logprobs(collected.logprobs),
            self._finish_reason(choice.finish, collected),
            choice.stop_reason,
        )

    # --- both ---

    def _logprobs(self, entries: list[TokenLogprobs] | None) -> ChatLogprobs | None:
        if self._num_top is None or entries is None:
            return None
        return chat_logprobs(entries, self._num_top, self._tokenizer)

    def _finish_reason(self, finish: str, collected: _Collected) -> ChatFinish:
        if finish == "length":
            return "length"
        return "tool_calls" if collected.called and not self._named else "stop"


def _delta(event: OutputEvent) -> ChatDelta:
    if isinstance(event, ContentDelta):
        return ChatDelta(content=event.text)
    if isinstance(event, ReasoningDelta):
        return ChatDelta(reasoning_content=event.text)
    if isinstance(event, ToolCallStart):
        function = FunctionDelta(name=event.name, arguments="")
        call = ToolCallDeltaOut(event.index, event.id, "function", function)
        return ChatDelta(tool_calls=[call])
    function = FunctionDelta(arguments=event.arguments)
    return ChatDelta(tool_calls=[ToolCallDeltaOut(event.index, function=function)])


def _message(events: list[OutputEvent]) -> ChatMessageOut:
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCallOut] = []
    for event in merged_events(events):
        if isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, ReasoningDelta):
            reasoning.append(event.text)
        elif isinstance(event, ToolCallStart):
            calls.append(ToolCallOut(id=event.id, function=FunctionOut(event.name, "")))
        elif isinstance(event, ToolCallDelta):
            calls[event.index].function.arguments += event.arguments
    text = "".join(content)
    return ChatMessageOut(
        content=None if calls and not text else text,
        reasoning_content="".join(reasoning) if reasoning else UNSET,
        tool_calls=calls or UNSET,
    )
