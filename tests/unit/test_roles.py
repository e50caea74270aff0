"""The forecast, and the split of roles that follows it: against exhaustive search, and without
flapping."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tests.helpers.views import make_view

from penstock.service.policies.forecast import Forecast, Work
from penstock.service.policies.roles import Loads, RolePlan, RolesConfig, RoleState, decide_roles
from penstock.service.policies.view import ROLES, ClusterView

#: A step full of prompt tokens takes 9 ms with these instances: too long for who decodes.
CONFIG = RolesConfig(ttft_slo_s=2.0, tpot_slo_s=0.008)


def turned(view: ClusterView, plan: RolePlan) -> ClusterView:
    """The cluster after the change has taken."""
    if plan.instance is None:
        return view
    roles = view.roles.copy()
    assert plan.role is not None
    roles[view.names.index(plan.instance)] = ROLES.index(plan.role)
    return replace(view, roles=roles)


def run(
    view: ClusterView,
    work: Work,
    seconds: float,
    config: RolesConfig = CONFIG,
    state: RoleState | None = None,
    start_s: float = 0.0,
) -> tuple[ClusterView, list[RolePlan], RoleState]:
    """Decide every half second, each change taking at once; returns the changes."""
    state, changes = state or RoleState(), []
    for tick in range(int(seconds * 2)):
        plan = decide_roles(view, work, state, config, start_s + tick / 2)
        state = plan.state
        if plan.instance is not None:
            changes.append(plan)
        view = turned(view, plan)
    return view, changes, state


def counts(view: ClusterView) -> tuple[int, int]:
    names = [ROLES[i] for i in view.roles]
    return names.count("prefill"), names.count("decode")


HEAVY = Work(requests_per_s=20, prompt_tokens_per_s=40_000, output_tokens_per_s=4000)


# --- the forecast ---------------------------------------------------------------------------------


def test_a_steady_rate_is_found() -> None:
    forecast = Forecast()
    for tick in range(600):
        forecast.observe(tick / 10, 100)
    work = forecast.work(60.0, 30.0)
    assert work.requests_per_s == pytest.approx(10, rel=0.05)
    assert work.prompt_tokens_per_s == pytest.approx(1000, rel=0.05)
    assert work.mean_output_tokens == pytest.approx(30, rel=0.05)


def test_a_burst_is_seen_within_seconds_and_forgotten_within_minutes() -> None:
    forecast = Forecast()
    for second in range(60):
        forecast.observe(float(second), 100)
    for tick in range(400):
        forecast.observe(60 + tick / 100, 100)
    assert forecast.work(64.0, 10.0).requests_per_s > 50
    for second in range(64, 364):
        forecast.observe(float(second), 100)
    assert forecast.work(364.0, 10.0).requests_per_s < 2


def test_a_rise_is_expected_to_go_on() -> None:
    forecast = Forecast()
    number = 0.0
    for tick in range(1200):
        number += tick / 1200
        while number >= 1:
            forecast.observe(tick / 10, 100)
            number -= 1
    assert forecast.work(120.0, 10.0).requests_per_s > 9.3


def test_silence_ends_in_nothing_and_is_not_counted_bin_by_bin() -> None:
    forecast = Forecast()
    forecast.observe(0.0, 1000)
    assert forecast.work(0.5, 10.0).prompt_tokens_per_s == pytest.approx(1000)
    work = forecast.work(1e9, 10.0)
    assert work.requests_per_s == pytest.approx(0, abs=1e-3)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**6))))
def test_rates_are_never_negative(steps) -> None:
    forecast, now = Forecast(), 0.0
    for wait_s, prompt in steps:
        now += wait_s
        forecast.observe(now, prompt)
        work = forecast.work(now, 10.0)
        rates = (work.requests_per_s, work.prompt_tokens_per_s, work.output_tokens_per_s)
        assert all(np.isfinite(rate) and rate >= 0 for rate in rates)


# --- the split ------------------------------------------------------------------------------------


def test_one_instance_has_no_roles() -> None:
    view, changes, _ = run(make_view(1), HEAVY, 30)
    assert not changes and counts(view) == (0, 0)


def test_under_a_light_load_nobody_gets_a_role() -> None:
    _, changes, _ = run(make_view(4), Work(0.1, 50, 10), 60)
    assert not changes


def test_where_prompts_hold_nobody_up_there_is_nothing_to_split() -> None:
    """All doing both share the work evenly, which no split of a few instances can."""
    _, changes, _ = run(make_view(6), HEAVY, 60, replace(CONFIG, tpot_slo_s=0.02))
    assert not changes
    _, changes, _ = run(make_view(6), HEAVY, 60, replace(CONFIG, tpot_slo_s=None))
    assert not changes


def test_under_load_roles_follow_the_work() -> None:
    prompts = Work(requests_per_s=20, prompt_tokens_per_s=60_000, output_tokens_per_s=400)
    answers = Work(requests_per_s=20, prompt_tokens_per_s=4000, output_tokens_per_s=8000)
    after, _, _ = run(make_view(6), prompts, 120)
    assert counts(after)[0] > counts(after)[1] >= 1
    after, _, _ = run(make_view(6), answers, 120)
    assert counts(after)[1] > counts(after)[0] >= 1


def test_when_the_work_changes_the_split_does() -> None:
    prompts = Work(requests_per_s=20, prompt_tokens_per_s=60_000, output_tokens_per_s=400)
    answers = Work(requests_per_s=20, prompt_tokens_per_s=4000, output_tokens_per_s=8000)
    view, _, state = run(make_view(6), prompts, 120)
    many = counts(view)[0]
    view, changes, _ = run(view, answers, 120, state=state, start_s=120)
    assert counts(view)[0] < many and changes
    assert all("cheapest" in change.reason for change in changes)


def test_a_fixed_split_is_brought_about_and_kept() -> None:
    view, changes, _ = run(make_view(5), HEAVY, 30, RolesConfig(static=(2, 3)))
    assert counts(view) == (2, 3) and len(changes) == 5


works = st.builds(
    Work,
    st.floats(0.1, 200),
    st.floats(1, 2e5),
    st.floats(1, 2e4),
)


@settings(max_examples=60, deadline=None)
@given(works, st.integers(2, 6))
def test_alike_instances_come_to_the_best_of_all_splits(work, count) -> None:
    """Exhaustive: every assignment of roles, each judged by the same pressure."""
    start = make_view(count)
    config = replace(CONFIG, light_load=0.0, margin=0.0, patience_s=0.0, pause_s=0.0)
    end, changes, _ = run(start, work, 30, config)
    load = Loads.of(start, work, config)
    if not changes:
        assert load.together(np.ones(count, dtype=bool)) <= best_split(load, count) * (1 + 1e-9)
        return
    prefilling = end.roles == ROLES.index("prefill")
    assert load.split(prefilling, ~prefilling) == pytest.approx(best_split(load, count))


def best_split(load: Loads, count: int) -> float:
    best = np.inf
    for choice in product((False, True), repeat=count):
        prefilling = np.array(choice)
        if prefilling.any() and not prefilling.all():
            best = min(best, load.split(prefilling, ~prefilling))
    return float(best)


@settings(max_examples=60, deadline=None)
@given(works, st.integers(2, 5), st.data())
def test_unlike_instances_come_near_the_best_split(work, count, data) -> None:
    """One turn at a time, by what is cheapest: within the speed that instances differ by."""
    speed = data.draw(st.lists(st.floats(1, 2), min_size=count, max_size=count))
    start = make_view(count, per_token_s=2e-5 * np.array(speed), base_s=4e-3 * np.array(speed))
    config = replace(CONFIG, light_load=0.0, margin=0.0, patience_s=0.0, pause_s=0.0)
    end, changes, _ = run(start, work, 30, config)
    if changes:
        load = Loads.of(start, work, config)
        prefilling = end.roles == ROLES.index("prefill")
        assert load.split(prefilling, ~prefilling) <= 4 * best_split(load, count)


@settings(max_examples=100, deadline=None)
@given(works, st.integers(2, 8), st.data())
def test_under_a_constant_load_it_comes_to_rest(work, count, data) -> None:
    roles = data.draw(st.lists(st.sampled_from(ROLES), min_size=count, max_size=count))
    view = make_view(count, roles=roles)
    view, changes, state = run(view, work, 10 * count + 40)
    assert len(changes) <= 2 * count
    _, later, _ = run(view, work, 60, state=state, start_s=10 * count + 40)
    assert not later


@settings(max_examples=100, deadline=None)
@given(st.lists(works, min_size=1, max_size=6), st.integers(2, 8), st.data())
def test_floors_hold_whatever_comes(all_works, count, data) -> None:
    low_p = data.draw(st.integers(1, count - 1))
    low_d = data.draw(st.integers(1, count - low_p))
    config = replace(CONFIG, min_prefill=low_p, min_decode=low_d, patience_s=0.0, pause_s=0.0)
    view, state, split = make_view(count), RoleState(), False
    for number, work in enumerate(all_works):
        view, _, state = run(view, work, 20, config, state, 20.0 * number)
        have_p, have_d = counts(view)
        split = split or have_p + have_d == count
        if split:
            assert have_p >= low_p and have_d >= low_d


def test_one_change_at_a_time_and_with_patience() -> None:
    """Of those that have a role; who has none gives none up, and is not waited for."""
    config = replace(CONFIG, patience_s=3.0, pause_s=10.0)
    view, state = make_view(6, roles=["decode"] * 5 + ["prefill"]), RoleState()
    at = []
    for tick in range(200):
        plan = decide_roles(view, HEAVY, state, config, tick / 2)
        state = plan.state
        if plan.instance is not None:
            at.append(tick / 2)
        view = turned(view, plan)
    assert len(at) > 1 and at[0] >= 3.0
    assert all(later - earlier >= 10.0 for earlier, later in pairwise(at))
    watched = replace(RoleState(), better_since_s=0.0, better_prefill=3)
    first = decide_roles(make_view(6), HEAVY, watched, config, 3.0)
    again = decide_roles(turned(make_view(6), first), HEAVY, first.state, config, 3.5)
    assert None not in (first.instance, again.instance)


def test_a_busy_instance_turns_by_way_of_a_transition() -> None:
    roles = ["prefill", "decode", "decode", "decode"]
    busy = dict(running=[0, 5, 3, 4], running_tokens=[0, 900, 300, 700])
    view = make_view(4, roles=roles, **busy)
    prompts = Work(requests_per_s=20, prompt_tokens_per_s=60_000, output_tokens_per_s=400)
    config = replace(CONFIG, patience_s=0.0, pause_s=0.0)
    plan = decide_roles(view, prompts, RoleState(), config, 0.0)
    assert (plan.instance, plan.role) == ("i2", "decode_to_prefill")
    view = turned(view, plan)
    waiting = decide_roles(view, prompts, plan.state, replace(config, pause_s=9.0), 1.0)
    assert waiting.instance is None
    done = replace(view, running=np.array([0.0, 5, 0, 4]))
    plan = decide_roles(done, prompts, plan.state, config, 2.0)
    assert (plan.instance, plan.role) == ("i2", "prefill")


def test_who_does_not_take_its_role_gets_the_old_one_back() -> None:
    view = make_view(4, roles=["prefill", "decode", "decode", "decode"])
    prompts = Work(requests_per_s=20, prompt_tokens_per_s=60_000, output_tokens_per_s=400)
    config = replace(CONFIG, patience_s=0.0, take_s=2.0)
    plan = decide_roles(view, prompts, RoleState(), config, 0.0)
    assert plan.instance is not None
    assert decide_roles(view, prompts, plan.state, config, 1.0).instance is None
    back = decide_roles(view, prompts, plan.state, config, 2.5)
    assert back.rollback and (back.instance, back.role) == (plan.instance, "decode")
    # And it is not tried again at once.
    assert decide_roles(view, prompts, back.state, config, 3.0).instance is None


def test_who_does_not_empty_itself_gets_the_old_role_back() -> None:
    busy = dict(running=[0, 5, 3, 4], running_tokens=[0, 900, 300, 700])
    view = make_view(4, roles=["prefill", "decode", "decode", "decode"], **busy)
    prompts = Work(requests_per_s=20, prompt_tokens_per_s=60_000, output_tokens_per_s=400)
    config = replace(CONFIG, patience_s=0.0, turning_s=30.0)
    plan = decide_roles(view, prompts, RoleState(), config, 0.0)
    view = turned(view, plan)
    back = decide_roles(view, prompts, plan.state, config, 31.0)
    assert back.rollback and (back.instance, back.role) == ("i2", "decode")
    assert "30" in back.reason or "31" in back.reason


def test_all_that_turn_are_watched() -> None:
    """In a first split several turn at once; each that does not empty itself goes back."""
    busy = dict(running=[5, 5, 5, 5], running_tokens=[900, 800, 700, 600])
    view, state = make_view(4, **busy), RoleState()
    prompts = Work(requests_per_s=20, prompt_tokens_per_s=60_000, output_tokens_per_s=400)
    config = replace(CONFIG, patience_s=0.0, turning_s=30.0)
    while "any" in [ROLES[role] for role in view.roles]:
        plan = decide_roles(view, prompts, state, config, 0.0)
        view, state = turned(view, plan), plan.state
    turning = [n for n, r in zip(view.names, view.roles) if ROLES[r] == "decode_to_prefill"]
    assert len(turning) > 1
    back = []
    for _ in turning:
        plan = decide_roles(view, prompts, state, config, 31.0)
        assert plan.rollback
        back.append(plan.instance)
        view, state = turned(view, plan), plan.state
    assert sorted(back) == sorted(turning)


def test_nothing_is_split_before_it_is_known_how_long_answers_are() -> None:
    unknown = Work(requests_per_s=20, prompt_tokens_per_s=60_000, output_tokens_per_s=0.0)
    _, changes, _ = run(make_view(4), unknown, 60)
    assert not changes
    plan = decide_roles(make_view(4), unknown, RoleState(), CONFIG, 0.0)
    assert "too few answers" in plan.reason


def test_a_narrow_link_asks_for_more_who_decode() -> None:
    """The KV of all prompts has to come to them, whatever they can compute."""
    wide = make_view(8)
    narrow = replace(wide, transfer=replace(wide.transfer, link_token_s=5e-5))
    prompts = Work(requests_per_s=20, prompt_tokens_per_s=60_000, output_tokens_per_s=400)
    splits = [counts(run(view, prompts, 120)[0]) for view in (wide, narrow)]
    assert splits[1][1] > splits[0][1]
