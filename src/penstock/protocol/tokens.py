"""What an instance tells a service about its sequences: one `Tokens` message a step."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.protocol.errors import ErrorInfo

#: "handover" ends an attempt on an instance that was to prefill only; the sequence itself goes on.
FinishReason = Literal["stop", "length", "cancelled", "error", "handover"]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the token that stands there, then the best alternatives.

    `logprob` is natural log under the model's raw distribution (before temperature and penalties,
    as vLLM's default); `rank` is 1 for the most likely token.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class TokenRow(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sequence.

    `start` is the index of `ids[0]` among the sequence's output tokens (resumed ones counted), so
    that overlap and gaps are seen. `finish` is set exactly once for each attempt, on its last row.
    `stop_token` is the id that ended it, if one did (it is also the last of `ids`).
    `cached_tokens` is meaningful on the first row of an attempt: prompt tokens found in the cache;
    so is `queued_s`, the time from the arrival at the instance to the first step.
    """

    request_id: str
    attempt: int
    start: int
    ids: list[int]
    finish: FinishReason | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    error: ErrorInfo | None = None
    queued_s: float | None = None


class Tokens(msgspec.Struct, frozen=True, tag="tokens", array_like=True):
    """Everything one step produced for one service. `number` counts up by one for each service."""

    instance: str
    incarnation: int
    number: int
    rows: list[TokenRow]


class PromptLogprobs(msgspec.Struct, frozen=True, tag="prompt_logprobs", array_like=True):
    """Log-probabilities of prompt tokens, in chunks as the prefill goes on.

    `positions[i]` is the first prompt index the chunk covers; index 0 has no logprob and is never
    sent. All chunks arrive before the sequence's first `TokenRow`.
    """

    instance: str
    incarnation: int
    request_id: str
    attempt: int
    start: int
    entries: list[TokenLogprobs]


class Credit(msgspec.Struct, frozen=True, tag="credit"):
    """The service has taken in every `Tokens` message up to this number."""

    number: int
