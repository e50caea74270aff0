"""Predicted times: closed forms in small cases, monotone in work, and what to believe."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tests.helpers.views import make_view

from penstock.protocol.kv import Fetched
from penstock.service.policies import predict
from penstock.service.policies.correction import PrefillShare, TransferFitter, TtftCorrection
from penstock.service.policies.outlook import look
from penstock.service.policies.view import RouteRequest

BASE, TOKEN, ROW, CONTEXT, ATTENTION = 4e-3, 2e-5, 1e-4, 1e-8, 1e-9


def ttft(num_tokens: int, *, output: int = 1, **columns) -> float:
    view = make_view(1, **columns)
    request = RouteRequest(num_tokens=num_tokens, expected_output_tokens=output)
    return float(look(view, request).ttft_s[0])


def step(new: int, reads: int, rows: int = 1) -> float:
    """A step with one prompt's chunk, as the cost model says it."""
    return BASE + ROW * rows + TOKEN * new + CONTEXT * reads + ATTENTION * new * reads


def test_a_short_prompt_on_an_idle_instance_is_one_step() -> None:
    assert ttft(100) == pytest.approx(step(100, 100))


def test_a_long_prompt_is_as_many_steps_as_chunks() -> None:
    expected = step(256, 256) + step(256, 512) + step(88, 600)
    assert ttft(600) == pytest.approx(expected)


def test_hits_leave_the_rest_to_compute_but_one_token_at_least() -> None:
    view, found = make_view(1), np.array([512.0])
    request = RouteRequest(num_tokens=600, device_hits=found)
    assert look(view, request).ttft_s[0] == pytest.approx(step(88, 600))
    request = RouteRequest(num_tokens=512, device_hits=found)
    assert look(view, request).ttft_s[0] == pytest.approx(step(1, 512))


def test_what_fits_into_the_last_step_of_the_queue_shares_it() -> None:
    """100 tokens behind 300: 256 + 144, not 256 + 44 + 100."""
    plain = dict(per_context_token_s=0.0, per_attention_s=0.0, queued_tokens=300, queued=1)
    waiting = ttft(100, **plain) - 0.5 * BASE  # of the step that is under way
    # The queued prompt has a row in both steps, ours in the second.
    assert waiting == pytest.approx(2 * BASE + 400 * TOKEN + 3 * ROW)


def test_running_sequences_take_their_share_of_each_step() -> None:
    plain = dict(per_context_token_s=0.0, per_attention_s=0.0, running=10, running_tokens=1000)
    decode = BASE + 10 * (ROW + TOKEN)
    expected = 0.5 * decode + 2 * (decode + ROW) + 300 * TOKEN
    assert ttft(300, **plain) == pytest.approx(expected)


def test_a_known_end_of_the_step_counts_for_more_than_a_guess() -> None:
    assert ttft(100, running=1, step_left_s=0.5) > ttft(100, running=1) + 0.4


def test_without_a_slot_or_blocks_one_waits_for_sequences_to_end() -> None:
    free = ttft(100, running=15, running_tokens=1500, output=50)
    full = ttft(100, running=16, running_tokens=1600, output=50)
    no_blocks = ttft(100, running=4, running_tokens=400, free_blocks=1, output=50)
    decode = BASE + 16 * (ROW + TOKEN) + 1600 * (CONTEXT + ATTENTION)
    # One of 16 ends every 50/16 steps, if they are as long as this one.
    assert full - free == pytest.approx(decode * 50 / 16, rel=0.1)
    assert no_blocks > ttft(100, running=4, running_tokens=400, output=50) + 10 * BASE


