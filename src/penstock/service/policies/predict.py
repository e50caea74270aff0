"""How long it will take: time to first token (TTFT) and time per output token (TPOT) by instance.

Everything is computed from the cost model that each instance fits to its own steps, over arrays of
all instances at once. A step of the engine has `step_tokens` of budget. Sequences that decode take
one token of it each, prompts share what is left, in order of arrival. So a request that arrives
with Q tokens queued before it and n of its own to compute waits for

    steps = ceil((Q + n) / (step_tokens - running))

steps. Each costs what it costs with the running sequences in it, and to that comes what all the
prompt tokens cost by themselves. docs/design/policies.md has the formulas in full.

What an instance says of itself is not believed when it has seen too few steps, when its cost model
misses by too much, or when TTFTs predicted from it have been wrong of late: it is then compared by
its tokens alone, at the mean speed of those that are believed ("least load").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.policies.view import Bools, ClusterView, Floats

#: Steps that a fit must have seen, its mean error as a share of a full step, and the mean relative
#: error of TTFT predictions: beyond these an instance is compared by its tokens.
MIN_STEPS = 8.0
MAX_RESIDUAL_SHARE = 0.5
MAX_TTFT_ERROR = 1.0


@dataclass(frozen=True, slots=True)
class Speeds:
    """Cost coefficients fit for use: none negative, and those of the fleet where an instance's own
    are not believed. Arrays of length I, seconds."""

    base_s: Floats
    token_s: Floats
    row_s: Floats
    #: Reading one token of context for one new token, by sum over rows and by product.
    context_s: Floats
    attention_s: Floats
    ratio: Floats
    believed: Bools


def speeds(view: ClusterView) -> Speeds:
    token_s = np.maximum(view.per_token_s, 0.0)
    base_s = np.maximum(view.base_s, 0.0)
    full_step_s = base_s + token_s * view.step_tokens
    believed = (view.num_steps >= MIN_STEPS) & (view.residual_s <= MAX_RESIDUAL_SHARE * full_step_s)
    if view.ttft_error is not None:
        believed &= view.ttft_error <= MAX_TTFT_ERROR
    row_s = np.maximum(view.per_row_s, 0.0)
    context_s = np.maximum(view.per_context_token_s, 0.0)
    attention_s = np.maximum(view.per_attention_s, 0.0)
    ratio = view.ttft_ratio
    if not believed.all():
        fleet = believed if believed.any() else view.num_steps > 0
        doubted = ~believed
        token_s, base_s, row_s, context_s, attention_s = (
            np.where(doubted, float(own[fleet].mean()) if fleet.any() else 0.0, own)
            for own in (token_s, base_s, row_s, context_s, attention_s)
        )
        ratio = np.where(doubted, 1.0, ratio)
    return Speeds(base_s, token_s, row_s, context_s, attention_s, ratio, believed)


@dataclass(frozen=True, slots=True)
class Queues:
    """What a newcomer finds on each instance. Arrays of length I."""

    #: Until the device is free for it, were it to bring no tokens.
    queue_s: Floats
    #: A step with the running sequences alone, and the prompt tokens that fit in beside them.
    step_s: Floats
    room: Floats
    #: Tokens queued before it, whole steps of which are in `queue_s`.
    queued_tokens: Floats
    queue_steps: Floats


def queues(view: ClusterView, s: Speeds, num_tokens: int, output_tokens: int) -> Queues:
    """`num_tokens`, `output_tokens`: of the newcomer, for whether it finds a slot and blocks."""
    running = view.running
    step_s = s.base_s + running * (s.row_s + s.token_s)
    step_s += view.running_tokens * (s.context_s + s.attention_s)
    room = np.maximum(view.step_tokens - running, 1.0)
    queued = view.queued
    mean = view.queued_tokens / np.maximum(queued, 1.0)
    steps = np.floor(view.queued_tokens / room)
    # A prompt of length L in chunks of c reads about L (L + c) / 2 tokens for its L new ones, and
    # (L / c) (L + c) / 2 if each chunk counts once.
    chunk = np.minimum(mean, room)
    read = 0.5 * (mean + chunk)
    queue_s = steps * (step_s + s.row_s) + queued * s.row_s
    queue_s += view.queued_tokens * (s.token_s + read * s.attention_s)
    queue_s += view.queued_tokens / np.maximum(chunk, 1.0) * read * s.context_s
    busy = (running + queued) > 0
    queue_s += np.maximum(view.step_left_s, 0.5 * step_s * busy)
    queue_s += (
        _departures(view, num_tokens) * step_s * max(output_tokens, 1) / np.maximum(running, 1.0)
    )
    return Queues(queue_s, step_s, room, view.queued_tokens, steps)


def _departures(view: ClusterView, num_tokens: int) -> Floats:
    """How many running sequences must end before there are a slot and blocks for a newcomer."""
    slots = view.running + view.queued + (1.0 - view.max_running)
    missing = (num_tokens + view.queued_tokens) / BLOCK_TOKENS - view.free_blocks
    if missing.max() > 0.0:
        each = np.maximum(view.running_tokens / np.maximum(view.running, 1.0), BLOCK_TOKENS)
        slots = np.maximum(slots, missing * BLOCK_TOKENS / each)
    departures: Floats = np.maximum(slots, 0.0)
    return departures


def prefill_s(s: Speeds, q: Queues, num_tokens: int, hits: Floats | float) -> Floats:
    """Computing what `hits` leading tokens leave to compute, behind the queue. At least one token
    is always computed: the last one's logits are wanted."""
    new = np.maximum(num_tokens - hits, 1.0)
    steps = np.ceil((q.queued_tokens + new) / q.room) - q.queue_steps
    chunk = np.minimum(new, q.room)
    chunks = np.ceil(new / chunk)
    before = (chunks - 1.0) * chunk  # tokens of all chunks but the last
    # Chunk i of size c reads up to hits + i c; the last one reads everything.
    last_reads = num_tokens
    context = (chunks - 1.0) * hits + 0.5 * chunks * before + last_reads
    attention = before * hits + 0.5 * chunk * chunks * before + (new - before) * last_reads
    result: Floats = steps * (q.step_s + s.row_s) + new * s.token_s
    result += context * s.context_s + attention * s.attention_s
    return result


