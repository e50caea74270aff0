"""The scheduler, one behaviour at a time."""

from __future__ import annotations

import msgspec
import pytest
from tests.helpers.scheduling import EOS, Harness, next_id, submit, undisturbed_output

from penstock.engine.scheduler.batch import Batch, RowResult, StepResult
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.sequence import Sequence
from penstock.engine.scheduler.stopping import check_stop
from penstock.engine.scheduler.validation import DuplicateSubmit
from penstock.protocol.errors import (
    ConfigError,
    ContextLengthExceeded,
    ErrorInfo,
    InvalidRequest,
    Overloaded,
    ProtocolError,
)
from penstock.protocol.kv import KvChange, split_keys
from penstock.protocol.request import SamplingParams


def rows(batch: Batch | None) -> list[tuple[int, int, bool]]:
    assert batch is not None
    return [(row.start, row.num_tokens, row.samples) for row in batch.rows]


def seq_of(harness: Harness, request_id: str) -> Sequence:
    (seq,) = (s for s in harness.scheduler.live() if s.key[1] == request_id)
    return seq


# ---- coming in ----------------------------------------------------------------------------


def test_what_can_never_run_is_refused() -> None:
    harness = Harness(4, max_model_len=100)  # the pool holds 64 tokens
    add = harness.scheduler.add
    assert harness.scheduler.max_model_len == 64
    with pytest.raises(InvalidRequest, match="empty"):
        add(submit("r", 0))
    with pytest.raises(ContextLengthExceeded, match=r"64 tokens.*at most 64"):
        add(submit("r", 64))
    with pytest.raises(ContextLengthExceeded):
        add(submit("r", 32, resumed=range(32), max_tokens=99))
    with pytest.raises(InvalidRequest, match="nothing is left"):
        add(submit("r", 5, resumed=range(3), max_tokens=3))
    with pytest.raises(InvalidRequest, match="max_tokens"):
        add(submit("r", 5, max_tokens=0))
    assert not harness.scheduler.has_work()
    add(submit("r", 63))
    harness.run()
    assert harness.finish("r") == "length" and len(harness.output("r")) == 1


@pytest.mark.parametrize("keys", [b"x" * 15, b"x" * 48])
def test_keys_that_do_not_fit_the_tokens_are_refused(keys: bytes) -> None:
    request = msgspec.structs.replace(submit("r", 40), block_keys=keys)
    with pytest.raises(ProtocolError, match="block keys"):
        Harness().scheduler.add(request)


def test_a_full_queue_refuses_but_lets_a_newer_attempt_in() -> None:
    harness = Harness(max_waiting=2)
    harness.scheduler.add(submit("a"))
    harness.scheduler.add(submit("b", offline=True))
    with pytest.raises(Overloaded):
        harness.scheduler.add(submit("c"))
    harness.scheduler.add(submit("a", attempt=1))
    harness.step()
    harness.scheduler.add(submit("c"))


def test_an_answer_that_has_begun_elsewhere_goes_on_however_many_wait() -> None:
    harness = Harness(max_waiting=1)
    harness.scheduler.add(submit("a"))
    harness.scheduler.add(submit("b", 5, resumed=range(3), max_tokens=9))
    with pytest.raises(Overloaded):
        harness.scheduler.add(submit("c"))
    harness.run()
    assert harness.finish("b") == "length"


def test_a_newer_attempt_replaces_the_older_and_a_duplicate_does_not() -> None:
    harness = Harness(depth=2)
    harness.scheduler.add(submit("r", attempt=1))
    harness.step()
    for attempt in (0, 1):
        with pytest.raises(DuplicateSubmit):
            harness.scheduler.add(submit("r", attempt=attempt))
    harness.scheduler.add(submit("r", attempt=2))
    harness.run()
    assert {u.sequence.attempt for u in harness.updates} == {2}
    assert harness.finish("r") == "length"


def test_two_services_may_use_the_same_request_id() -> None:
    harness = Harness()
    for service in "ab":
        harness.scheduler.add(submit("r", service=service))
    assert len(harness.scheduler.live("a")) == 1
    assert harness.scheduler.cancel(("c", "r")) is None
    assert harness.scheduler.cancel(("a", "r")) is not None
    assert [s.service for s in harness.scheduler.live()] == ["b"]


def test_senseless_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        SchedulerConfig(max_num_seqs=0)


# ---- one budget ---------------------------------------------------------------------------