columns = st.fixed_dictionaries(
    {
        "queued_tokens": st.integers(0, 20_000),
        "queued": st.integers(0, 30),
        "running": st.integers(0, 40),
        "running_tokens": st.integers(0, 40_000),
        "step_left_s": st.floats(0, 2),
        "base_s": st.floats(-1e-3, 0.1),
        "per_token_s": st.floats(-1e-6, 1e-3),
        "per_row_s": st.floats(-1e-5, 1e-3),
        "per_context_token_s": st.floats(-1e-9, 1e-6),
        "per_attention_s": st.floats(-1e-10, 1e-7),
        "step_tokens": st.integers(16, 8192),
        "free_blocks": st.integers(0, 5000),
        "ttft_ratio": st.floats(0.125, 8),
    }
)


@settings(max_examples=200, deadline=None)
@given(columns, st.integers(1, 10_000), st.integers(1, 500), st.data())
def test_more_work_is_never_predicted_to_take_less_time(columns, tokens, output, data) -> None:
    here = ttft(tokens, output=output, **columns)
    assert math.isfinite(here) and here >= 0
    slack = 1e-9 + 1e-9 * here
    more = data.draw(st.integers(1, 5000))
    assert ttft(tokens + more, output=output, **columns) >= here - slack
    queued = dict(columns, queued_tokens=columns["queued_tokens"] + more)
    assert ttft(tokens, output=output, **queued) >= here - slack
    queued = dict(
        columns, queued=columns["queued"] + 1, queued_tokens=columns["queued_tokens"] + more
    )
    if columns["queued"]:  # as long as those before it, so that their mean length stays
        each = columns["queued_tokens"] / columns["queued"]
        queued["queued_tokens"] = columns["queued_tokens"] + each
    assert ttft(tokens, output=output, **queued) >= here - slack
    longer = dict(columns, running_tokens=columns["running_tokens"] + more, free_blocks=1e9)
    assert ttft(tokens, **longer) >= ttft(tokens, **dict(columns, free_blocks=1e9)) - slack
    later = dict(columns, step_left_s=columns["step_left_s"] + 0.1)
    assert ttft(tokens, output=output, **later) >= here - slack


@settings(max_examples=200, deadline=None)
@given(columns, st.integers(1, 10_000), st.data())
def test_more_hits_never_make_it_later(columns, tokens, data) -> None:
    """But for this: where as many chunks remain, each ends, and so reads, later in the prompt."""
    view = make_view(1, **columns)
    few = data.draw(st.integers(0, tokens))
    many = data.draw(st.integers(few, tokens))

    def with_hits(found: int) -> float:
        request = RouteRequest(num_tokens=tokens, device_hits=np.array([float(found)]))
        return float(look(view, request).ttft_s[0])

    speeds = predict.speeds(view)
    room = predict.queues(view, speeds, tokens, 1).room
    num_chunks = np.ceil(max(tokens - few, 1) / room)
    reads_s = float(speeds.ratio[0] * speeds.context_s[0] * (num_chunks[0] - 1) * (many - few))
    assert with_hits(many) <= with_hits(few) * (1 + 1e-9) + reads_s + 1e-9


@settings(max_examples=200, deadline=None)
@given(columns, st.floats(1e-4, 1.0), st.floats(1, 5000), st.floats(0, 0.9))
def test_the_limit_in_tokens_is_where_the_tpot_meets_the_slo(columns, slo_s, mean, share) -> None:
    view = make_view(1, prefill_share=share, **columns)
    s = predict.speeds(view)
    limit = float(predict.tpot_limit_tokens(view, s, slo_s, mean)[0])

    def tpot(tokens: float) -> float:
        """Brute force: a step with so many tokens in sequences of the mean length."""
        rows = tokens / max(mean, 1.0)
        step = s.base_s + rows * (s.row_s + s.token_s) + tokens * (s.context_s + s.attention_s)
        return float(step[0]) / (1 - share)

    if limit == 0.0:
        assert tpot(0.0) >= slo_s * (1 - 1e-9)
    elif math.isinf(limit):
        assert tpot(1e12) <= slo_s
    else:
        assert tpot(limit) == pytest.approx(slo_s, rel=1e-6)
        assert tpot(0.99 * limit) <= slo_s <= tpot(1.01 * limit)


