"""`SamplingParams` of the offline API: vLLM's names and defaults, checked when made."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from typing import Any

from penstock.protocol.errors import InvalidRequest
from penstock.protocol.request import Constraint
from penstock.protocol.request import SamplingParams as WireParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw from the model. Raises `InvalidRequest` (a ValueError) naming the parameter.

    `seed` None draws one for each prompt. `top_k` 0 or -1 means all. `max_tokens` None means: up to
    the model's context.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    #: Make the output match: `Constraint("json_schema", ...)`, "regex", "lark", "choice".
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} must be {rule}, got {getattr(self, name)!r}",
                                     param=name)  # fmt: skip

        need(self.n >= 1, "n", "at least 1")
        need(0 <= self.temperature < math.inf, "temperature", "0 or more, and finite")
        need(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(-1 <= self.top_k < 2**31, "top_k", "-1, 0 (all) or more")
        need(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        need(0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0, and finite")
        need(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        need(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        need(self.min_tokens >= 0, "min_tokens", "0 or more")
        need(self.logprobs is None or self.logprobs >= 0, "logprobs", "0 or more")
        need(self.prompt_logprobs is None or self.prompt_logprobs >= 0, "prompt_logprobs",
             "0 or more")  # fmt: skip
        need(all(self.stops), "stop", "made of strings that are not empty")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def on_wire(self, room_tokens: int) -> WireParams:
        """As the protocol has it, for a prompt that leaves room for `room_tokens`."""
        wanted: dict[str, Any] = {
            name: getattr(self, name)
            for name in WireParams.__struct_fields__
            if name not in ("max_tokens", "top_k", "stop_token_ids", "seed")
        }
        max_tokens = room_tokens if self.max_tokens is None else self.max_tokens
        return WireParams(
            max_tokens=min(max_tokens, room_tokens),
            top_k=max(0, self.top_k),
            stop_token_ids=tuple(self.stop_token_ids),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            **wanted,
        )