def test_a_prompt_in_chunks_then_its_output() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.scheduler.add(submit("r", 20, max_tokens=3))
    batches = [rows(batch) for batch in harness.run()]
    assert batches == [
        [(0, 8, False)],
        [(8, 8, False)],
        [(16, 4, True)],
        [(20, 1, True)],
        [(21, 1, True)],
    ]


def test_decodes_go_before_prompts_and_offline_takes_what_is_left() -> None:
    harness = Harness(max_num_batched_tokens=16)
    harness.scheduler.add(submit("decoding", 4))
    harness.step()
    harness.scheduler.add(submit("offline", 100, offline=True))
    harness.scheduler.add(submit("first", 20))
    harness.scheduler.add(submit("second", 9))
    assert rows(harness.step()) == [(4, 1, True), (0, 15, False)]
    # first ends its prompt, second gets the rest of the budget, offline nothing
    assert rows(harness.step()) == [(5, 1, True), (15, 5, True), (0, 9, True), (0, 1, False)]
    assert seq_of(harness, "offline").num_computed == 1
    assert rows(harness.step()) == [(6, 1, True), (20, 1, True), (9, 1, True), (1, 13, False)]


def test_long_prompts_are_bounded_by_their_chunk() -> None:
    harness = Harness(max_num_batched_tokens=100, max_chunk_tokens=30)
    for name in "ab":
        harness.scheduler.add(submit(name, 50))
    assert rows(harness.step()) == [(0, 30, False), (0, 30, False)]
    assert rows(harness.step()) == [(30, 20, True), (30, 20, True)]


def test_slots_are_taken_from_the_lowest_and_reused_within_a_step() -> None:
    harness = Harness(max_num_seqs=2)
    for i in range(3):
        harness.scheduler.add(submit(f"r{i}", max_tokens=1 + i))
    first, second = harness.step(), harness.step()
    assert first and [new.slot for new in first.admitted] == [0, 1]
    assert second and second.freed_slots == [0]
    assert [new.slot for new in second.admitted] == [0]
    assert {row.slot for row in second.rows} == {0, 1}


# ---- overlap ------------------------------------------------------------------------------


def test_the_next_step_is_scheduled_on_a_placeholder() -> None:
    harness = Harness(depth=2)
    harness.scheduler.add(submit("r", 4, max_tokens=3))
    assert rows(harness.launch()) == [(0, 4, True)]
    assert rows(harness.launch()) == [(4, 1, True)]
    assert rows(harness.launch()) == [(5, 1, True)]
    assert harness.launch() is None  # certainly its last ids: no row is wasted
    harness.run()
    assert harness.output("r") == undisturbed_output(submit("r", 4, max_tokens=3), 4096)[0]


def test_the_surplus_row_after_a_stop_token_is_dropped() -> None:
    request = next(
        r
        for r in (submit(f"r{i}", 5, ignore_eos=False, max_tokens=50) for i in range(100))
        if undisturbed_output(r, 4096)[1] == "stop" and len(undisturbed_output(r, 4096)[0]) > 2
    )
    harness = Harness(depth=2)
    harness.scheduler.add(request)
    batches = harness.run()
    output, _ = undisturbed_output(request, 4096)
    assert harness.output(request.request_id) == output and output[-1] == EOS
    assert len(batches) == len(output) + 1
    last = harness.updates[-1]
    assert (last.finish, last.stop_token, last.ids) == ("stop", EOS, [EOS])
    assert harness.scheduler.stats.kv_blocks_used == 0


def test_cancelled_while_its_step_is_in_flight() -> None:
    harness = Harness(depth=2)
    harness.scheduler.add(submit("gone", 40))
    harness.scheduler.add(submit("stays", 40))
    harness.launch()
    harness.launch()
    update = harness.scheduler.cancel(("s", "gone"))
    assert update and (update.finish, update.start, update.ids) == ("cancelled", 0, [])
    harness.scheduler.add(submit("next", 40))  # gets the blocks and the slot at once
    harness.run()
    assert harness.output("gone") == []
    for name in ("stays", "next"):
        assert harness.output(name) == undisturbed_output(submit(name, 40), 4096)[0]


def test_a_failed_step_ends_its_sequences_and_nothing_of_it_is_cached() -> None:
    harness = Harness(depth=2, max_num_batched_tokens=32)
    harness.scheduler.add(submit("r", 32, max_tokens=9))
    harness.launch()
    harness.scheduler.add(submit("bystander", 31))
    harness.launch()
    harness.scheduler.add(submit("later", 20))
    (update,) = harness.land(fail=True)
    assert update.finish == "error" and update.error is not None
    assert update.error.code == "engine_failed" and "boom" in update.error.message
    assert harness.scheduler.pool.keys() == []
    harness.run()  # the second row of r is ignored
    assert harness.finish("bystander") == harness.finish("later") == "length"
    assert harness.output("r") == []


