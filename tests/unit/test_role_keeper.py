"""The leader's part: what it says to whom, what it remembers, and what it takes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_service_core import card, load

from penstock.protocol.instance import Assign, CostModel, Role
from penstock.service.cluster.instances import Instance, Others
from penstock.service.cluster.roles import Attainment, NotLeading, RoleKeeper, RoleKeeperConfig
from penstock.service.cluster.view import LiveView
from penstock.service.policies.forecast import Work
from penstock.service.policies.roles import RolesConfig


class Cluster:
    """Instances that become what they are told, unless they are deaf."""

    def __init__(self, size: int, **config: object) -> None:
        policy = config.pop("policy", RolesConfig(static=(1, size - 1), pause_s=0.0))
        self.keeper = RoleKeeper(RoleKeeperConfig(policy=policy, **config))  # type: ignore[arg-type]
        self.instances = [Instance(f"i{k}") for k in range(size)]
        for instance in self.instances:
            instance.attached(card(instance.name, 1), 0.0)
            cost = CostModel(base_s=0.01, per_token_s=1e-4, per_row_s=1e-4, num_steps=100)
            instance.loaded(load(instance.name, 1, cost), 0.0)
        self.view = LiveView()
        self.attainment = Attainment()
        self.deaf: set[str] = set()
        self.said: list[tuple[str, Assign]] = []
        self.now = 0.0

    @property
    def roles(self) -> list[Role]:
        return [i.role for i in self.instances]

    def run(self, seconds: float) -> None:
        until_s = self.now + seconds
        while self.now < until_s:
            self.now += 0.25
            if not self.keeper.is_due(self.now):
                continue
            view = self.view.of(self.instances, self.now)
            for send in self.keeper.keep(self.instances, view, self.attainment, 100.0, self.now):
                self.said.append((send.peer, send.message))
                if send.peer not in self.deaf:
                    instance = next(i for i in self.instances if i.name == send.peer)
                    instance.is_now(send.message.role, send.message.epoch)

    def end_requests(self, count: int, kept: int) -> None:
        for number in range(count):
            self.attainment.ended(self.now, number < kept)


def test_nothing_is_said_before_it_leads() -> None:
    c = Cluster(3)
    c.run(5.0)
    assert c.said == [] and not c.keeper.is_due(c.now)
    c.keeper.lead(5, c.now)
    c.run(10.0)
    assert sorted(c.roles) == ["decode", "decode", "prefill"]
    epochs = [assign.epoch for _, assign in c.said]
    assert epochs == [5 << 32 | n for n in range(1, len(epochs) + 1)]
    c.keeper.lead(None, c.now)
    before = len(c.said)
    c.run(5.0)
    assert len(c.said) == before


def test_a_new_term_is_above_all_epochs_of_the_old() -> None:
    c = Cluster(2)
    c.keeper.lead(1, 0.0)
    c.run(5.0)
    old = max(assign.epoch for _, assign in c.said)
    c.instances[0].attached(card("i0", 2), c.now)
    c.keeper.lead(2, c.now)
    c.run(10.0)
    assert c.said[-1][1].epoch > old
    assert sorted(c.roles) == ["decode", "prefill"]


def test_a_word_that_was_lost_is_said_again_with_a_newer_epoch() -> None:
    c = Cluster(2, repeat_s=1.0)
    c.deaf = {"i0", "i1"}
    c.keeper.lead(1, 0.0)
    c.run(1.0)
    name, first = c.said[0]
    num_said = len(c.said)
    c.run(1.5)
    again = [assign for peer, assign in c.said[num_said:] if peer == name]
    assert again[0].role == first.role and again[0].epoch > first.epoch
    c.deaf = set()
    c.run(5.0)
    assert sorted(c.roles) == ["decode", "prefill"]


def test_a_change_that_makes_things_worse_is_taken_back() -> None:
    policy = RolesConfig(
        ttft_slo_s=0.1, tpot_slo_s=0.05, patience_s=0.0, pause_s=0.0, light_load=0.0, margin=0.0
    )
    c = Cluster(2, policy=policy, judged_after=10, hold_s=60.0)
    c.keeper.lead(1, 0.0)
    c.end_requests(100, kept=95)
    while not c.said and c.now < 20:
        for _ in range(3):
            c.keeper.arrived(c.now, 600)
        c.run(0.25)
    assert c.said[0][1].role != "any"
    c.end_requests(50, kept=0)
    c.run(4.0)
    assert c.keeper.num_rollbacks == 0  # they waited for who was there before
    c.end_requests(5, kept=0)
    c.run(0.5)
    assert c.keeper.num_rollbacks == 0  # too few to judge by
    num_said = len(c.said)
    c.end_requests(45, kept=10)
    c.run(0.5)
    assert c.keeper.num_rollbacks == 2
    assert [assign.role for _, assign in c.said[num_said:]] == ["any", "any"]
    num_said = len(c.said)
    for _ in range(40):
        c.keeper.arrived(c.now, 600)
        c.run(0.25)
    assert len(c.said) == num_said  # nothing else is tried for a while


def test_a_change_is_not_blamed_for_what_came_before_it() -> None:
    c = Cluster(2, judged_after=10)
    c.end_requests(100, kept=90)
    before_s = c.now
    c.keeper.lead(1, 0.0)
    c.run(3.0)
    for _ in range(50):
        c.attainment.ended(before_s, False)
    c.run(1.0)
    c.end_requests(20, kept=19)
    c.run(3.0)
    assert c.keeper.num_rollbacks == 0 and sorted(c.roles) == ["decode", "prefill"]


def test_a_change_that_never_comes_to_its_end_is_judged_all_the_same() -> None:
    policy = RolesConfig(static=(2, 2), pause_s=0.0, turning_s=1e9)
    c = Cluster(4, policy=policy, judged_after=10, judged_within_s=10.0)
    c.end_requests(100, kept=90)
    for instance in c.instances:
        instance.others = Others(running=4)  # which nobody hands over
    c.keeper.lead(1, 0.0)
    for _ in range(80):
        c.run(0.5)
        c.end_requests(5, kept=0)
        if c.keeper.num_rollbacks:
            break
    assert c.keeper.num_rollbacks >= 2 and c.now < 30.0


def test_a_change_that_helps_stays() -> None:
    c = Cluster(2, judged_after=10)
    c.end_requests(100, kept=50)
    c.keeper.lead(1, 0.0)
    c.run(3.0)
    c.end_requests(100, kept=90)
    c.run(3.0)
    assert c.keeper.num_rollbacks == 0 and sorted(c.roles) == ["decode", "prefill"]


def work_of_all(c: Cluster) -> Work:
    return c.keeper._of_all(c.keeper.forecast.work(c.now, 100.0))


def test_work_of_other_services_is_reckoned_with() -> None:
    policy = RolesConfig(light_load=1e9)
    c = Cluster(2, policy=policy)
    c.keeper.lead(1, 0.0)
    for _ in range(60):
        c.keeper.arrived(c.now, 100)
        c.run(0.5)
    alone = work_of_all(c).prompt_tokens_per_s
    for instance in c.instances:
        instance.others = Others(running=4)
    for _ in range(60):
        c.keeper.arrived(c.now, 100)
        c.run(0.5)
    assert work_of_all(c).prompt_tokens_per_s > 2 * alone


# --- several who were not elected -----------------------------------------------------------------


class Rivals:
    """Services that each lead the same instances, and disagree. What instances say reaches each
    service `delay` turns later."""

    def __init__(self, terms: list[int], splits: list[tuple[int, int]], delay: int = 0) -> None:
        self.truth: dict[str, tuple[Role, int]] = {f"i{k}": ("any", 0) for k in range(3)}
        self.turns: list[str] = []  # whose word was taken
        self.clusters = []
        self._heard: list[dict[str, tuple[Role, int]]] = [dict(self.truth)] * (delay + 1)
        for term, split in zip(terms, splits):
            policy = RolesConfig(static=split, pause_s=0.0)
            cluster = Cluster(3, policy=policy)
            cluster.keeper.lead(term, 0.0)
            self.clusters.append(cluster)

    @property
    def leading(self) -> list[int]:
        return [i for i, c in enumerate(self.clusters) if c.keeper.term is not None]

    def turn(self, who: int, now: float) -> None:
        c = self.clusters[who]
        for instance in c.instances:
            instance.is_now(*self._heard[0][instance.name])
        view = c.view.of(c.instances, now)
        if c.keeper.is_due(now):
            for send in c.keeper.keep(c.instances, view, c.attainment, 100.0, now):
                assign = send.message
                if assign.epoch > self.truth[send.peer][1]:  # as an instance does it
                    self.truth[send.peer] = (assign.role, assign.epoch)
                    self.turns.append(f"{who} {send.peer} {assign.role}")
        self._heard = [*self._heard[1:], dict(self.truth)]

    def roles(self) -> list[Role]:
        return sorted(role for role, _ in self.truth.values())


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 3),
    st.lists(st.integers(0, 1), min_size=20, max_size=60),
)
def test_of_two_who_were_not_elected_one_wins_and_roles_come_to_rest(
    terms: tuple[int, int], delay: int, order: list[int]
) -> None:
    rivals = Rivals(list(terms), [(1, 2), (2, 1)], delay)
    now = 0.0
    for who in [*order, *([0, 1] * 40)]:
        now += 0.3
        rivals.turn(who, now)
        assert rivals.leading
    settled = len(rivals.turns)
    (winner,) = rivals.leading
    prefills = (1, 2)[winner]
    assert rivals.roles() == ["decode"] * (3 - prefills) + ["prefill"] * prefills
    for _ in range(40):
        now += 0.3
        for who in (0, 1):
            rivals.turn(who, now)
    assert len(rivals.turns) == settled and rivals.leading == [winner]
    loser = rivals.clusters[1 - winner]
    assert loser.keeper.has_yielded
    named = {i.name: i for i in loser.instances}
    with pytest.raises(NotLeading):
        loser.keeper.assign(named, "i0", "any", now)


def test_two_who_agree_leave_each_other_alone() -> None:
    rivals = Rivals([1, 2], [(1, 2), (1, 2)])
    for number in range(60):
        rivals.turn(number % 2, 0.3 * number)
    assert rivals.roles() == ["decode", "decode", "prefill"]
    assert len(rivals.turns) <= 4


def test_who_was_elected_begins_above_whatever_he_hears() -> None:
    c = Cluster(2)
    c.keeper.lead(1, 0.0, elected=True)
    c.instances[0].is_now("prefill", 7 << 32 | 5)
    c.run(5.0)
    assert c.keeper.term == 8 and sorted(c.roles) == ["decode", "prefill"]


def test_two_who_are_not_elected_do_not_climb_over_each_other() -> None:
    """Each has met what the other gave before; only the first look takes that for the past."""
    rivals = Rivals([5, 1], [(1, 2), (2, 1)])
    rivals.turn(0, 0.0)
    for instance in rivals.clusters[1].instances:
        instance.is_now(*rivals.truth[instance.name])
        instance.found_epoch = instance.epoch
    for number in range(1, 60):
        rivals.turn(number % 2, 0.3 * number)
    assert rivals.leading == [1] and rivals.clusters[1].keeper.term == 6


def test_who_is_elected_after_yielding_leads_again() -> None:
    c = Cluster(2)
    c.keeper.lead(1, 0.0)
    c.instances[0].is_now("prefill", 2 << 32 | 1)
    c.run(1.0)
    assert c.keeper.term is None and c.keeper.has_yielded
    c.keeper.lead(3, c.now)
    c.run(5.0)
    assert c.keeper.term == 3 and sorted(c.roles) == ["decode", "prefill"]
