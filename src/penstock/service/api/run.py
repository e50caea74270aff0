"""One HTTP request's generation: its token streams, the text of each choice, and their ends.

`Run` is what both endpoints drive, streamed or not:

    run = Run(jobs, generator, metrics)
    while updates := await run.next():
        ...  # each Update is what one choice has gained

It submits everything or nothing, counts usage, and is closed exactly once, whatever happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.protocol.errors import EngineFailed, RequestCancelled, from_info
from penstock.protocol.tokens import TokenLogprobs
from penstock.service.api.errors import ClientDisconnected
from penstock.service.api.merge import merged_stream
from penstock.service.api.responses import PromptTokensDetails, Usage
from penstock.service.generation import GenerationSpec, Generator, TokenDelta
from penstock.service.metrics import Metrics, RequestMetrics
from penstock.service.text.events import OutputEvent, ToolCallDelta, ToolCallStart
from penstock.service.text.pipeline import OutputPipeline
from penstock.service.tracing import NO_TRACING, RequestTrace

NO_EVENTS: list[OutputEvent] = []


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt: what to submit, and how the tokens of choice k become text."""

    spec: GenerationSpec
    make_pipeline: Callable[[int], OutputPipeline]
    include_stop: bool = False
    #: False: a second tool call ends the choice instead.
    parallel_tool_calls: bool = True
    #: The engine generates one token at least; here it is thrown away (echo with max_tokens 0).
    prompt_only: bool = False


@dataclass(slots=True)
class Update:
    """What one choice has gained since the last one. `finish` is set on the choice's last."""

    choice: Choice
    events: list[OutputEvent]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish: str | None = None


@dataclass(slots=True, eq=False)
class Choice:
    index: int
    job: Job
    pipeline: OutputPipeline
    metrics: RequestMetrics
    num_tokens: int = 0
    finish: str | None = None
    #: The stop string or stop token id that ended it; None for EOS and for length.
    stop_reason: int | str | None = None

    def feed(self, delta: TokenDelta) -> Update:
        """Raises what the engine reports as an error."""
        ids, pipeline = delta.ids, self.pipeline
        if delta.queued_s is not None:
            self.metrics.on_queue_time(delta.queued_s)
        if delta.finish is not None:
            _raise_failure(delta)
        update = Update(self, NO_EVENTS, None, delta.prompt_logprobs)
        if ids:
            before = pipeline.num_tokens
            update.events = pipeline.push(ids, delta.stop_token)
            self.num_tokens = pipeline.num_tokens
            self.metrics.on_tokens(self.index, len(ids))
            if delta.logprobs is not None:
                shown = self.num_tokens - before
                if delta.stop_token is not None and not self.job.include_stop and shown == len(ids):
                    shown -= 1
                update.logprobs = delta.logprobs[:shown]
        if not self.job.parallel_tool_calls:
            self._only_first_call(update)
        if update.finish is None and (delta.finish is not None or pipeline.stop_string is not None):
            self._finish(delta, update)
        if self.job.prompt_only:
            self.num_tokens, update.events, update.logprobs = 0, NO_EVENTS, None
        if update.finish is not None:
            self.metrics.on_finish(self.index, update.finish)
        return update

    def _finish(self, delta: TokenDelta, update: Update) -> None:
        pipeline = self.pipeline
        update.events = [*update.events, *pipeline.finish()]
        self.finish = "stop" if pipeline.stop_string is not None else delta.finish
        self.stop_reason = pipeline.stop_string
        if self.stop_reason is None and delta.stop_token is not None:
            asked_for = delta.stop_token in self.job.spec.sampling.stop_token_ids
            self.stop_reason = delta.stop_token if asked_for else None
        update.finish = "length" if self.job.prompt_only else self.finish

    def _only_first_call(self, update: Update) -> None:
        for i, event in enumerate(update.events):
            if isinstance(event, (ToolCallStart, ToolCallDelta)) and event.index > 0:
                update.events = update.events[:i]
                update.finish = self.finish = "stop"
                return


def _raise_failure(delta: TokenDelta) -> None:
    if delta.finish == "error":
        error = delta.error
        raise from_info(error) if error else EngineFailed("the engine failed and gave no reason")
    if delta.finish == "cancelled":
        raise RequestCancelled("the request was cancelled on the server")


