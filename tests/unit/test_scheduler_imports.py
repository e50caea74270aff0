"""Windows, holds and imports where they meet running sequences, case by case."""

from __future__ import annotations

import cProfile
import pstats

from tests.helpers.scheduling import Harness, extend, submit, undisturbed_output

from penstock.engine.scheduler.imports import Import
from penstock.protocol.kv import split_keys
from penstock.protocol.request import Submit

BLOCK = 16


def fill(harness: Harness, imp: Import, ids: list[int], blocks: list[int], start: int) -> None:
    """What a data plane does."""
    for index, block in enumerate(blocks, start):
        prefix, cells = 0, []
        for token_id in ids[: (index + 1) * BLOCK]:
            prefix = extend(prefix, token_id)
            cells.append(prefix)
        harness.runner.kv[block] = list(cells[-BLOCK:])


def bring(harness: Harness, request: Submit, num_blocks: int, *, windows: bool = True) -> Import:
    """An import of the first blocks of a request that has come whole; still held."""
    scheduler = harness.scheduler
    keys = split_keys(request.block_keys)[:num_blocks]
    imp = scheduler.holds.begin_import(keys)
    assert imp is not None
    start = len(imp.blocks)
    taken = scheduler.holds.take_room(imp, num_blocks - start, windows, scheduler.room.spare())
    assert len(taken) == num_blocks - start
    fill(harness, imp, request.prompt_ids, taken, start)
    assert scheduler.holds.filled(imp, start, [True] * len(taken)) == len(taken)
    scheduler.holds.give_up(imp)
    return imp


def test_who_is_let_in_keeps_windows_that_its_victim_held_alone() -> None:
    harness = Harness(8, num_windows=8, max_num_seqs=1, max_model_len=128)
    scheduler = harness.scheduler
    prompt = list(range(100, 100 + 4 * BLOCK))
    victim = submit("offline", [*prompt, 1, 2], offline=True, max_tokens=20)
    imp = bring(harness, victim, 4)
    scheduler.add(victim)
    harness.step()
    scheduler.holds.release(imp)
    harness.step()
    online = submit("online", [*prompt, 3], max_tokens=8)
    scheduler.add(online)
    harness.run()
    for request in (victim, online):
        expected, finish = undisturbed_output(request, 128)
        assert harness.output(request.request_id) == expected
        assert harness.finish(request.request_id) == finish
    assert scheduler.stats.preemptions == 1
    assert scheduler.stats.prefix_hit_tokens == 2 * 4 * BLOCK  # the online one, too
    assert sorted(scheduler.take_released_windows()) == [8, 9, 10, 11]


def test_what_was_built_on_a_stale_page_counts_for_nothing() -> None:
    """Two steps are in flight when the first is found to have read somebody else's page: neither
    id counts, and the sequence comes back with what it had."""
    harness = Harness(16, depth=2, num_windows=8, max_model_len=200)
    scheduler = harness.scheduler
    request = submit("r", 4 * BLOCK + 1, max_tokens=24)
    imp = bring(harness, request, 4)
    scheduler.add(request)
    for _ in range(6):
        harness.step()
    scheduler.holds.release(imp)
    while len(harness.in_flight) < 2:
        harness.launch()
    known = len(harness.output("r"))
    harness.land(stale=harness.runner.num_blocks)
    assert len(harness.output("r")) == known
    (seq,) = scheduler.live()
    assert seq.num_placeholders == 1 and not seq.blocks
    harness.land()
    assert len(harness.output("r")) == known and not seq.num_placeholders
    harness.run()
    assert harness.output("r") == undisturbed_output(request, 200)[0]
    assert len(scheduler.take_released_windows()) == 4 and scheduler.pool.num_held == 0


def test_nothing_is_kept_behind_a_window() -> None:
    harness = Harness(16, num_windows=4, max_model_len=200)
    request = submit("r", 3 * BLOCK + 1, max_tokens=40)
    imp = bring(harness, request, 2)
    harness.scheduler.add(request)
    harness.step()
    harness.scheduler.holds.release(imp)
    harness.run()
    pool = harness.scheduler.pool
    assert pool.num_keys == 0 and pool.num_free == 16
    assert not harness.scheduler.take_kv_changes()  # nobody was told of what nobody can count on
    assert len(harness.scheduler.take_released_windows()) == 2
    assert pool.num_free_windows == 4


def test_a_window_goes_back_only_after_the_steps_that_read_it() -> None:
    harness = Harness(16, depth=2, num_windows=4, max_model_len=200)
    request = submit("r", 2 * BLOCK + 1, max_tokens=40)
    imp = bring(harness, request, 2)
    scheduler = harness.scheduler
    scheduler.add(request)
    harness.launch()
    scheduler.holds.release(imp)
    scheduler.cancel(("s", "r"))
    assert scheduler.take_released_windows() == []
    harness.land()
    assert len(scheduler.take_released_windows()) == 2


def test_held_blocks_are_given_up_for_who_runs() -> None:
    harness = Harness(12, max_model_len=192)
    scheduler = harness.scheduler
    kept = submit("kept", 6 * BLOCK, max_tokens=4)
    imp = bring(harness, kept, 5, windows=False)
    hold = scheduler.holds.hold(imp.keys, soft=True)
    scheduler.holds.release(imp)
    request = submit("r", 4 * BLOCK, max_tokens=120)
    scheduler.add(request)
    harness.run()
    assert hold.released and scheduler.stats.preemptions == 0
    assert harness.output("r") == undisturbed_output(request, 192)[0]


