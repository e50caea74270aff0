"""Bugs planted in the cores are found by storms within a few dozen seeds, and made small."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock.engine.core import InstanceCore
from penstock.protocol.effects import Effect, Reply, SetTimer
from penstock.protocol.errors import Overloaded
from penstock.protocol.instance import Assign
from penstock.protocol.tokens import Tokens
from penstock.service.core import ServiceCore
from penstock.service.journal import Entry
from penstock.simulator.storms import storm as storm_module
from penstock.simulator.storms.draw import storm_of
from penstock.simulator.storms.play import Verdict, play, words_of
from penstock.simulator.storms.shrink import Shrinker
from penstock.simulator.storms.storm import Ask, Assignment, Lead, Noise, Raise, Shape, Slow, Storm


@pytest.fixture(autouse=True)
def _quiet(logging_as_it_was: None) -> None:
    """Worlds full of faults log them. (`conftest.py` puts levels back.)"""
    logging.getLogger("penstock").setLevel(logging.CRITICAL)


Core = InstanceCore | ServiceCore
SEEDS = range(60)


def _wrap(
    owner: object, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    setattr(owner, name, make(getattr(owner, name)))


# --- planted in the service ----------------------------------------------------------------------


def attempts_are_not_compared(core: Core) -> None:
    if not isinstance(core, ServiceCore):
        return

    def make(act: Callable[..., Any]) -> Callable[..., Any]:
        def on_message(peer: str, message: Any, now: float) -> list[Effect]:
            known = core.instances.get(peer)
            if isinstance(message, Tokens) and known is not None:
                rows = [
                    msgspec.structs.replace(row, attempt=known.entries[row.request_id].attempt)
                    if row.request_id in known.entries
                    else row
                    for row in message.rows
                ]
                message = msgspec.structs.replace(message, rows=rows)
            found: list[Effect] = act(peer, message, now)
            return found

        return on_message

    _wrap(core, "on_message", make)


def incarnations_are_not_compared(core: Core) -> None:
    if not isinstance(core, ServiceCore):
        return

    def make(act: Callable[..., Any]) -> Callable[..., Any]:
        def on_message(peer: str, message: Any, now: float) -> list[Effect]:
            known = core.instances.get(peer)
            if known is not None and hasattr(message, "incarnation"):
                message = msgspec.structs.replace(message, incarnation=known.incarnation)
            found: list[Effect] = act(peer, message, now)
            return found

        return on_message

    _wrap(core, "on_message", make)


def a_counter_is_not_taken_back(core: Core) -> None:
    """Of those who go away before their first token."""
    if not isinstance(core, ServiceCore):
        return

    def make(close: Callable[..., Any]) -> Callable[..., Any]:
        def counted(entry: Entry, finish: str) -> Any:
            effects = close(entry, finish)
            core.placement.num_queued += finish == "cancelled" and not entry.emitted
            return effects

        return counted

    _wrap(core.placement, "close", make)


def a_resumed_request_ends_twice(core: Core) -> None:
    if not isinstance(core, ServiceCore):
        return

    def make(act: Callable[..., Any]) -> Callable[..., Any]:
        def on_message(peer: str, message: Any, now: float) -> list[Effect]:
            before = core.placement.num_resumed
            effects: list[Effect] = act(peer, message, now)
            last: list[Effect] = [
                e for e in effects if isinstance(e, Reply) and e.event.finish is not None
            ]
            return effects + last if before else effects

        return on_message

    _wrap(core, "on_message", make)


def everybody_is_refused(core: Core) -> None:
    if not isinstance(core, ServiceCore):
        return

    def refuse(spec: Any, now: float) -> list[Effect]:
        raise Overloaded("nobody comes in")

    core.submit = refuse  # type: ignore[method-assign]


def answers_end_where_a_queue_is_full(core: Core) -> None:
    """Also those that have begun, after a hand-over or a crash."""
    if not isinstance(core, InstanceCore):
        return
    scheduler = core.scheduler

    def make(add: Callable[..., Any]) -> Callable[..., Any]:
        def bounded(submit: Any, hands_over: bool = False) -> Any:
            if submit.resumed_ids and scheduler.num_here()[1] >= 1:
                raise Overloaded("no room")
            return add(submit, hands_over)

        return bounded

    _wrap(scheduler, "add", make)


def one_of_the_interrupted_is_forgotten(core: Core) -> None:
    if not isinstance(core, ServiceCore):
        return

    def make(evacuate: Callable[..., Any]) -> Callable[..., Any]:
        def all_but_one(instance: Any, now: float) -> Any:
            entries = list(instance.entries.values())
            effects = evacuate(instance, now)
            for entry in entries[-1:]:
                if entry.key in [e.key for e in core.journal]:
                    core.placement.close(entry, "forgotten")
            return effects

        return all_but_one

    _wrap(core.placement, "evacuate", make)


# --- planted in instances ------------------------------------------------------------------------


def older_leaders_are_believed(core: Core) -> None:
    if not isinstance(core, InstanceCore):
        return

    def make(act: Callable[..., Any]) -> Callable[..., Any]:
        def on_message(peer: str, message: Any, now: float) -> list[Effect]:
            if isinstance(message, Assign):
                core.epoch = min(core.epoch, message.epoch - 1)
            found: list[Effect] = act(peer, message, now)
            return found

        return on_message

    _wrap(core, "on_message", make)


def a_block_is_freed_twice(core: Core) -> None:
    """When a sequence that runs is cancelled."""
    if not isinstance(core, InstanceCore):
        return
    pool = core.scheduler.pool

    def make(cancel: Callable[..., Any]) -> Callable[..., Any]:
        def twice(key: Any, attempt: Any = None) -> Any:
            blocks = [b for s in core.scheduler.live() if s.key == key for b in s.blocks]
            update = cancel(key, attempt)
            if update is not None and blocks and blocks[-1] in pool._free:
                pool._free.append(blocks[-1])
            return update

        return twice

    _wrap(core.scheduler, "cancel", make)


def what_did_not_arrive_is_used(core: Core) -> None:
    if not isinstance(core, InstanceCore):
        return

    def make(act: Callable[..., Any]) -> Callable[..., Any]:
        def on_moved(moved: Any, now: float) -> Any:
            ok = (True,) * len(moved.ok)
            return act(type(moved)(moved.number, ok, moved.num_bytes, moved.seconds), now)

        return on_moved

    _wrap(core, "on_moved", make)


def blocks_are_lent_for_ever(core: Core) -> None:
    if isinstance(core, InstanceCore):
        core.exchange.offers.poll = lambda now: []  # type: ignore[method-assign]


def a_timer_is_not_set_again(core: Core) -> None:
    """After a second."""
    if not isinstance(core, InstanceCore):
        return

    def make(act: Callable[..., Any]) -> Callable[..., Any]:
        def quiet(*args: Any) -> list[Effect]:
            effects: list[Effect] = act(*args)
            return [e for e in effects if args[-1] < 1.0 or not isinstance(e, SetTimer)]

        return quiet

    for name in ("on_timer", "on_message", "on_step_done", "on_moved"):
        _wrap(core, name, make)


PLANTS = (
    attempts_are_not_compared,
    incarnations_are_not_compared,
    a_counter_is_not_taken_back,
    a_resumed_request_ends_twice,
    everybody_is_refused,
    answers_end_where_a_queue_is_full,
    one_of_the_interrupted_is_forgotten,
    older_leaders_are_believed,
    a_block_is_freed_twice,
    what_did_not_arrive_is_used,
    blocks_are_lent_for_ever,
    a_timer_is_not_set_again,
)


#: Two who both think that they lead, and speak at once: what a storm of a seed rarely comes to.
TWO_LEADERS = Storm(
    seed=1,
    shape=Shape(num_instances=3, num_services=2, latency_s=0.05),
    asks=(Ask(number=0, at_s=0.6, own_tokens=60, max_tokens=60),),
    faults=(
        Lead(at_s=1.0, service="t"),
        Assignment(at_s=1.2, service="t", node="a", role="prefill"),
        Assignment(at_s=1.21, service="s", node="a", role="decode"),
    ),
)


def first_failure(plant: Callable[[Core], None]) -> Verdict:
    for storm in (TWO_LEADERS, *map(storm_of, SEEDS)):
        verdict = play(storm, plant=plant)
        if not verdict.ok:
            return verdict
    raise AssertionError(f"{plant.__name__} is not found in {len(SEEDS)} storms")


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Callable[[Core], None]) -> None:
    found = first_failure(plant)
    assert play(found.storm).ok  # without it there is nothing to find
    again = play(found.storm, plant=plant)
    assert (again.failure, again.digest) == (found.failure, found.digest)


def test_what_fails_is_made_small_and_can_be_pasted() -> None:
    def planted(storm: Storm) -> Verdict:
        return play(storm, plant=a_resumed_request_ends_twice)

    found = next(v for v in map(planted, map(storm_of, SEEDS)) if not v.ok)
    smallest = Shrinker(planted, most_plays=150).shrink(found)
    storm = smallest.storm
    assert smallest.where == found.where
    assert len(storm.faults) <= 2
    assert len(storm.asks) <= len(found.storm.asks) / 2
    pasted = eval(str(storm), vars(storm_module))
    assert pasted == storm
    assert planted(pasted).failure == smallest.failure
    assert play(pasted).ok


def test_settings_go_back_to_what_they_usually_are() -> None:
    shape = Shape(
        max_waiting=3, max_queue=6, max_run_steps=8, latency_s=0.05, enable_prefix_caching=False,
        max_chunk_tokens=32, ttft_slo_s=0.5, policy="least-load",
    )  # fmt: skip
    faults = (
        Slow(at_s=1.0, node="a", factor=100.0, for_s=1.0),
        Raise(at_s=2.0, node="a", count=3),
        Noise(at_s=3.0, for_s=1.0, late_s=2.0),
    )

    def fails(storm: Storm) -> Verdict:
        return Verdict(storm, "as before" if len(storm.faults) == 3 else "")

    storm = Shrinker(fails).shrink(fails(Storm(seed=1, shape=shape, faults=faults))).storm
    assert storm.shape == Shape(num_instances=1, means=())
    assert storm.faults == (
        Slow(at_s=1.0, node="a", factor=2.0, for_s=1.0),
        Raise(at_s=2.0, node="a"),
        Noise(at_s=3.0, for_s=1.0),
    )


def test_another_failure_at_the_same_check_is_another_one() -> None:
    """Both are told by one function; the smaller storm would have been the wrong one."""

    def fails(storm: Storm) -> Verdict:
        waits = f"r{len(storm.asks)} has not ended {len(storm.asks)}.5 s after all was well"
        what = waits if len(storm.asks) >= 2 else "r0 gets another word"
        return Verdict(storm, what, "play.py:_check", words=words_of(what))

    asks = tuple(Ask(number=n, at_s=1.0) for n in range(7))
    smallest = Shrinker(fails).shrink(fails(Storm(seed=1, asks=asks)))
    assert len(smallest.storm.asks) == 2
    assert smallest.words == "has not ended after all was well"