def test_only_kv_of_completed_steps_is_cached() -> None:
    """One chunk is in, the next one in flight: if that fails, its block must not be found."""
    harness = Harness(depth=2, max_num_batched_tokens=16)
    prompt = list(range(64))
    harness.scheduler.add(submit("r", prompt))
    harness.launch()
    harness.launch()
    harness.land()
    harness.land(fail=True)
    harness.scheduler.add(submit("again", prompt))
    assert rows(harness.step()) == [(16, 16, False)]
    harness.run()
    assert harness.output("again") == undisturbed_output(submit("again", prompt), 4096)[0]


def test_a_failed_row_ends_its_sequence_alone() -> None:
    harness = Harness()
    for name in ("bad", "good"):
        harness.scheduler.add(submit(name))
    harness.launch()
    harness.land(bad_row=0)
    harness.run()
    assert (harness.finish("bad"), harness.finish("good")) == ("error", "length")
    assert harness.updates[0].error == ErrorInfo("engine_failed", "bad row")


def test_results_out_of_order_are_a_bug() -> None:
    scheduler = Scheduler(SchedulerConfig(), 8)
    scheduler.add(submit("r"))
    assert scheduler.schedule() and scheduler.schedule()
    with pytest.raises(AssertionError, match="order"):
        scheduler.apply(StepResult(1, [RowResult(0, [1])]))


# ---- prefix cache -------------------------------------------------------------------------


def test_a_full_hit_still_computes_the_last_token() -> None:
    harness = Harness()
    prompt = list(range(32))
    harness.scheduler.add(submit("first", prompt, max_tokens=2))
    harness.run()
    harness.scheduler.add(submit("second", prompt, max_tokens=2))
    assert rows(harness.step()) == [(16, 16, True)]
    update = harness.updates[-1]
    assert update.cached_tokens == 16
    harness.run()
    assert harness.updates[-1].cached_tokens == 0  # told once
    stats = harness.scheduler.stats
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens) == (16, 64)


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    harness = Harness(depth=2)
    prompt = list(range(20))
    harness.scheduler.add(submit("first", prompt, max_tokens=30))
    harness.run()
    turn = [*prompt, *harness.output("first"), 1, 2, 3]
    harness.scheduler.add(submit("second", turn, max_tokens=2))
    assert rows(harness.step()) == [(48, 5, True)]


@pytest.mark.parametrize("off", ["request", "instance"])
def test_without_caching_nothing_is_shared_or_told(off: str) -> None:
    harness = Harness(enable_prefix_caching=off == "request")
    prompt = list(range(32))
    for name in ("first", "second"):
        harness.scheduler.add(submit(name, prompt, cached=off == "instance"))
        assert rows(harness.step()) == [(0, 32, True)]
        harness.run()
    assert harness.scheduler.take_kv_changes() == []
    stats = harness.scheduler.stats
    assert (stats.kv_blocks_cached, stats.prefix_query_tokens) == (0, 0)


def test_prompt_logprobs_compute_the_whole_prompt_and_are_sent_once() -> None:
    harness = Harness(9, max_num_batched_tokens=32, max_model_len=200)
    prompt = list(range(70))
    harness.scheduler.add(submit("warm", prompt, max_tokens=1))
    harness.run()
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, prompt_logprobs=0)
    harness.scheduler.add(submit("r", prompt, sampling=sampling, offline=True))
    assert rows(harness.step()) == [(0, 32, False)]
    harness.step()
    harness.scheduler.add(submit("rival", 100, max_tokens=2))  # takes r's blocks
    harness.run()
    assert harness.scheduler.stats.preemptions >= 1
    told = [u for u in harness.updates if u.sequence.key[1] == "r" and u.prompt_logprobs]
    assert [u.prompt_logprobs_start for u in told][:2] == [1, 33]
    entries = [e.token_id for u in told for e in u.prompt_logprobs or []]
    assert entries == prompt[1:]
    assert harness.output("r") == undisturbed_output(submit("r", prompt, max_tokens=40), 144)[0]


