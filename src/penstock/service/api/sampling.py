"""From a request's fields to the engine's `SamplingParams`: defaults, and what contradicts what."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from penstock.protocol.errors import ContextLengthExceeded, InvalidRequest, UnsupportedFeature
from penstock.protocol.instance import InstanceCard
from penstock.protocol.request import SamplingParams
from penstock.service.api.requests import GenerationRequest

#: What a checkpoint's generation_config.json may set for requests that do not, as in vLLM.
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
#: `SamplingParams.seed` is what a counter-based generator is keyed with: 63 bits.
_SEED_MASK = 2**63 - 1


class Seeds:
    """Seeds for requests that bring none. `seed` makes the sequence of them repeatable."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed) if seed is not None else random.SystemRandom()

    def next(self) -> int:
        return self._random.getrandbits(63)


def check_common(request: GenerationRequest) -> None:
    """Fields that contradict each other, or ask for what nobody does here."""
    if request.store:
        raise UnsupportedFeature("'store' is not supported: nothing is kept here", param="store")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequest(
            "'prompt_logprobs' cannot be streamed: leave 'stream' out", param="prompt_logprobs"
        )


class TextOptions(TypedDict):
    """The options of `Texts.pipeline` that every generation request has."""

    stops: tuple[str, ...]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    min_tokens: int


def text_options(request: GenerationRequest) -> TextOptions:
    """What the request wants done with its text."""
    stop = request.stop
    return TextOptions(
        stops=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        min_tokens=request.min_tokens or 0,
    )


def make_sampling(
    request: GenerationRequest,
    *,
    card: InstanceCard,
    defaults: Mapping[str, Any],
    max_tokens: int | None,
    prompt_tokens: int,
    max_tokens_param: str,
    prompt_param: str,
    logprobs: int | None,
    prompt_logprobs: int | None,
    seed: int,
) -> SamplingParams:
    """Raises `ContextLengthExceeded` or `InvalidRequest`; `seed` is for a request without one."""
    max_tokens = fit_context(
        max_tokens, prompt_tokens, card.max_model_len, max_tokens_param, prompt_param
    )
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens ({min_tokens}) is more than the {max_tokens} tokens there may be",
            param="min_tokens",
        )
    given = {name: getattr(request, name) for name in DEFAULTED}
    found = {k: defaults.get(k) if v is None else v for k, v in given.items()}
    chosen: dict[str, Any] = {k: v for k, v in found.items() if v is not None}
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0
    stop_ids = tuple(request.stop_token_ids or ())
    check_ids(stop_ids, card.vocab_size, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias, card.vocab_size),
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=stop_ids,
        seed=seed if request.seed is None else request.seed & _SEED_MASK,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **chosen,
    )


def usable_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling defaults of a checkpoint; nulls say nothing, top_k and the rest are numbers."""
    found = {name: generation_config.get(name) for name in DEFAULTED}
    out: dict[str, Any] = {k: v for k, v in found.items() if isinstance(v, (int, float))}
    if "top_k" in out:
        out["top_k"] = max(0, int(out["top_k"]))
    return out


def fit_context(
    max_tokens: int | None,
    prompt_tokens: int,
    max_model_len: int,
    param: str,
    prompt_param: str,
) -> int:
    """How many tokens may be generated: what was asked for, or all that the context leaves."""
    if prompt_tokens >= max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens, the model's context {max_model_len} "
            "(one of them for the answer at least): shorten the prompt",
            param=prompt_param,
        )
    if max_tokens is None:
        return max_model_len - prompt_tokens
    if prompt_tokens + max_tokens > max_model_len:
        raise ContextLengthExceeded(
            f"the model's context is {max_model_len} tokens, but the prompt ({prompt_tokens}) and "
            f"{param} ({max_tokens}) ask for {prompt_tokens + max_tokens}: reduce either",
            param=param,
        )
    return max_tokens


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        worst = max(ids) if max(ids) >= vocab_size else min(ids)
        raise InvalidRequest(
            f"token id {worst} in '{param}' is not in the vocabulary (0 to {vocab_size - 1})",
            param=param,
        )


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    out: dict[int, float] = {}
    for key, value in (bias or {}).items():
        # int() would take " 7" and "1_0" too.
        if not (key.isascii() and key.isdigit()) or len(key) > 10:
            raise InvalidRequest(f"'{key[:40]}' is not a token id", param="logit_bias")
        out[int(key)] = value
    check_ids(tuple(out), vocab_size, "logit_bias")
    return out
