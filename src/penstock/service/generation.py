"""The border between the API (text) and the service's core (tokens).

The API turns an HTTP request into a `GenerationSpec`, submits it to a `Generator`, and reads
`TokenDelta`s from the `TokenStream` until each choice has had its terminal delta.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from penstock.protocol.errors import ErrorInfo
from penstock.protocol.instance import InstanceCard
from penstock.protocol.request import Constraint, RequestClass, SamplingParams
from penstock.protocol.tokens import FinishReason, TokenLogprobs

if TYPE_CHECKING:
    from penstock.service.operations import Operations


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """`sampling.seed` is already fixed (drawn by the API when the caller gave none)."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    n: int = 1
    constraint: Constraint | None = None
    request_class: RequestClass = "online"
    priority: int = 0
    cache_salt: str = ""
    total_budget_s: float | None = None
    #: Wanted times to the first token and between two; what cannot meet the first is refused early.
    #: None: the service's defaults.
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None

    def with_slos(self, ttft_slo_s: float | None, tpot_slo_s: float | None) -> GenerationSpec:
        """With these where it says nothing of its own; only online requests have any."""
        if self.request_class != "online" or (ttft_slo_s is None and tpot_slo_s is None):
            return self
        return replace(
            self,
            ttft_slo_s=ttft_slo_s if self.ttft_slo_s is None else self.ttft_slo_s,
            tpot_slo_s=tpot_slo_s if self.tpot_slo_s is None else self.tpot_slo_s,
        )


class TokenDelta(msgspec.Struct, frozen=True, gc=False):
    """New tokens of one choice. Exactly one delta of each choice has `finish` set, its last.

    `ids` includes the token that stopped it (`stop_token`), which the API leaves out of the text.
    `finish == "error"` comes with `error`; `prompt_logprobs` arrive before the choice's first ids,
    in order, for prompt positions 1, 2, ...; `cached_tokens` counts on the first delta, and so does
    `queued_s`: how long the sequence waited in the engine's queue, where the engine says so.
    """

    choice: int
    ids: list[int]
    finish: FinishReason | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    error: ErrorInfo | None = None
    queued_s: float | None = None


class TokenStream(Protocol):
    async def next(self) -> list[TokenDelta]:
        """Wait for at least one delta; return all that have gathered. Empty after the end."""

    def cancel(self, choice: int | None = None) -> None:
        """Stop one choice, or all. Idempotent; a cancelled choice yields no further delta."""


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What `/health` and `/metrics` say beyond what they count themselves."""

    live: bool
    ready: bool  # an instance has produced a real token
    reason: str = ""
    queue_depth: int = 0
    instances: list[dict[str, object]] = field(default_factory=list)
    #: Sequences that went on elsewhere after they had lost an instance, since the start.
    num_resumed: int = 0
    #: What a service knows of itself and its cluster, under the names that `service/report.py`
    #: reads: service, policy, routers, leader, ttft_slo_s, tpot_slo_s, handovers, migrated, ...
    facts: dict[str, Any] = field(default_factory=dict)


class Generator(Protocol):
    """Implemented by the service's driver (`service/driver.py`) and by fakes in tests."""

    @property
    def card(self) -> InstanceCard | None:
        """The card of (any) attached instance: max_model_len, vocab_size, ...; None before one."""

    def submit(self, spec: GenerationSpec) -> TokenStream:
        """Raises `Overloaded` when the queue is full, `EngineUnavailable` when nothing can run."""

    def status(self) -> ServiceStatus: ...

    @property
    def operations(self) -> Operations:
        """What /admin asks and orders."""