def test_tpot_is_a_step_with_all_of_them_and_longer_by_what_prompts_take() -> None:
    view = make_view(2, running=3, running_tokens=900, prefill_share=[0.0, 0.5])
    s = predict.speeds(view)
    tpot = predict.tpot_s(view, s, predict.queues(view, s, 100, 1), 100)
    alone = BASE + 4 * (ROW + TOKEN) + 1000 * (CONTEXT + ATTENTION)
    assert tpot == pytest.approx([alone, 2 * alone])


# --- whom to believe ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"num_steps": [100, 3]}, "3 steps only"),
        ({"residual_s": [1e-4, 6.0]}, "misses by 6000.0 ms"),
        ({"ttft_error": [0.1, 3.0]}, "off by 300%"),
    ],
)
def test_who_is_not_believed_is_compared_at_the_speed_of_the_others(columns, why) -> None:
    view = make_view(2, base_s=[4e-3, 9.0], ttft_ratio=[1, 7], **columns)
    o = look(view, RouteRequest(num_tokens=100))
    assert o.ttft_s[1] == pytest.approx(o.ttft_s[0])
    assert not o.doubt(0)
    assert why in o.doubt(1)


def test_when_nobody_is_believed_all_are_alike() -> None:
    view = make_view(3, num_steps=[1, 2, 0], base_s=[1.0, 2.0, 0.0])
    o = look(view, RouteRequest(num_tokens=100))
    assert np.ptp(o.ttft_s) == 0.0


# --- corrections ----------------------------------------------------------------------------------


def test_the_correction_finds_a_steady_ratio_and_then_misses_little() -> None:
    c = TtftCorrection()
    for _ in range(100):
        c.observe(0.1 * c.ratio, 0.25)
    assert c.ratio == pytest.approx(2.5, rel=0.05)
    assert c.error < 0.1


def test_one_outlier_moves_the_correction_by_a_bounded_step() -> None:
    c = TtftCorrection()
    for _ in range(50):
        c.observe(0.1, 0.1)
    c.observe(0.1, 60.0)
    assert 1.0 <= c.ratio <= 1.1


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), max_size=50))
def test_corrections_stay_finite_whatever_happens(pairs) -> None:
    c = TtftCorrection()
    for predicted_s, actual_s in pairs:
        c.observe(predicted_s, actual_s)
    assert 0.124 <= c.ratio <= 8.01 and 0 <= c.error <= 10.01


def test_the_prefill_share_follows_what_comes_and_forgets_it() -> None:
    share = PrefillShare(window_s=10.0)
    for second in range(200):
        share.observe(float(second), 0.3)
    assert share.share(200.0) == pytest.approx(0.3, rel=0.06)
    assert share.share(300.0) < 0.01


def fetched(num_blocks: int, seconds: float, means: str) -> Fetched:
    return Fetched("i", 1, "r", 1, num_blocks, num_blocks, 0, seconds, means)


def test_transfers_are_fitted_by_how_blocks_come() -> None:
    fitter = TransferFitter()
    guess = fitter.line("map")
    for size in (4, 16, 64, 256) * 10:
        fitter.observe(fetched(size, 3e-3 + size * 16 * 2e-6, "tcp"))
    assert fitter.line("copy") == pytest.approx((3e-3, 2e-6), rel=1e-3)
    assert fitter.line("map") == guess


def test_transfers_of_one_size_scale_the_guess() -> None:
    fitter = TransferFitter()
    for _ in range(30):
        fitter.observe(fetched(10, 0.5, "mooncake"))
    once, token = fitter.line("copy")
    assert once + 160 * token == pytest.approx(0.5)
    assert once > 0 and token > 0


def test_what_did_not_come_says_nothing_about_speed() -> None:
    fitter = TransferFitter()
    before = fitter.line("copy")
    fitter.observe(fetched(0, 9.0, "tcp"))
    fitter.observe(fetched(3, 9.0, ""))
    assert fitter.line("copy") == before