def test_changes_of_the_cache_are_told_and_a_reset_clears_it() -> None:
    harness = Harness()
    request = submit("r", 33, max_tokens=20)
    harness.scheduler.add(request)
    harness.step()
    keys = split_keys(request.block_keys)
    assert harness.scheduler.take_kv_changes() == [KvChange("stored", b"".join(keys))]
    assert harness.scheduler.pool.keys() == keys
    harness.scheduler.reset_prefix_cache()
    assert harness.scheduler.take_kv_changes() == [KvChange("cleared")]
    harness.run()
    # What r computed afterwards stands on KV of before, and is nobody's business.
    assert harness.scheduler.take_kv_changes() == [] and harness.scheduler.pool.keys() == []
    assert harness.scheduler.stats.kv_blocks_cached == 0
    harness.scheduler.add(submit("s", list(request.prompt_ids), max_tokens=1))
    assert rows(harness.step()) == [(0, 33, True)]


def test_equal_output_of_two_sequences_ends_up_in_the_same_blocks() -> None:
    harness = Harness(depth=2)
    for name in "ab":
        harness.scheduler.add(submit(name, list(range(20)), max_tokens=60))
    harness.run(until=lambda: len(harness.output("b")) >= 50)
    a, b = (seq_of(harness, name).blocks for name in "ab")
    assert a[:4] == b[:4] and a[-1] != b[-1]
    harness.run()
    assert harness.output("a") == harness.output("b")


def test_who_would_compute_the_same_waits_but_not_for_ever() -> None:
    harness = Harness(depth=1, max_num_batched_tokens=16)
    prompt = list(range(64))
    for name in ("first", "second"):
        harness.scheduler.add(submit(name, prompt))
    for _ in range(2):
        assert len(rows(harness.step())) == 1
    assert seq_of(harness, "second").slot < 0
    harness.scheduler.cancel(("s", "first"))
    assert rows(harness.step()) == [(32, 16, False)]  # goes on from what first had done
    harness.run()
    assert harness.finish("second") == "length"


def test_nobody_waits_for_what_a_lower_class_or_a_paused_service_computes() -> None:
    for blocker in ({"offline": True}, {"service": "paused"}):
        harness = Harness(depth=1, max_num_batched_tokens=16)
        prompt = list(range(64))
        harness.scheduler.add(submit("first", prompt, **blocker))  # type: ignore[arg-type]
        harness.step()
        harness.scheduler.pause("paused")
        harness.scheduler.add(submit("second", prompt))
        assert (16, 16, False) in rows(harness.step())
        assert seq_of(harness, "second").slot >= 0


# ---- the rest -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "last_id", "num_output", "left", "expected"),
    [
        (SamplingParams(max_tokens=9), 2, 1, 8, ("stop", 2)),
        (SamplingParams(max_tokens=9), 5, 1, 8, None),
        (SamplingParams(max_tokens=9), 5, 9, 0, ("length", None)),
        (SamplingParams(max_tokens=9), 2, 9, 0, ("stop", 2)),
        (SamplingParams(max_tokens=9, min_tokens=3), 2, 2, 7, None),
        (SamplingParams(max_tokens=9, min_tokens=3), 2, 3, 6, ("stop", 2)),
        (SamplingParams(max_tokens=9, min_tokens=9), 2, 4, 0, ("length", None)),
        (SamplingParams(max_tokens=9, stop_token_ids=(7,)), 7, 1, 8, ("stop", 7)),
        (SamplingParams(max_tokens=9, ignore_eos=True), 2, 1, 8, None),
    ],
)
def test_stopping(
    sampling: SamplingParams,
    last_id: int,
    num_output: int,
    left: int,
    expected: tuple[str, int | None] | None,
) -> None:
    assert check_stop(sampling, frozenset({2}), last_id, num_output, left) == expected


def test_a_complete_constrained_output_ends_whatever_else_was_asked() -> None:
    sampling = SamplingParams(max_tokens=10, min_tokens=5, ignore_eos=True)
    assert check_stop(sampling, frozenset({2}), 2, 1, 9, constrained=True) == ("stop", 2)
    assert check_stop(sampling, frozenset({2}), 3, 1, 9, constrained=True) is None


def test_the_same_history_gives_the_same_batches() -> None:
    def history() -> list[Batch]:
        harness = Harness(12, depth=2, max_num_batched_tokens=20, max_model_len=100)
        for i in range(12):
            prompt = list(range(10 + i % 3, 40 + i))
            request = submit(f"r{i}", prompt, offline=i % 2 > 0, salt=str(i % 4), max_tokens=9 + i)
            harness.scheduler.add(request)
        return harness.run()

    assert history() == history()


def test_the_model_of_these_tests_is_a_function_of_the_prefix() -> None:
    assert next_id(123) == next_id(123)
    assert len({next_id(prefix) for prefix in range(1000)}) > 40
