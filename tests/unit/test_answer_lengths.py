"""How long answers are, seen while most of them are still being given: against lengths that are
known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.service.answer_lengths import AnswerLengths


def served(draw: Callable[[], int], steps: int, per_step: int = 2) -> AnswerLengths:
    """A server that has been up for so many steps: `per_step` answers begin with each, and all that
    have begun say one token."""
    lengths, live = AnswerLengths(), []
    for _ in range(steps):
        live += [[0, draw()] for _ in range(per_step)]
        for answer in live:
            lengths.said(answer[0], answer[0] + 1)
            answer[0] += 1
            if answer[0] == answer[1]:
                lengths.ended(answer[0])
        live = [answer for answer in live if answer[0] < answer[1]]
    return lengths


LENGTHS: dict[str, Callable[[np.random.Generator], int]] = {
    "exponential": lambda rng: 1 + int(rng.exponential(130)),
    "even": lambda rng: int(rng.integers(1, 261)),
    "long-tailed": lambda rng: 1 + int(rng.lognormal(4.5, 0.9)),
    "all alike": lambda rng: 130,
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_lengths_are_right_soon_after_a_start(kind: str) -> None:
    """After two mean lengths, when those that have ended are the short ones still."""
    rng = np.random.default_rng(1)
    lengths = served(lambda: LENGTHS[kind](rng), 260)
    true = np.array([LENGTHS[kind](rng) for _ in range(20_000)])
    assert lengths.mean_tokens == pytest.approx(true.mean(), rel=0.25)
    # Within one power of two lengths are taken to end alike, so a quantile is that exact.
    assert np.quantile(true, 0.1) / 2 < lengths.short_tokens < 2 * np.quantile(true, 0.1)


@pytest.mark.parametrize("length", [255, 1000])
def test_answers_that_are_all_alike_are_known_for_it(length: int) -> None:
    lengths = served(lambda: length, 3 * length, per_step=1)
    assert lengths.mean_tokens == pytest.approx(length, rel=0.1)


def test_nothing_is_said_of_answers_before_some_have_ended() -> None:
    lengths = served(lambda: 1000, 500)
    assert lengths.mean_tokens == 0.0 and lengths.short_tokens == math.inf
    assert served(lambda: 1, 500).mean_tokens == pytest.approx(1.0, abs=0.01)


def test_what_answers_have_become_is_what_counts() -> None:
    lengths = served(lambda: 20, 500)
    for _ in range(2000):
        lengths.said(0, 200)
        lengths.ended(200)
    assert lengths.mean_tokens == pytest.approx(200, rel=0.1)


@given(st.lists(st.integers(1, 5000), min_size=10, max_size=60), st.integers(1, 700))
def test_tokens_count_alike_however_many_come_at_once(answers: list[int], at_once: int) -> None:
    one_by_one, in_runs = AnswerLengths(), AnswerLengths()
    for answer in answers:
        one_by_one.said(0, answer)
        for start in range(0, answer, at_once):
            in_runs.said(start, min(start + at_once, answer))
        one_by_one.ended(answer)
        in_runs.ended(answer)
    assert in_runs.mean_tokens == pytest.approx(one_by_one.mean_tokens)
    assert in_runs.short_tokens == pytest.approx(one_by_one.short_tokens)
    assert 0.4 * min(answers) <= one_by_one.mean_tokens <= 2.5 * max(answers)
