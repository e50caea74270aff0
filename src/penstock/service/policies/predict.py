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

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.protocol.instance import PACED_CONTEXT, PACED_TOKENS
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.policies.view import ClusterView, Floats, Speeds, every, some

#: Steps that a fit must have seen, its mean error as a share of a full step, and the mean relative
#: error of TTFT predictions: beyond these an instance is compared by its tokens.
MIN_STEPS = 8.0
MAX_RESIDUAL_SHARE = 0.5
MAX_TTFT_ERROR = 1.0
#: Prompt tokens that a fit must have seen before it is believed about prompts. An instance that
#: decodes only has seen those of its warm-up (64).
MIN_PROMPT_TOKENS = 256.0
#: However much goes to prompts, a step goes on.
MAX_SHARE = 0.95


def speeds(view: ClusterView) -> Speeds:
    """What to compute with. Negative coefficients, which a fit can come to, would make more work
    take less time: they count as 0."""
    token_s = np.maximum(view.per_token_s, 0.0)
    base_s = np.maximum(view.base_s, 0.0)
    row_s = np.maximum(view.per_row_s, 0.0)
    context_s = np.maximum(view.per_context_token_s, 0.0)
    attention_s = np.maximum(view.per_attention_s, 0.0)
    full_step_s = base_s + token_s * view.step_tokens
    believed = (view.num_steps >= MIN_STEPS) & (view.residual_s <= MAX_RESIDUAL_SHARE * full_step_s)
    if view.ttft_error is not None:
        believed &= view.ttft_error <= MAX_TTFT_ERROR
    ratio = view.ttft_ratio
    if not every(believed):
        fleet = believed if some(believed) else view.num_steps > 0
        known = some(fleet)
        token_s, base_s, row_s, context_s, attention_s = (
            np.where(believed, own, own[fleet].mean() if known else 0.0)
            for own in (token_s, base_s, row_s, context_s, attention_s)
        )
        ratio = np.where(believed, ratio, 1.0)
    if view.prompt_tokens is not None:
        knows = view.prompt_tokens >= MIN_PROMPT_TOKENS
        if not every(knows) and some(knows):
            # In steps without prompts, rows and tokens are one number: only their sum is known.
            decode_s = row_s + token_s
            token_s, attention_s = (
                np.where(knows, own, own[knows].mean()) for own in (token_s, attention_s)
            )
            row_s = np.where(knows, row_s, np.maximum(decode_s - token_s, 0.0))
    return Speeds(
        base_s,
        token_s,
        row_s,
        context_s,
        attention_s,
        decode_s=row_s + token_s,
        read_s=context_s + attention_s,
        ratio=ratio,
        believed=believed,
    )


@dataclass(frozen=True, slots=True)
class Queues:
    """What a newcomer finds on each instance. Arrays of length I."""

    #: Until the device is free for it, whole steps of what is queued before it included.
    queue_s: Floats
    #: A step with the running sequences alone; with a prompt's row beside them; and the prompt
    #: tokens that fit in.
    step_s: Floats
    prompt_step_s: Floats
    room: Floats
    #: What is queued beyond whole steps: a share of a step, whose rest the newcomer can use.
    part_step: Floats


def queues(
    view: ClusterView,
    s: Speeds,
    num_tokens: int,
    output_tokens: int,
    max_step_s: float | None = None,
) -> Queues:
    """`num_tokens`, `output_tokens`: of the newcomer, for whether it finds a slot and blocks.
    `max_step_s`: to which steps with prompts are kept where somebody decodes."""
    running, queued, tokens = view.running, view.queued, view.queued_tokens
    step_s = s.base_s + running * s.decode_s + view.running_tokens * s.read_s
    prompt_step_s = step_s + s.row_s
    room = np.maximum(view.step_tokens - running, 1.0)
    if max_step_s is not None:
        paced = np.minimum(room, paced_tokens(view, s, step_s, max_step_s))
        room = np.where(running > 0.0, paced, room)
    steps = tokens / room
    whole_steps = np.floor(steps)
    # A prompt of length L in chunks of c reads (L + c) / 2 tokens on average.
    mean = tokens / np.maximum(queued, 1.0)
    chunk = np.maximum(np.minimum(mean, room), 1.0)
    read = 0.5 * (mean + chunk)
    queue_s = whole_steps * prompt_step_s + queued * s.row_s
    queue_s += tokens * (s.token_s + read * (s.attention_s + s.context_s / chunk))
    # A step is under way wherever there is work. Where nobody knows how far it is, it is half done.
    queue_s += np.maximum(view.step_left_s, 0.5 * step_s * (running + queued > 0.0))
    slots = running + queued
    full = some(slots >= view.max_running)
    if full or float((view.free_blocks - tokens / BLOCK_TOKENS).min()) * BLOCK_TOKENS < num_tokens:
        ends_s = step_s * max(output_tokens, 1) / np.maximum(running, 1.0)
        queue_s += _departures(view, num_tokens) * ends_s
    return Queues(queue_s, step_s, prompt_step_s, room, steps - whole_steps)