def test_held_blocks_are_given_up_for_the_first_when_nothing_runs() -> None:
    harness = Harness(12, max_model_len=192)
    scheduler = harness.scheduler
    imp = bring(harness, submit("kept", 6 * BLOCK, max_tokens=4), 5, windows=False)
    scheduler.holds.hold(imp.keys, soft=True)
    scheduler.holds.release(imp)
    request = submit("r", 10 * BLOCK, max_tokens=4)
    scheduler.add(request)
    harness.run()
    assert harness.output("r") == undisturbed_output(request, 192)[0]


def test_pins_that_starve_somebody_are_seen() -> None:
    harness = Harness(12, max_model_len=192)
    scheduler = harness.scheduler
    scheduler.add(submit("first", 6 * BLOCK, max_tokens=2))
    harness.run()
    pin = scheduler.holds.pin(split_keys(submit("first", 6 * BLOCK).block_keys))
    assert len(pin.blocks) == 6
    scheduler.add(submit("r", 10 * BLOCK, max_tokens=2))
    assert harness.launch() is None and scheduler.holds.starved
    scheduler.holds.release(pin)
    harness.run()
    assert harness.finish("r") == "length" and not scheduler.holds.starved


def test_a_block_in_several_holds_counts_once() -> None:
    """Half of the pool may be pinned for long, and three quarters for a moment."""
    harness = Harness(24, max_model_len=256)
    holds = harness.scheduler.holds
    requests = [submit(f"r{n}", 7 * BLOCK, max_tokens=2) for n in range(3)]
    for request in requests:
        harness.scheduler.add(request)
        harness.run()
    first, second, third = (split_keys(request.block_keys) for request in requests)
    pins = [holds.pin(first) for _ in range(5)]
    assert [len(pin.blocks) for pin in pins] == [7] * 5 and holds.num_held == 7
    assert holds.has_room_for_pin(first, besides=5) and not holds.has_room_for_pin(second, 0)
    short = holds.pin(second)
    assert len(short.blocks) == 5 and holds.is_stuck(short)
    assert not holds.is_stuck(pins[0])
    brief = holds.pin(second, brief=True)
    assert len(brief.blocks) == 7 and holds.num_held == 14
    assert len(holds.pin(third, brief=True).blocks) == 4
    for pin in pins:
        holds.release(pin)
    assert holds.num_held == 11 and holds.pin_more(short) == 2  # held by `brief` all the time
    harness.scheduler.check()


def test_who_waits_for_an_import_is_passed_over_cheaply() -> None:
    """A step's cost for each who waits does not depend on how long the prompts are (in calls)."""

    def num_calls(num_blocks: int) -> int:
        harness = Harness(4096, max_model_len=10_000)
        scheduler = harness.scheduler
        prompt = list(range(1000, 1000 + num_blocks * BLOCK))
        for number in range(20):
            scheduler.add(submit(f"r{number}", [*prompt, number]))
        keys = split_keys(submit("r", prompt).block_keys)
        imp = scheduler.holds.begin_import(keys)
        assert imp is not None and harness.launch() is None
        profile = cProfile.Profile()
        assert profile.runcall(scheduler.schedule) is None
        scheduler.holds.give_up(imp)  # what nobody brings any more is computed, by one of them
        scheduler.holds.release(imp)
        batch = harness.launch()
        assert batch is not None and len(batch.rows) == 1
        return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]

    assert num_calls(400) == num_calls(4)


def test_what_is_promised_is_left_alone_while_anything_runs() -> None:
    harness = Harness(12, max_model_len=192)
    scheduler = harness.scheduler
    scheduler.add(submit("runs", 2 * BLOCK, max_tokens=30))
    harness.step()
    assert scheduler.holds.promise(("s", "announced"), 6)
    assert not scheduler.holds.promise(("s", "more"), 1)  # too much of the pool already
    scheduler.add(submit("other", 5 * BLOCK, max_tokens=2))
    harness.step()
    assert sum(scheduler.stats.running.values()) == 1
    scheduler.add(submit("announced", 5 * BLOCK, max_tokens=2))
    scheduler.cancel(("s", "other"))
    harness.step()
    assert sum(scheduler.stats.running.values()) == 2


def test_an_import_brings_whole_leading_blocks_only() -> None:
    harness = Harness(16)
    scheduler = harness.scheduler
    request = submit("r", 6 * BLOCK)
    keys = split_keys(request.block_keys)
    imp = scheduler.holds.begin_import(keys)
    assert imp is not None
    taken = scheduler.holds.take_room(imp, 6, False, 16)
    assert scheduler.holds.filled(imp, 3, [True, True]) == 0  # out of order: not yet
    assert scheduler.holds.filled(imp, 0, [True, True]) == 2
    assert scheduler.holds.filled(imp, 2, [False]) == 0
    assert scheduler.holds.filled(imp, 5, [True]) == 0
    scheduler.holds.give_up(imp)
    scheduler.holds.release(imp)
    assert scheduler.pool.match(keys) == taken[:2]
    assert scheduler.pool.num_free == 14
    scheduler.check()


def test_an_import_claims_up_to_what_somebody_else_brings() -> None:
    harness = Harness(32)
    scheduler = harness.scheduler
    long, short = submit("r", 6 * BLOCK), submit("r", 3 * BLOCK)
    first = scheduler.holds.begin_import(split_keys(short.block_keys))
    assert first is not None and len(first.keys) == 3
    assert scheduler.holds.begin_import(split_keys(long.block_keys)) is None
    scheduler.add(long)
    assert harness.launch() is None  # it waits
    scheduler.holds.give_up(first)
    assert harness.launch() is not None  # and does not wait for ever
    assert scheduler.holds.begin_import(split_keys(long.block_keys)) is None
