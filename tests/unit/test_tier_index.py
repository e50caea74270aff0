"""The books of the slower tiers against a naive model, and what the model does not show."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.engine.memory.tiers.index import (
    MAX_FAILURES_IN_A_ROW,
    NO_TIERS,
    StorePlan,
    TierIndex,
    TierSizes,
)
from penstock.protocol.kv import KEY_BYTES, KvChange, Tier, split_keys


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def names(packed: bytes | list[bytes]) -> list[int]:
    found = split_keys(packed) if isinstance(packed, bytes) else packed
    return [int.from_bytes(k, "little") for k in found]


def entered(index: TierIndex, *numbers: int) -> None:
    index.follow([KvChange("stored", b"".join(keys(*numbers)))])


def left(index: TierIndex, *numbers: int) -> None:
    index.follow([KvChange("removed", b"".join(keys(*numbers)))])


def store(index: TierIndex, *numbers: int) -> list[StorePlan]:
    """Plan and carry out, one after the other, all well."""
    plans = [plan for number in numbers for plan in _store(index, number)]
    return plans


def _store(index: TierIndex, number: int) -> list[StorePlan]:
    plans = index.plan_store([key(number)])
    for plan in plans:
        index.end_store(plan, [True] * len(plan.keys), [True] * len(plan.before))
    return plans


# ---- one list -------------------------------------------------------------------------------


def test_what_leaves_the_device_goes_down_tier_by_tier() -> None:
    index = TierIndex(TierSizes(host_blocks=2, disk_blocks=2))
    for number in range(6):  # evicted one after the other, their bytes still there
        store(index, number)
        index.check()
    assert names(index.keys("host")) == [4, 5]
    assert names(index.keys("disk")) == [2, 3]
    assert index.match(keys(5, 4, 3, 2, 1)) == ["host", "host", "disk", "disk"]
    assert index.stats["disk"].evicted == 2 and index.stats["host"].demoted == 4
    said = [(c.op, c.tier, names(c.keys)) for c in index.take_changes()]
    assert said[:3] == [
        ("stored", "host", [0, 1]), ("moved", "disk", [0]), ("stored", "host", [2])
    ]  # fmt: skip
    assert said[-3:] == [
        ("removed", "disk", [1]), ("moved", "disk", [3]), ("stored", "host", [5])
    ]  # fmt: skip


def test_match_ends_at_the_first_hole() -> None:
    index = TierIndex(TierSizes(host_blocks=4))
    store(index, 3, 1)
    assert index.match(keys(1, 2, 3)) == ["host"]
    assert index.match(keys(2, 3)) == []


def test_a_loaded_copy_is_spare_and_goes_first_and_needs_no_second_write() -> None:
    index = TierIndex(TierSizes(host_blocks=3))
    store(index, 1, 2, 3)
    index.begin_load("host", keys(1))
    index.end_load("host", keys(1), [True])
    entered(index, 1)
    left(index, 1)  # evicted again while its copy was still there
    assert index.plan_store(keys(1)) == []
    assert names(index.keys("host")) == [2, 3, 1]  # and young now
    entered(index, 3)
    (plan,) = store(index, 4)
    assert [(names([d.key]), d.to) for d in plan.before] == [([3], None)]
    assert names(index.keys("host")) == [2, 1, 4]


def test_what_is_stored_ahead_is_not_given_up_for_more_of_its_kind() -> None:
    index = TierIndex(TierSizes(host_blocks=2))
    entered(index, 1, 2, 3)
    (plan,) = index.plan_store(keys(1, 2, 3))
    assert names(list(plan.keys)) == [1, 2]  # as many as there is room for
    index.end_store(plan, [True, True])
    assert index.plan_store(keys(1, 2, 3)) == []
    index.touch(keys(1))  # used again: the device will not evict it soon
    (plan,) = store(index, 3)
    assert [names([d.key]) for d in plan.before] == [[1]]


def test_a_chain_loses_its_end_first() -> None:
    index = TierIndex(TierSizes(host_blocks=3, disk_blocks=2))
    store(index, 5, 4, 3, 2, 1)  # leaves first, as the pool evicts
    assert index.match(keys(1, 2, 3, 4, 5)) == ["host"] * 3 + ["disk"] * 2
    store(index, 9)
    assert index.match(keys(1, 2, 3, 4, 5)) == ["host"] * 2 + ["disk"] * 2


# ---- what may go wrong ----------------------------------------------------------------------


def test_what_is_being_loaded_is_not_evicted() -> None:
    index = TierIndex(TierSizes(host_blocks=2))
    store(index, 1, 2)
    index.begin_load("host", keys(1))
    (plan,) = store(index, 3)
    assert [names([d.key]) for d in plan.before] == [[2]]
    index.begin_load("host", keys(3))
    assert index.plan_store(keys(4)) == []  # nothing may go
    index.end_load("host", keys(1), [True])
    assert len(store(index, 4)) == 1


def test_two_loads_of_one_key_pin_it_twice() -> None:
    index = TierIndex(TierSizes(host_blocks=1))
    store(index, 1)
    index.begin_load("host", keys(1))
    index.begin_load("host", keys(1))
    index.end_load("host", keys(1), [True])
    assert index.plan_store(keys(2)) == []
    index.end_load("host", keys(1), [True])
    assert index.plan_store(keys(2)) != []


def test_a_spoilt_block_is_gone_and_said_to_be() -> None:
    index = TierIndex(TierSizes(host_blocks=1, disk_blocks=2))
    store(index, 1, 2)
    index.take_changes()
    index.begin_load("disk", keys(1))
    index.end_load("disk", keys(1), [False])
    assert index.match(keys(1)) == []
    assert [(c.op, c.tier, names(c.keys)) for c in index.take_changes()] == [
        ("removed", "disk", [1])
    ]
    index.check()


def test_room_is_reserved_before_the_store_begins_and_given_back_if_it_fails() -> None:
    index = TierIndex(TierSizes(host_blocks=1))
    (plan,) = index.plan_store(keys(1))
    assert index.match(keys(1)) == []  # not there yet
    assert index.plan_store(keys(2)) == []  # and no room for another
    assert index.plan_store(keys(1)) == []  # nor twice
    index.end_store(plan, [False])
    assert index.keys("host") == [] and len(index.plan_store(keys(2))) == 1


def test_a_demotion_that_fails_loses_the_block_alone() -> None:
    index = TierIndex(TierSizes(host_blocks=1, disk_blocks=1))
    store(index, 1)
    (plan,) = index.plan_store(keys(2))
    assert index.match(keys(1)) == []  # on its way
    index.take_changes()
    index.end_store(plan, [True], [False])
    assert index.match(keys(2)) == ["host"] and index.match(keys(1)) == []
    assert [(c.op, c.tier, names(c.keys)) for c in index.take_changes()] == [
        ("removed", "host", [1]), ("stored", "host", [2])
    ]  # fmt: skip
    index.check()


def test_a_job_that_never_ran_has_failed_in_all() -> None:
    index = TierIndex(TierSizes(host_blocks=1, disk_blocks=1))
    store(index, 1)
    (plan,) = index.plan_store(keys(2))
    index.end_store(plan, [False])
    assert index.keys("host") == index.keys("disk") == []
    (plan,) = store(index, 3)
    assert names([d.key for d in plan.before]) == [1], "its bytes are still there"
    index.check()


def test_what_is_being_carried_out_is_not_stored_beside_that() -> None:
    index = TierIndex(TierSizes(host_blocks=2))
    store(index, 1, 2)
    (drops_1,) = index.plan_store(keys(3))
    assert [names([d.key]) for d in drops_1.before] == [[1]]
    assert index.plan_store(keys(1)) == []  # the other job might drop it again
    index.end_store(drops_1, [True], [True])
    assert len(store(index, 1)) == 1 and index.match(keys(1)) == ["host"]


def test_what_was_never_dropped_is_dropped_before_it_is_stored_again() -> None:
    index = TierIndex(TierSizes(host_blocks=2))
    store(index, 1, 2)
    (never_ran,) = index.plan_store(keys(3))
    index.end_store(never_ran, [False])
    (plan,) = store(index, 1)
    assert [(names([d.key]), d.to) for d in plan.before] == [([1], None)]
    assert index.match(keys(2)) == index.match(keys(1)) == ["host"]


def test_a_job_that_ends_late_does_not_drop_what_was_stored_meanwhile() -> None:
    index = TierIndex(TierSizes(disk_blocks=3))
    (first,) = index.plan_store(keys(2, 0))
    (second,) = index.plan_store(keys(1))
    index.end_store(first, [False, True])
    (third,) = index.plan_store(keys(2))
    index.end_store(second, [True])
    (fourth,) = index.plan_store(keys(3))
    assert [names([d.key]) for d in fourth.before] == [[0]]
    assert index.plan_store(keys(0)) == []
    index.end_store(third, [False])
    assert index.plan_store(keys(0)) == [], "there is room, but the fourth may yet drop it"
    index.end_store(fourth, [False], [True])
    assert names(index.keys("disk")) == [1]
    (again,) = store(index, 0)
    assert again.before == () and names(index.keys("disk")) == [1, 0]
    index.check()


def test_a_key_on_its_way_down_is_not_stored_above_nor_said_to_leave_twice() -> None:
    index = TierIndex(TierSizes(host_blocks=3, disk_blocks=1))
    (first,) = index.plan_store(keys(2, 0))
    (second,) = index.plan_store(keys(1))
    index.end_store(first, [False, True])
    (third,) = index.plan_store(keys(2))
    index.end_store(second, [True])
    (fourth,) = index.plan_store(keys(3))
    assert [(names([d.key]), d.to) for d in fourth.before] == [([0], "disk")]
    assert index.plan_store(keys(0)) == []
    index.end_store(third, [False])
    index.end_store(fourth, [False], [True])
    store(index, 1, 2)
    said = [(c.op, c.tier, names(c.keys)) for c in index.take_changes()]
    assert said == [
        ("stored", "host", [0, 1]), ("moved", "disk", [0]), ("stored", "host", [2])
    ]  # fmt: skip
    assert index.match(keys(0, 1, 2)) == ["disk", "host", "host"]
    index.check()


def test_room_that_another_job_has_yet_to_make_is_not_given_away() -> None:
    index = TierIndex(TierSizes(host_blocks=2))
    store(index, 1, 2)
    index.follow([KvChange("cleared")])  # the bytes of both are still there
    (plan,) = index.plan_store(keys(3))
    (other,) = index.plan_store(keys(4))
    assert [names([d.key]) for d in (*plan.before, *other.before)] == [[1], [2]]
    index.end_store(other, [True], [True])
    index.end_store(plan, [True], [True])
    assert names(index.keys("host")) == [4, 3]


def test_what_goes_down_into_a_tier_that_is_given_up_has_left_the_one_above() -> None:
    index = TierIndex(TierSizes(host_blocks=1, disk_blocks=32))
    store(index, *range(MAX_FAILURES_IN_A_ROW + 1))
    (down,) = index.plan_store(keys(100))
    index.begin_load("disk", keys(*range(MAX_FAILURES_IN_A_ROW)))
    index.end_load("disk", keys(*range(MAX_FAILURES_IN_A_ROW)), [False] * MAX_FAILURES_IN_A_ROW)
    index.take_changes()
    index.end_store(down, [True], [True])
    assert [(c.op, c.tier, names(c.keys)) for c in index.take_changes()] == [
        ("removed", "host", [MAX_FAILURES_IN_A_ROW]), ("stored", "host", [100])
    ]  # fmt: skip
    index.check()


def test_a_tier_that_only_fails_is_given_up_and_the_next_one_serves() -> None:
    index = TierIndex(TierSizes(host_blocks=32, disk_blocks=32))
    store(index, 100)
    for number in range(MAX_FAILURES_IN_A_ROW):
        (plan,) = index.plan_store(keys(number))
        index.end_store(plan, [False])
    assert index.match(keys(100)) == []
    assert index.take_changes()[-1] == KvChange("cleared", tier="host")
    (plan,) = store(index, 1)
    assert plan.tier == "disk" and index.match(keys(1)) == ["disk"]
    index.check()


def test_what_comes_too_late_for_a_tier_that_is_given_up_is_own_below() -> None:
    index = TierIndex(TierSizes(host_blocks=32, disk_blocks=2), {"disk": keys(100)})
    (late,) = index.plan_store(keys(100))
    for number in range(MAX_FAILURES_IN_A_ROW):
        (plan,) = index.plan_store(keys(number))
        index.end_store(plan, [False])
    index.end_store(late, [True])
    assert index.match(keys(100)) == ["disk"]
    index.check()


def test_a_success_in_between_keeps_a_tier() -> None:
    index = TierIndex(TierSizes(host_blocks=32))
    for number in range(5 * MAX_FAILURES_IN_A_ROW):
        (plan,) = index.plan_store(keys(number))
        index.end_store(plan, [number % 4 == 0])
    assert index.stats["host"].capacity == 32


def test_new_weights_forget_everything_also_what_is_still_being_written() -> None:
    index = TierIndex(TierSizes(host_blocks=2))
    store(index, 1)
    (old,) = index.plan_store(keys(2))
    index.follow([KvChange("cleared")])
    index.end_store(old, [True])
    assert index.keys("host") == [] and index.match(keys(1, 2)) == []
    plans = store(index, 3, 4)  # now their bytes are dropped
    assert [names([d.key for d in plan.before]) for plan in plans] == [[1], [2]]
    index.check()


def test_blocks_of_an_earlier_life_are_there_and_the_oldest_goes_first() -> None:
    index = TierIndex(TierSizes(disk_blocks=3), {"disk": keys(1, 2, 3)})
    assert index.match(keys(3, 2, 1)) == ["disk"] * 3
    (plan,) = store(index, 4)
    assert [names([d.key]) for d in plan.before] == [[1]]


# ---- the shared store -----------------------------------------------------------------------


def test_the_store_is_asked_for_what_no_tier_has_and_not_again_after_a_miss() -> None:
    index = TierIndex(TierSizes(host_blocks=1, store=True))
    plans = store(index, 1)
    assert [plan.tier for plan in plans] == ["host", "store"]
    assert index.match(keys(1, 2, 3)) == ["host", "store", "store"]
    index.begin_load("store", keys(2, 3))
    index.end_load("store", keys(2, 3), [True, False])
    assert index.match(keys(1, 2, 3)) == ["host", "store"]
    entered(index, 3)  # computed here; another instance may have it evicted from the store
    left(index, 3)
    assert index.match(keys(3)) == ["store"]


def test_what_the_store_has_is_not_put_again_unless_the_put_failed() -> None:
    index = TierIndex(TierSizes(store=True))
    (plan,) = index.plan_store(keys(1, 2))
    assert index.plan_store(keys(1, 2)) == []
    index.end_store(plan, [True, False])
    (again,) = index.plan_store(keys(1, 2))
    assert names(list(again.keys)) == [2]


def test_over_no_tiers_nothing_happens() -> None:
    entered(NO_TIERS, 1)
    assert not NO_TIERS.enabled
    assert NO_TIERS.match(keys(1)) == [] and NO_TIERS.plan_store(keys(1)) == []
    assert NO_TIERS.keys("host") == [] and NO_TIERS.take_changes() == []
    left(NO_TIERS, 1)


# ---- against a model ------------------------------------------------------------------------


NUMBERS = st.integers(0, 7)
TROUBLES = st.sampled_from(["few failures", "tiers given up", "new weights"])


@dataclass
class Running:
    """A store under way: it works off the plan's steps, then its keys, one at a time."""

    plan: StorePlan
    weights: int
    demoted: list[bool] = field(default_factory=list)
    ok: list[bool] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        num_done = len(self.demoted) + len(self.ok)
        return len(self.plan.before) + len(self.plan.keys) - num_done


