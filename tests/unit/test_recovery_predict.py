"""What sequences that are placed together expect, against steps counted one by one; and what an
instance is believed about prompts that has never seen any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.views import make_view

from penstock.service.policies import predict

BASE_S, TOKEN_S, ROW_S = 4e-3, 2e-5, 1e-4
ROOM = 64


def ends_s(ahead: int, news: list[int]) -> list[float]:
    """When each has its token: prompts share steps of ROOM tokens in order of arrival."""
    left = [ahead, *news]
    done, now = [0.0] * len(left), 0.0
    while any(left):
        room, step_s, finished = ROOM, BASE_S, []
        for place, tokens in enumerate(left):
            taken = min(tokens, room)
            if taken:
                room -= taken
                left[place] -= taken
                step_s += taken * TOKEN_S + ROW_S
                if not left[place]:
                    finished.append(place)
        now += step_s
        for place in finished:
            done[place] = now
    return done[1:]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.lists(st.integers(1, 200), min_size=2, max_size=12))
def test_each_waits_for_those_behind_it_in_its_step(ahead: int, news: list[int]) -> None:
    view = make_view(
        1, queued_tokens=ahead + sum(news), queued=len(news) + bool(ahead), running=2,
        running_tokens=100, step_tokens=ROOM + 2, base_s=BASE_S, per_token_s=TOKEN_S,
        per_row_s=ROW_S, per_context_token_s=0.0, per_attention_s=0.0,
    )  # fmt: skip
    longer_s = predict.company_s(view, predict.speeds(view), news, [1000] * len(news))
    together = ends_s(ahead, news)
    for place in range(len(news)):
        alone = ends_s(ahead, news[: place + 1])[place]
        assert longer_s[place] == pytest.approx(together[place] - alone, abs=1e-9)


def test_an_idle_instance_begins_with_the_first() -> None:
    view = make_view(1, queued_tokens=90, queued=3, per_context_token_s=0.0, per_attention_s=0.0)
    longer_s = predict.company_s(view, predict.speeds(view), [30, 30, 30], [30, 30, 30])
    step_s = BASE_S + ROW_S
    assert longer_s == pytest.approx([0.0, step_s + ROW_S + 30 * TOKEN_S, step_s])


def test_who_has_seen_no_prompts_is_taken_at_the_fleets_price() -> None:
    tokens_s, rows_s = [4e-5, 1e-7, 2e-5], [1e-4, 3e-4, 1e-4]
    seen = make_view(
        3, per_token_s=tokens_s, per_row_s=rows_s, prompt_tokens=np.array([5000.0, 64.0, 9000.0])
    )
    s = predict.speeds(seen)
    assert s.token_s == pytest.approx([4e-5, 3e-5, 2e-5])
    # What a row that decodes takes is known from steps without prompts: it stays.
    assert s.decode_s == pytest.approx(np.add(tokens_s, rows_s))
    for known in ([1.0, 1.0, 1.0], [1e6] * 3):
        view = make_view(3, per_token_s=tokens_s, prompt_tokens=np.array(known))
        assert predict.speeds(view).token_s == pytest.approx(tokens_s)