def tpot_s(view: ClusterView, s: Speeds, num_tokens: int) -> Floats:
    """Time per output token on each instance once the newcomer decodes there too: a step with all
    of them, stretched by the share of time that goes to prompts."""
    alone: Floats = s.base_s + (view.running + 1.0) * (s.row_s + s.token_s)
    alone += (view.running_tokens + num_tokens) * (s.context_s + s.attention_s)
    if view.prefill_share is not None:
        alone /= 1.0 - np.minimum(view.prefill_share, 0.95)
    return alone


def tpot_limit_tokens(
    view: ClusterView, s: Speeds, slo_s: float, mean_tokens: Floats | float
) -> Floats:
    """How many tokens of context may run on each instance within a TPOT of `slo_s`, if sequences
    have `mean_tokens` each: TPOT(T) = base + T ((row + token) / mean + context + attention) = slo,
    solved for T. 0 where even an empty step is too slow."""
    per_token_s = (s.row_s + s.token_s) / np.maximum(mean_tokens, 1.0) + s.context_s + s.attention_s
    budget_s = np.full_like(per_token_s, slo_s)
    if view.prefill_share is not None:
        budget_s *= 1.0 - np.minimum(view.prefill_share, 0.95)
    budget_s = np.maximum(budget_s - s.base_s, 0.0)
    unlimited = np.where(budget_s > 0.0, np.inf, 0.0)
    limit: Floats = np.divide(budget_s, per_token_s, out=unlimited, where=per_token_s > 0.0)
    return limit


def tpot_of(view: ClusterView, s: Speeds, num_tokens: int, i: int) -> float:
    """`tpot_s` of one instance."""
    alone = s.base_s[i] + (view.running[i] + 1.0) * (s.row_s[i] + s.token_s[i])
    alone += (view.running_tokens[i] + num_tokens) * (s.context_s[i] + s.attention_s[i])
    if view.prefill_share is not None:
        alone /= 1.0 - min(float(view.prefill_share[i]), 0.95)
    return float(alone)


def why_doubted(view: ClusterView, i: int) -> str:
    if view.num_steps[i] < MIN_STEPS:
        return f"it has measured {int(view.num_steps[i])} steps only"
    if view.ttft_error is not None and view.ttft_error[i] > MAX_TTFT_ERROR:
        return f"its predicted TTFTs were off by {100 * view.ttft_error[i]:.0f}% of late"
    return f"its cost model misses by {1e3 * view.residual_s[i]:.1f} ms a step"