class Books(RuleBasedStateMachine):
    """Random stores, loads, failures and traffic on the device, in any order, each store carried
    out step by step beside the others. Beside the books stand a data plane (which key's bytes are
    where) and a router (which follows the events)."""

    @initialize(host=st.integers(0, 4), disk=st.integers(0, 4), trouble=TROUBLES)
    def start(self, host: int, disk: int, trouble: str) -> None:
        self.capacity = {"host": host, "disk": disk}
        self.index = TierIndex(TierSizes(host, disk))
        self.device: set[int] = set()
        self.said: dict[str, set[int]] = {"host": set(), "disk": set()}  # by the events
        #: What the data plane has, and of which weights.
        self.bytes: dict[str, dict[int, int]] = {"host": {}, "disk": {}}
        self.weights = 0
        self.stores: list[Running] = []
        self.loads: list[tuple[Tier, list[int], int]] = []
        self.trouble = trouble
        self.failures = 0

    @rule(number=NUMBERS)
    def enter_device(self, number: int) -> None:
        if number not in self.device:
            self.device.add(number)
            entered(self.index, number)

    @rule(number=NUMBERS)
    def leave_device(self, number: int) -> None:
        if number in self.device:
            self.device.remove(number)
            left(self.index, number)

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=5))
    def touch(self, numbers: list[int]) -> None:
        self.index.touch(keys(*numbers))

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=4))
    def begin_store(self, numbers: list[int]) -> None:
        for plan in self.index.plan_store(keys(*numbers)):
            assert set(names(list(plan.keys))) <= set(numbers)
            pinned = {(tier, n) for tier, loaded, _ in self.loads for n in loaded}
            for step in plan.before:
                assert (step.tier, names([step.key])[0]) not in pinned, (
                    "evicted while it was loaded"
                )
            self.stores.append(Running(plan, self.weights))

    @precondition(lambda self: self.stores)
    @rule(data=st.data())
    def go_on_with_a_store(self, data: st.DataObject) -> None:
        running = data.draw(st.sampled_from(self.stores))
        for _ in range(data.draw(st.sampled_from([running.num_left, 1]))):
            self.one_step(running, data)

    @precondition(lambda self: self.stores)
    @rule(data=st.data())
    def end_store(self, data: st.DataObject) -> None:
        running = self.stores.pop(data.draw(st.integers(0, len(self.stores) - 1)))
        plan = running.plan
        untouched = running.num_left == len(plan.before) + len(plan.keys)
        if untouched and self.may_fail(running.num_left) and data.draw(st.booleans()):
            self.failures += running.num_left
            self.index.end_store(plan, [False] * len(plan.keys))  # it never ran
            return
        while running.num_left:
            self.one_step(running, data)
        self.index.end_store(plan, running.ok, running.demoted)

    def one_step(self, running: Running, data: st.DataObject) -> None:
        plan = running.plan
        if not running.num_left:
            return
        well = not self.may_fail(1) or data.draw(st.booleans())
        if len(running.demoted) < len(plan.before):
            step = plan.before[len(running.demoted)]
            number = names([step.key])[0]
            weights = self.bytes[step.tier].get(number)
            if step.to is not None:
                well = well and weights is not None
                well = well and self.put(step.to, number, weights)
            self.bytes[step.tier].pop(number, None)
            running.demoted.append(well)
        else:
            number = names([plan.keys[len(running.ok)]])[0]
            well = well and self.put(plan.tier, number, running.weights)
            running.ok.append(well)
        self.failures += not well

    def put(self, tier: Tier, number: int, weights: int | None) -> bool:
        """What `TierData.store` does."""
        assert weights is not None
        held = self.bytes[tier]
        if number in held:
            return True
        if len(held) == self.capacity[tier]:
            assert not self.index.stats[tier].capacity, "no room for what was promised some"
            return False
        held[number] = weights
        return True

    def may_fail(self, count: int) -> bool:
        return self.trouble == "tiers given up" or self.failures + count < MAX_FAILURES_IN_A_ROW

    @precondition(lambda self: self.trouble == "new weights")
    @rule()
    def change_weights(self) -> None:
        self.weights += 1
        self.device.clear()
        self.index.follow([KvChange("cleared")])

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=4, unique=True))
    def begin_load(self, numbers: list[int]) -> None:
        found = self.index.match(keys(*numbers))
        assert len(found) <= len(numbers)
        for number, tier in zip(numbers, found):
            assert number in self.said[tier]
            if tier == "disk":
                assert number not in self.said["host"]
        if len(found) < len(numbers):
            missing = numbers[len(found)]
            assert missing not in self.said["host"] - self.on_the_way() | self.said["disk"]
        if found:
            first = [n for n, tier in zip(numbers, found) if tier == found[0]]
            self.index.begin_load(found[0], keys(*first))
            self.loads.append((found[0], first, self.weights))

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def end_load(self, data: st.DataObject) -> None:
        tier, numbers, weights = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        ran = not self.may_fail(len(numbers)) or data.draw(st.booleans())
        ok = []
        for number in numbers:
            found = self.bytes[tier].get(number)
            assert found in (weights, None), "bytes of other weights"
            well = found is not None and (not self.may_fail(1) or data.draw(st.booleans()))
            if ran and not well:
                self.bytes[tier].pop(number, None)
            ok.append(ran and well)
            self.failures += not ok[-1]
        self.index.end_load(tier, keys(*numbers), ok)

    @invariant()
    def the_books_hold(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check()
        for change in self.index.take_changes():
            found = set(names(change.keys))
            if change.op == "removed":
                assert found <= self.said[change.tier], "removed, but never stored"
                self.said[change.tier] -= found
            elif change.op == "cleared":
                self.said[change.tier].clear()
            else:
                self.said[change.tier] |= found
                if change.op == "moved":
                    self.said["host"] -= found
        for tier in ("host", "disk"):
            held = set(names(self.index.keys(tier)))
            # Until it has arrived, what is on its way down is in the host by the events.
            assert held | self.on_the_way() >= self.said[tier]
            assert held <= self.said[tier]
            there = {n for n, weights in self.bytes[tier].items() if weights == self.weights}
            assert held <= there, "believed, but not there"
            assert len(held) <= self.capacity[tier]

    def on_the_way(self) -> set[int]:
        steps = [step for each in self.stores for step in each.plan.before if step.to == "disk"]
        return set(names([step.key for step in steps]))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 3),
    st.lists(st.integers(0, 9), max_size=60),
)
def test_all_tiers_together_are_one_list(a: int, b: int, c: int, used: list[int]) -> None:
    """Blocks without chains, used one after the other, through a device of `a`, a host tier of `b`
    and a disk of `c`, against a list of a + b + c."""
    index = TierIndex(TierSizes(b, c))
    device: list[int] = []  # oldest first
    everything: list[int] = []
    for number in used:
        found = number in device or index.match([key(number)]) != []
        assert found == (number in everything)
        if number not in device and found:
            (tier,) = index.match([key(number)])
            index.begin_load(tier, [key(number)])
            index.end_load(tier, [key(number)], [True])
        everything = [*(n for n in everything if n != number), number][-(a + b + c) :]
        everything = everything if a + b + c else []
        if number not in device:
            entered(index, number)
        device = [*(n for n in device if n != number), number]
        if len(device) > a:
            victim = device.pop(0)
            left(index, victim)
            store(index, victim)
        index.check()


Books.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestBooks = Books.TestCase