def paced_tokens(view: ClusterView, s: Speeds, step_s: Floats, max_step_s: float) -> Floats:
    """Prompt tokens that fit a step beside those that decode (`engine/pace.py`)."""
    each_s = s.token_s + s.attention_s * PACED_CONTEXT
    left_s = max_step_s - step_s
    fit: Floats = np.divide(left_s, each_s, out=np.full_like(left_s, np.inf), where=each_s > 0.0)
    return np.maximum(fit, PACED_TOKENS)


def _departures(view: ClusterView, num_tokens: int) -> Floats:
    """How many running sequences must end before there are a slot and blocks for a newcomer."""
    slots = view.running + view.queued + (1.0 - view.max_running)
    missing = num_tokens + view.queued_tokens - view.free_blocks * BLOCK_TOKENS
    each = np.maximum(view.running_tokens / np.maximum(view.running, 1.0), BLOCK_TOKENS)
    departures: Floats = np.maximum(np.maximum(slots, missing / each), 0.0)
    return departures


def prefill_s(s: Speeds, q: Queues, num_tokens: int, hits: Floats | float) -> Floats:
    """Computing what `hits` leading tokens leave to compute, behind the queue. At least one token
    is always computed: the last one's logits are wanted. `hits` may have more axes before I."""
    new = np.maximum(num_tokens - hits, 1.0)
    steps = new / q.room
    chunks = np.ceil(steps)
    result: Floats = np.ceil(steps + q.part_step) * q.prompt_step_s + new * s.token_s
    # The last chunk reads all tokens; chunk i of m reads (what is new - i * room) fewer.
    fewer = (chunks - 1.0) * (new - 0.5 * q.room * chunks)
    result += num_tokens * (new * s.attention_s + chunks * s.context_s)
    result -= fewer * (q.room * s.attention_s + s.context_s)
    return result


def company_s(
    view: ClusterView, s: Speeds, news: Sequence[int], totals: Sequence[int]
) -> list[float]:
    """Of a view of one instance: how much later each of the sequences queued last there, all at one
    moment, has its token than if it were the last of them: what those behind it compute in its
    step. `news`: tokens that each has to compute, `totals`: tokens that each has, in order."""
    running, queued = float(view.running[0]), float(view.queued[0])
    room = max(float(view.step_tokens[0]) - running, 1.0)
    token_s, row_s = float(s.token_s[0]), float(s.row_s[0])
    read_s, attention_s = float(s.context_s[0]), float(s.attention_s[0])
    ahead = max(float(view.queued_tokens[0]) - sum(news), 0.0)
    longer_s: list[float] = []
    if running == 0.0 and queued <= len(news) and news[0] < room:
        # An idle device starts with the first of them; the others share the step after that.
        alone_s = float(s.base_s[0]) + row_s
        longer_s, news, totals = [0.0], news[1:], totals[1:]
    else:
        alone_s = 0.0
    end = ahead
    for place, new in enumerate(news):
        end += new
        left, more_s = math.ceil(end / room) * room - end, alone_s
        for behind in range(place + 1, len(news)):
            share = min(float(news[behind]), left)
            if share <= 0.0:
                break
            more_s += row_s + share * token_s + totals[behind] * (read_s + share * attention_s)
            left -= share
        longer_s.append(more_s)
    return longer_s


def tpot_s(
    view: ClusterView, s: Speeds, q: Queues, num_tokens: int, max_step_s: float | None = None
) -> Floats:
    """Time per output token on each instance once the newcomer decodes there too: a step with all
    of them, stretched by the share of time that goes to prompts; but where steps are paced for a
    TPOT, no longer than that lets them become."""
    alone: Floats = q.step_s + (s.decode_s + num_tokens * s.read_s)
    if view.prefill_share is None:
        return alone
    stretched: Floats = alone / (1.0 - np.minimum(view.prefill_share, MAX_SHARE))
    if max_step_s is not None:
        stretched = np.minimum(stretched, np.maximum(alone, max_step_s))
    return stretched


def tpot_limit_tokens(
    view: ClusterView, s: Speeds, slo_s: float, mean_tokens: Floats | float
) -> Floats:
    """How many tokens of context may run on each instance within a TPOT of `slo_s`, if sequences
    have `mean_tokens` each: TPOT(T) = base + T ((row + token) / mean + context + attention) = slo,
    solved for T. 0 where even an empty step is too slow."""
    per_token_s = s.decode_s / np.maximum(mean_tokens, 1.0) + s.read_s
    budget_s = np.full_like(per_token_s, slo_s)
    if view.prefill_share is not None:
        budget_s *= 1.0 - np.minimum(view.prefill_share, MAX_SHARE)
    budget_s = np.maximum(budget_s - s.base_s, 0.0)
    unlimited = np.where(budget_s > 0.0, np.inf, 0.0)
    limit: Floats = np.divide(budget_s, per_token_s, out=unlimited, where=per_token_s > 0.0)
    return limit


def why_doubted(view: ClusterView, i: int) -> str:
    if view.num_steps[i] < MIN_STEPS:
        return f"it has measured {int(view.num_steps[i])} steps only"
    if view.ttft_error is not None and view.ttft_error[i] > MAX_TTFT_ERROR:
        return f"its predicted TTFTs were off by {100 * view.ttft_error[i]:.0f}% of late"
    return f"its cost model misses by {1e3 * view.residual_s[i]:.1f} ms a step"
