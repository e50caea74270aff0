"""What a service asks an instance to do with one sequence.

A user's request with `n` choices is `n` sequences: one `Submit` each, the same `group`, another
`choice`. They share the KV of their prompt through the prefix cache like any two sequences with a
common prefix, so forking needs no mechanism of its own.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.protocol.kv import KvSource

RequestClass = Literal["online", "offline"]
ConstraintKind = Literal["json_schema", "json_object", "regex", "lark", "choice"]
StageName = Literal["encode", "prefill", "decode"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn. Already validated by the service; names follow vLLM.

    `max_tokens` counts output tokens over the whole life of the sequence, those of
    `Submit.resumed_ids` included. `logprobs` is the number of alternatives wanted beside the
    sampled token (0: the sampled token only; None: none at all).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class Constraint(msgspec.Struct, frozen=True):
    """What the output must match. `text` is a JSON document for json_schema and choice (a list)."""

    kind: ConstraintKind
    text: str


class Input(msgspec.Struct, frozen=True):
    """A part of the prompt that is not text, e.g. an image that stands at a span of token ids."""

    kind: str
    start: int
    num_tokens: int
    content_hash: bytes
    reference: str


class Stage(msgspec.Struct, frozen=True):
    """One step of the plan for a request: which instance, under which epoch of its role.

    Where the plan has "decode" on another instance than the one that is told to prefill, that one
    stops after the prompt and the first token, with `finish == "handover"`.
    """

    stage: StageName
    instance: str
    epoch: int = 0


class Submit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="submit"):
    """Run one sequence from where it stands.

    `prompt_ids` and `resumed_ids` stay apart because penalties, min_tokens and max_tokens need the
    border between them. `block_keys` are 16 bytes for each whole block of prompt + resumed ids (see
    `protocol.kv`). `attempt` grows with each placement of the same sequence; rows that answer an
    older attempt are dropped by the service.
    """

    request_id: str
    attempt: int
    service: str
    service_incarnation: int
    prompt_ids: list[int]
    sampling: SamplingParams
    resumed_ids: list[int] = []
    choice: int = 0
    group: str = ""
    block_keys: bytes = b""
    cache_salt: str = ""
    constraint: Constraint | None = None
    request_class: RequestClass = "online"
    priority: int = 0  # lower runs first, as in vLLM
    adapter: str | None = None
    inputs: list[Input] = []
    plan: list[Stage] = []
    #: Who else has leading blocks of it; None: what is not here is computed.
    kv_source: KvSource | None = None
    #: Time left at the moment of sending, by the sender's clock; None: no bound.
    ttft_budget_s: float | None = None
    total_budget_s: float | None = None
    #: While it decodes, steps with prompts in them should take no longer; None: no bound.
    max_step_s: float | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop a sequence. The instance answers with a terminal row, unless it does not know it."""

    request_id: str
    attempt: int
