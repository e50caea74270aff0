"""The time in which a link was at work, against a count of every instant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.transfer.transfers import Moves
from penstock.protocol.instance import MoveCounts
from penstock.service.policies.correction import TransferFitter

jobs = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), max_size=20)


@given(jobs)
def test_what_overlaps_counts_once(jobs: list[tuple[int, int]]) -> None:
    moves = Moves()
    events = [(start, True) for start, _ in jobs] + [(s + length, False) for s, length in jobs]
    for at_s, begins in sorted(events):
        (moves.began if begins else moves.ended)(float(at_s))
    instants = {at for start, length in jobs for at in range(start, start + length)}
    assert moves.busy_s == pytest.approx(len(instants))


def test_what_a_link_can_do_is_seen_through_queues() -> None:
    """Four copies share a link of 10 us a token: each takes four times as long as the link does."""
    fitter, token_s, blocks = TransferFitter(), 1e-5, 0
    seconds = busy_s = 0.0
    for _ in range(50):
        blocks += 400
        busy_s += 400 * 16 * token_s
        seconds += 4 * 400 * 16 * token_s
        fitter.moved([MoveCounts("tcp", blocks, 0, 0, seconds, busy_s)])
    assert fitter.link_token_s == pytest.approx(token_s, rel=0.05)
    assert fitter.line("copy")[1] > 2 * token_s
    # Waiting for who sends is no fault of the link, which is remembered better than that.
    fitter.moved([MoveCounts("tcp", blocks + 400, 0, 0, seconds + 1.0, busy_s + 1.0)])
    assert fitter.link_token_s == pytest.approx(token_s, rel=0.05)


def test_a_new_process_counts_from_zero() -> None:
    """Even one that has brought more than the old one by the time that it is heard of."""
    fitter = TransferFitter()
    fitter.moved([MoveCounts("tcp", 1000, 0, 0, 0.4, 0.2)])
    fitter.restarted()
    fitter.moved([MoveCounts("tcp", 1500, 0, 0, 0.2, 0.1)])
    assert 0.0 < fitter.link_token_s <= 0.1 / (1500 * 16)
    once_s, token_s = fitter.line("copy")
    assert once_s >= 0.0 and token_s >= 0.0 and once_s + 1500 * 16 * token_s > 0.0
