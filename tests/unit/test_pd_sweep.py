"""The search for the rate at which SLOs break, on a cluster that is a formula."""

from __future__ import annotations

import pytest
import yaml
from benchmarks.pd_sweep import EXPERIMENT, Point, Setup, roles_over_time, search, setups

SPEEDS = {"ratio": 1.06, "least": 0.5, "most": 64}


def measured(breaks_at: float):
    """Everything is well up to a rate (10 requests a second at speed 1), then less and less."""

    def at(speed: float) -> Point:
        rate = 10.0 * speed
        attained = min(1.0, 0.9 * (breaks_at / rate) ** 2)
        return Point(speed, rate, attained, attained, 1.0, [], 0, 0, 0, 0, 0, 0, [], 0.0)

    return at


@pytest.mark.parametrize("breaks_at", [6.0, 39.0, 40.0, 123.0, 600.0])
def test_the_limit_is_found_wherever_it_is(breaks_at: float) -> None:
    found, points = search(measured(breaks_at), SPEEDS, 0.9)
    assert found == pytest.approx(breaks_at, rel=0.005)
    assert len(points) < 24
    assert [p.speed for p in points] == sorted(p.speed for p in points)


def test_what_is_never_good_enough_has_no_limit() -> None:
    assert search(measured(0.01), SPEEDS, 0.9)[0] == 0.0


def test_the_experiment_compares_with_every_static_split() -> None:
    experiment = yaml.safe_load(EXPERIMENT.read_text())
    found = list(setups(experiment))
    static = {(s.policy, s.pd) for s in found if s.group == "static"}
    splits = {f"{p}:{8 - p}" for p in range(1, 8)}
    assert static == {(p, s) for p in ("least-load", "round-robin") for s in splits}
    assert Setup("dynamic", "slo-aware", "auto", 2048) in found


def test_roles_are_counted_from_change_to_change() -> None:
    changes = [(1.0, "a", "prefill"), (2.0, "b", "decode"), (5.0, "b", "prefill")]
    times, counts = roles_over_time(changes)
    assert times == [0.0, 1.0, 2.0, 5.0]
    assert counts["any"] == [2, 1, 0, 0]
    assert counts["prefill"] == [0, 1, 1, 2]
    assert counts["decode"] == [0, 0, 1, 0]
