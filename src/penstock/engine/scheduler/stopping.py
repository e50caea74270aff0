"""When a sequence ends."""

from __future__ import annotations

from collections.abc import Container
from typing import Literal, NamedTuple

from penstock.protocol.request import SamplingParams


class Stop(NamedTuple):
    reason: Literal["stop", "length", "handover"]
    token: int | None = None  # the id that ended it, if one did


def check_stop(
    sampling: SamplingParams,
    eos_token_ids: Container[int],
    last_id: int,
    num_output_tokens: int,
    num_tokens_left: int,
    constrained: bool = False,
    hands_over: bool = False,
) -> Stop | None:
    """Does the sequence end with `last_id`, the `num_output_tokens`-th token of its output?

    `num_tokens_left` counts what its limits (max_tokens, max_model_len) still allow. A stop token
    wins over a limit that is reached with the same token. Below `min_tokens` no token stops; the
    sampler masks stop tokens there as well, so this only matters for a runner that does not.
    `ignore_eos` concerns end-of-sequence ids alone: ids the caller asked for in `stop_token_ids`
    still stop, even when one of them is the eos id (as in vLLM). A `constrained` output that has
    reached eos is complete: its grammar allows nothing else, so neither ignore_eos nor min_tokens
    can make it go on. Who `hands_over` goes on elsewhere, unless this was the end.
    """
    if constrained and last_id in eos_token_ids:
        return Stop("stop", last_id)
    if num_output_tokens >= sampling.min_tokens:
        is_eos = not sampling.ignore_eos and last_id in eos_token_ids
        if is_eos or last_id in sampling.stop_token_ids:
            return Stop("stop", last_id)
    if num_tokens_left <= 0:
        return Stop("length")
    return Stop("handover") if hands_over else None
