"""Who gets slots, blocks and turns when there is not enough for all."""

from __future__ import annotations

from tests.helpers.scheduling import Harness, submit, undisturbed_output

from penstock.engine.scheduler.batch import Batch
from penstock.engine.scheduler.queue import WaitingQueue
from penstock.engine.scheduler.sequence import Sequence


def rows(batch: Batch | None) -> list[tuple[int, int, bool]]:
    assert batch is not None
    return [(row.start, row.num_tokens, row.samples) for row in batch.rows]


def seq_of(harness: Harness, request_id: str) -> Sequence:
    (seq,) = (s for s in harness.scheduler.live() if s.key[1] == request_id)
    return seq


# ---- preemption ---------------------------------------------------------------------------


def test_preempted_in_flight_it_returns_with_its_ids_and_most_of_its_kv() -> None:
    harness = Harness(8, depth=2, max_model_len=128)
    harness.scheduler.add(submit("victim", 60, max_tokens=40, offline=True))
    harness.run(until=lambda: len(harness.output("victim")) == 6)
    harness.scheduler.add(submit("online", 60, max_tokens=3))
    assert rows(harness.launch()) == [(0, 60, True)]
    victim = seq_of(harness, "victim")
    assert victim.slot < 0 and victim.num_placeholders == 1
    harness.land()
    assert victim.num_placeholders == 0
    batches = harness.run()
    start = max(row.start for row in batches[-1].rows)
    assert start == 60 + 40 - 2
    resumed = next(batch for batch in batches if batch.admitted)
    (new,) = resumed.admitted
    assert new.num_prompt_tokens == 60 and len(new.token_ids) == 67
    assert resumed.rows[-1].start == 64  # the online request found other blocks to take
    expected, _ = undisturbed_output(submit("victim", 60, max_tokens=40), 128)
    assert harness.output("victim") == expected
    assert harness.finish("online") == "length"
    assert harness.scheduler.stats.preemptions == 1


def test_kv_survives_preemption_without_any_keys_of_the_service() -> None:
    harness = Harness(16, max_num_seqs=1, max_model_len=128)
    harness.scheduler.add(submit("victim", 40, max_tokens=40, offline=True, cached=False))
    harness.run(until=lambda: len(harness.output("victim")) == 10)
    harness.scheduler.add(submit("online", 20, max_tokens=2))
    batches = harness.run()
    resumed = next(b for b in batches if b.admitted and b.admitted[0].num_prompt_tokens == 40)
    assert resumed.rows[-1].start == 48
    assert harness.scheduler.stats.kv_blocks_cached == 1  # of the online prompt alone


def test_the_last_to_arrive_gives_way_first() -> None:
    harness = Harness(8, max_model_len=128)
    for name, priority in (("low", 1), ("early", 0), ("late", 0)):
        harness.scheduler.add(submit(name, 30, max_tokens=60, priority=priority))
    harness.run(until=lambda: harness.scheduler.stats.preemptions == 1)
    assert [s.key[1] for s in harness.scheduler.live() if s.slot < 0] == ["low"]
    harness.run(until=lambda: harness.scheduler.stats.preemptions == 2)
    assert [s.key[1] for s in harness.scheduler.live() if s.slot < 0] == ["low", "late"]
    harness.run()
    for name in ("low", "early", "late"):
        assert harness.output(name) == undisturbed_output(submit(name, 30, max_tokens=60), 128)[0]


def test_preempted_after_it_was_planned_for_the_same_step() -> None:
    """Decodes are planned first; a prompt of better priority may then need their blocks."""
    harness = Harness(8, max_num_batched_tokens=10, max_model_len=128)
    harness.scheduler.add(submit("low", 30, max_tokens=40, priority=1))
    harness.run(until=lambda: len(harness.output("low")) == 1)
    harness.scheduler.add(submit("high", 96, max_tokens=5))
    batches = harness.run(until=lambda: harness.scheduler.stats.preemptions > 0)
    assert [row.slot for row in batches[-1].rows] == [seq_of(harness, "high").slot]
    assert seq_of(harness, "low").slot < 0
    harness.run()
    assert harness.finish("low") == harness.finish("high") == "length"


