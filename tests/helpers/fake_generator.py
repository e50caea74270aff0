"""A `Generator` without an engine: scripted text, token by token, through a real tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.protocol.errors import EngineFailed, Overloaded, PenstockError
from penstock.protocol.instance import InstanceCard, Load
from penstock.protocol.kv import KvLayout
from penstock.protocol.tokens import FinishReason, TokenLogprobs
from penstock.service.generation import GenerationSpec, ServiceStatus, TokenDelta
from penstock.service.operations import NO_OPERATIONS, Operations
from penstock.service.text.tokenizer import Tokenizer

#: What choice k of a request answers.
Script = Callable[[GenerationSpec, int], str]


@dataclass
class Behaviour:
    """How the fake misbehaves; tests change it while it runs."""

    script: Script = lambda spec, choice: "Hello, world."
    #: Tokens in one delta, and seconds (of the loop) between deltas.
    tokens_a_delta: int = 1
    pause_s: float = 0.0
    #: Raised by `submit`.
    refuse: PenstockError | None = None
    #: End each choice with this after so many tokens.
    fail_after: int | None = None
    failure: PenstockError = field(default_factory=lambda: EngineFailed("a step raised"))
    #: Produce nothing until it is set.
    gate: asyncio.Event | None = None
    ready: bool = True
    cached_tokens: int = 0
    queued_s: float | None = None
    max_queue: int = 1_000_000


class FakeGenerator:
    def __init__(self, tokenizer: Tokenizer, *, max_model_len: int = 512) -> None:
        self.tokenizer = tokenizer
        self.operations: Operations = NO_OPERATIONS
        self.behaviour = Behaviour()
        self.specs: list[GenerationSpec] = []
        self.streams: list[FakeStream] = []
        self._card = InstanceCard(
            name="fake-0",
            incarnation=1,
            pid=1,
            model="fake",
            model_digest="0123456789abcdef",
            vocab_size=tokenizer.vocab_size,
            max_model_len=max_model_len,
            dtype="float32",
            device="cpu",
            layout=KvLayout(1, 1, 8, 16, "float32", 1024),
            num_blocks=100,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            kernels={"attention": "fake"},
        )

    @property
    def card(self) -> InstanceCard | None:
        return self._card if self.behaviour.ready else None

    @property
    def num_live(self) -> int:
        return sum(not stream.ended for stream in self.streams)

    def submit(self, spec: GenerationSpec) -> FakeStream:
        behaviour = self.behaviour
        if behaviour.refuse is not None:
            raise behaviour.refuse
        if self.num_live >= behaviour.max_queue:
            raise Overloaded("the queue is full", retry_after_s=2.5)
        self.specs.append(spec)
        stream = FakeStream(spec, self.tokenizer, behaviour)
        self.streams.append(stream)
        return stream

    def status(self) -> ServiceStatus:
        load = Load(
            instance="fake-0", incarnation=1, number=1, step=7, step_end_in_s=0.0,
            waiting={"online": 1}, running={"online": 2}, waiting_tokens=3, running_tokens=4,
            kv_blocks_used=25, kv_blocks_cached=5, kv_blocks_total=100, preemptions=6,
            prefix_hit_tokens=160, prefix_query_tokens=320, steps=7, cost=self._card.cost,
        )  # fmt: skip
        instance: dict[str, object] = {
            "name": "fake-0", "state": "active", "card": self._card, "load": load,
        }  # fmt: skip
        reason = "" if self.behaviour.ready else "no engine has produced a token yet"
        return ServiceStatus(True, self.behaviour.ready, reason, self.num_live, [instance])


class FakeStream:
    """Each `next` is one step: a delta for each choice that still runs."""

    def __init__(self, spec: GenerationSpec, tokenizer: Tokenizer, behaviour: Behaviour) -> None:
        self.spec = spec
        self.cancelled: list[int | None] = []
        self._behaviour = behaviour
        self._steps = 0
        self._wake = asyncio.Event()
        self._rest = {k: self._ids(tokenizer, k) for k in range(spec.n)}
        self._done = dict.fromkeys(self._rest, 0)
        self._open = list(self._rest)
        self._stops = {*spec.sampling.stop_token_ids}
        if not spec.sampling.ignore_eos:
            self._stops |= set(tokenizer.eos_token_ids)

    def _ids(self, tokenizer: Tokenizer, choice: int) -> list[int]:
        ids = tokenizer.encode(self._behaviour.script(self.spec, choice), False)
        return [*ids, tokenizer.eos_token_ids[0]]

    @property
    def ended(self) -> bool:
        return not self._open

    async def next(self) -> list[TokenDelta]:
        behaviour = self._behaviour
        if self._open and behaviour.gate is not None:
            await self._unless_cancelled(behaviour.gate.wait())
        if self._open and self._steps:
            await self._unless_cancelled(asyncio.sleep(behaviour.pause_s))
        self._steps += 1
        return [self._step(choice) for choice in list(self._open)]

    async def _unless_cancelled(self, what: object) -> None:
        tasks = [asyncio.ensure_future(what), asyncio.ensure_future(self._wake.wait())]  # type: ignore[arg-type]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def cancel(self, choice: int | None = None) -> None:
        self.cancelled.append(choice)
        self._open = [k for k in self._open if choice is not None and k != choice]
        if not self._open:
            self._wake.set()

    def _step(self, choice: int) -> TokenDelta:
        behaviour, sampling = self._behaviour, self.spec.sampling
        done = self._done[choice]
        if behaviour.fail_after is not None and done >= behaviour.fail_after:
            self._open.remove(choice)
            return TokenDelta(choice, [], "error", error=behaviour.failure.info())
        ids: list[int] = []
        finish: FinishReason | None = None
        stop_token = None
        while len(ids) < behaviour.tokens_a_delta and finish is None:
            token_id = self._rest[choice].pop(0) if self._rest[choice] else 0
            ids.append(token_id)
            if token_id in self._stops and done + len(ids) > sampling.min_tokens:
                finish, stop_token = "stop", token_id
            elif done + len(ids) == sampling.max_tokens:
                finish = "length"
        self._done[choice] += len(ids)
        if finish is not None:
            self._open.remove(choice)
        return TokenDelta(
            choice,
            ids,
            finish,
            stop_token,
            logprobs=logprobs_of(ids, sampling.logprobs),
            prompt_logprobs=(
                logprobs_of(self.spec.prompt_ids[1:], sampling.prompt_logprobs)
                if done == 0
                else None
            ),
            cached_tokens=behaviour.cached_tokens if done == 0 else 0,
            queued_s=behaviour.queued_s if done == 0 else None,
        )


def logprobs_of(ids: Sequence[int], num_top: int | None) -> list[TokenLogprobs] | None:
    """The token itself is always the likeliest; the alternatives are ids 1, 2, ..."""
    if num_top is None:
        return None
    others = range(1, num_top)
    return [
        TokenLogprobs(
            token_id,
            -0.5,
            1,
            [token_id, *others][:num_top],
            [-0.5, *(-1.0 - k for k in others)][:num_top],
        )
        for token_id in ids
    ]