class Run:
    """Raises what `Generator.submit` raises; then nothing has been left behind."""

    def __init__(
        self,
        jobs: Sequence[Job],
        generator: Generator,
        metrics: Metrics,
        trace: RequestTrace = NO_TRACING,
    ) -> None:
        self.jobs = jobs
        self._generator = generator
        self._trace = trace
        self.metrics = metrics.start_request(
            num_prompt_tokens=[len(job.spec.prompt_ids) for job in jobs],
            n=jobs[0].spec.n,
            max_tokens=jobs[0].spec.sampling.max_tokens,
        )
        self._cached_tokens = [0] * len(jobs)
        self._gone = False
        self._closed = False
        try:
            self.choices = [
                Choice(i * job.spec.n + k, job, job.make_pipeline(k), self.metrics)
                for i, job in enumerate(jobs)
                for k in range(job.spec.n)
            ]
            self._open = len(self.choices)
            trace.accepted()
            self._stream = merged_stream(generator, [job.spec for job in jobs])
        except BaseException:
            self.metrics.close("error")
            trace.end([], "error")
            raise

    @property
    def finished(self) -> bool:
        """Every choice has had its last update."""
        return self._open == 0

    async def next(self) -> list[Update]:
        """Waits for news of any choice; empty once all have finished.

        Raises the engine's error, or `ClientDisconnected` after `disconnect`.
        """
        while self._open:
            deltas = await self._stream.next()
            if self._gone:
                raise ClientDisconnected
            if not deltas:
                raise EngineFailed("the token stream ended before its request did")
            updates = [u for u in map(self._take, _by_choice(deltas)) if u is not None]
            if updates:
                return updates
        return []

    def _take(self, delta: TokenDelta) -> Update | None:
        choice = self.choices[delta.choice]
        if choice.finish is not None:
            return None  # crossed with our own cancel
        if delta.cached_tokens:
            self._cached_tokens[choice.index // choice.job.spec.n] = delta.cached_tokens
        update = choice.feed(delta)
        if update.finish is not None:
            self._open -= 1
            if delta.finish is None:
                self._stream.cancel(choice.index)
        return update

    def disconnect(self) -> None:
        """The client went away: free the engine's rows at once."""
        self._gone = True
        self.close("abort")

    def close(self, reason: str = "error") -> None:
        """Idempotent. Whatever still runs is cancelled, and counted under `reason`."""
        if self._closed:
            return
        self._closed = True
        if self._open:
            self._stream.cancel()
        self.metrics.close(reason, sum(self._cached_tokens))
        if self._trace is not NO_TRACING:
            explain = self._generator.operations.explain
            found = [explain(job.spec.request_id) for job in self.jobs]
            ended = reason if self._open else "stop"
            self._trace.end([one for one in found if one is not None], ended)

    def usage(self) -> Usage:
        prompt = sum(len(job.spec.prompt_ids) for job in self.jobs)
        completion = sum(choice.num_tokens for choice in self.choices)
        cached = PromptTokensDetails(sum(self._cached_tokens))
        return Usage(prompt, prompt + completion, completion, cached)


def _by_choice(deltas: list[TokenDelta]) -> list[TokenDelta]:
    """Deltas of one choice that gathered while nobody looked become one."""
    if len(deltas) == 1:
        return deltas
    found: dict[int, list[TokenDelta]] = {}
    for delta in deltas:
        found.setdefault(delta.choice, []).append(delta)
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in found.values()]


def _joined(parts: list[TokenDelta]) -> TokenDelta:
    last = parts[-1]
    return TokenDelta(
        last.choice,
        [token_id for part in parts for token_id in part.ids],
        last.finish,
        last.stop_token,
        _concatenated([part.logprobs for part in parts]),
        _concatenated([part.prompt_logprobs for part in parts]),
        max(part.cached_tokens for part in parts),
        last.error,
        parts[0].queued_s,
    )


def _concatenated(
    parts: Sequence[list[TokenLogprobs] | None],
) -> list[TokenLogprobs] | None:
    known = [part for part in parts if part is not None]
    return [entry for part in known for entry in part] if known else None