def test_prompts_under_way_have_their_blocks_spoken_for() -> None:
    """Two prompts that fit one at a time run one after the other, without a preemption."""
    harness = Harness(8, max_num_batched_tokens=30, max_chunk_tokens=10, max_model_len=128)
    for name in "ab":
        harness.scheduler.add(submit(name, 80, max_tokens=2))
    harness.step()
    assert seq_of(harness, "b").slot < 0
    harness.run()
    assert harness.finish("a") == harness.finish("b") == "length"
    assert harness.scheduler.stats.preemptions == 0


def test_what_is_spoken_for_by_offline_prompts_is_there_for_online_ones() -> None:
    harness = Harness(8, max_num_batched_tokens=30, max_chunk_tokens=10, max_model_len=128)
    harness.scheduler.add(submit("offline", 100, max_tokens=2, offline=True))
    harness.step()
    harness.scheduler.add(submit("online", 60, max_tokens=2))
    harness.step()
    assert seq_of(harness, "online").slot >= 0 > seq_of(harness, "offline").slot


def test_blocks_that_the_newcomer_shares_with_its_victim_do_not_count_as_freed() -> None:
    harness = Harness(9, max_model_len=200)
    prompt = list(range(65))
    harness.scheduler.add(submit("offline", prompt, max_tokens=12, offline=True))
    harness.scheduler.add(submit("running", 10, max_tokens=6))
    harness.step()
    # 9 blocks, 4 of them cached, 1 more from the victim and 3 free ones: one short.
    harness.scheduler.add(submit("newcomer", [*prompt, *range(1_000, 1_075)], max_tokens=2))
    harness.step()
    assert harness.scheduler.stats.preemptions == 0
    harness.run()
    assert harness.finish("newcomer") == "length"


def test_a_result_of_an_earlier_residence_confirms_nothing_of_this_one() -> None:
    harness = Harness(8, depth=3, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=128)
    harness.scheduler.add(submit("r", 48, offline=True))
    harness.launch()
    harness.scheduler.add(submit("online", 10))
    harness.launch()
    harness.scheduler.cancel(("s", "online"))
    assert rows(harness.launch()) == [(0, 16, False)]
    harness.land()
    assert harness.scheduler.pool.keys() == []
    harness.land()
    harness.land()
    assert len(harness.scheduler.pool.keys()) == 1


def test_who_was_preempted_returns_only_with_its_last_id() -> None:
    harness = Harness(8, depth=3, max_num_seqs=1, max_model_len=128)
    harness.scheduler.add(submit("r", 20, offline=True))
    harness.launch()
    harness.scheduler.add(submit("online", 10))
    harness.launch()
    harness.scheduler.cancel(("s", "online"))
    assert harness.launch() is None
    harness.land()
    batch = harness.launch()
    assert batch is not None and len(batch.admitted[0].token_ids) == 21
    harness.run()
    assert harness.output("r") == undisturbed_output(submit("r", 20), 128)[0]


def test_an_online_request_takes_the_slot_of_an_offline_one() -> None:
    harness = Harness(max_num_seqs=2)
    for i in range(2):
        harness.scheduler.add(submit(f"off{i}", offline=True, max_tokens=40))
    harness.step()
    harness.scheduler.add(submit("on"))
    batch = harness.step()
    assert batch and batch.freed_slots == [1] and batch.admitted[0].slot == 1
    assert harness.scheduler.stats.running == {"online": 1, "offline": 1}
    harness.scheduler.add(submit("off2", offline=True))
    harness.step()
    assert harness.scheduler.stats.waiting == {"online": 0, "offline": 2}


def test_no_newcomer_overtakes_a_big_one_for_ever() -> None:
    harness = Harness(8, max_model_len=128)
    harness.scheduler.add(submit("running", 60, max_tokens=8))
    harness.step()
    harness.scheduler.add(submit("big", 100))
    harness.scheduler.add(submit("small", 10))
    harness.step()
    assert harness.scheduler.stats.waiting["online"] == 2
    harness.run()
    ends = [u.sequence.key[1] for u in harness.updates if u.finish]
    starts = [u.sequence.key[1] for u in harness.updates if u.start == 0]
    assert ends[0] == "running" and starts[:2] == ["running", "big"]


