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