# ---- services -----------------------------------------------------------------------------


def test_a_paused_service_keeps_its_place_until_somebody_needs_it() -> None:
    harness = Harness(8, max_model_len=128)
    harness.scheduler.add(submit("quiet", 60, max_tokens=20, service="slow"))
    harness.step()
    harness.scheduler.pause("slow")
    assert harness.launch() is None and harness.scheduler.has_work()
    assert seq_of(harness, "quiet").slot == 0
    harness.scheduler.add(submit("other", 100, max_tokens=4, offline=True))
    harness.run(until=lambda: harness.finish("other") is not None)
    assert seq_of(harness, "quiet").slot < 0  # even offline work of another service goes first
    assert harness.launch() is None
    harness.scheduler.resume("slow")
    harness.run()
    assert harness.output("quiet") == undisturbed_output(submit("quiet", 60, max_tokens=20), 128)[0]


def test_dropping_a_service_frees_everything_without_a_word() -> None:
    harness = Harness(depth=2)
    for i in range(3):
        harness.scheduler.add(submit(f"r{i}", service="dead"))
    harness.scheduler.add(submit("r0", service="alive"))
    harness.launch()
    assert harness.scheduler.drop_service("dead") == 3
    harness.run()
    assert {u.sequence.service for u in harness.updates} == {"alive"}
    assert harness.scheduler.stats.kv_blocks_used == 0


# ---- fairness -----------------------------------------------------------------------------


def served(harness: Harness, flows: list[str]) -> dict[str, int]:
    totals = dict.fromkeys(flows, 0)
    for update in harness.updates:
        seq = update.sequence
        if update.start == 0 and update.ids:
            totals[seq.submit.cache_salt] += seq.num_prompt_tokens
        totals[seq.submit.cache_salt] += len(update.ids)
    return totals


def test_flows_share_tokens_not_requests() -> None:
    """Who sends few long requests gets as many tokens as who sends many short ones."""
    harness = Harness(256, max_num_seqs=2, max_num_batched_tokens=256, max_waiting=10_000)
    for i in range(12):
        harness.scheduler.add(submit(f"long{i}", 400, max_tokens=20, salt="long"))
    for i in range(300):
        harness.scheduler.add(submit(f"short{i}", 10, max_tokens=4, salt="short"))
    for _ in range(600):
        harness.step()
    assert len({s.submit.cache_salt for s in harness.scheduler.live()}) == 2
    totals = served(harness, ["long", "short"])
    assert min(totals.values()) > 2_000, totals
    assert abs(totals["long"] - totals["short"]) <= 420, totals


def test_idling_saves_up_nothing() -> None:
    harness = Harness(256, max_num_seqs=1, max_num_batched_tokens=256, max_waiting=10_000)
    for i in range(50):
        harness.scheduler.add(submit(f"busy{i}", 50, max_tokens=10, salt="busy"))
    harness.run(until=lambda: len(harness.scheduler.live()) == 30)
    for i in range(20):
        harness.scheduler.add(submit(f"late{i}", 50, max_tokens=10, salt="late"))
    harness.run(until=lambda: len(harness.scheduler.live()) == 30)
    left = [s.submit.cache_salt for s in harness.scheduler.live()]
    assert 9 <= left.count("late") <= 11  # they alternate from now on; no backlog is made good


def test_flows_that_come_and_go_leave_nothing_behind() -> None:
    queue = WaitingQueue()
    anchor = Sequence.of(submit("anchor", salt="anchor"), 0, 4096, True)
    queue.enter(anchor)
    for i in range(1, 5_000):
        seq = Sequence.of(submit("r", salt=f"user{i}"), i, 4096, True)
        queue.enter(seq)
        queue.charge(seq.flow, 10)
        queue.take_out(seq)
        queue.leave(seq)
    assert len(queue._idle) <= 1024 and len(queue._flows) == 1
    queue.take_out(anchor)
    queue.leave(anchor)
    assert not queue._idle and not queue._flows and not len(queue)
