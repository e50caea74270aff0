"""InstanceCore as a state machine: what it refuses, publishes, pauses and frees."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.engine.core import CoreConfig, InstanceCore
from penstock.engine.scheduler.batch import Batch, RowResult, StepResult
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.protocol.codec import PROTOCOL_VERSION, decode, encode
from penstock.protocol.effects import Effect, Launch, Send, SetTimer, Stop
from penstock.protocol.errors import ErrorInfo
from penstock.protocol.instance import (
    Assign,
    Assigned,
    Attach,
    Attached,
    Detach,
    Drain,
    InstanceCard,
    Load,
    Probe,
    Probed,
    Resync,
    Sleep,
    Snapshot,
)
from penstock.protocol.kv import KvEvents, KvLayout, Refused, block_keys, root_key
from penstock.protocol.request import Cancel, Input, SamplingParams, Stage, Submit
from penstock.protocol.tokens import Credit, Tokens

EOS = 0


class Bench:
    """A core, its clock, and a device that answers when told to. Messages go through the codec."""

    def __init__(self, **config: Any) -> None:
        scheduler = SchedulerConfig(
            max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256, eos_token_ids=(EOS,)
        )
        layout = KvLayout(1, 1, 8, scheduler.block_tokens, "float32", 4096)
        card = InstanceCard(
            name="i",
            incarnation=7,
            pid=1,
            model="m",
            model_digest="d",
            vocab_size=100,
            max_model_len=256,
            dtype="float32",
            device="none",
            layout=layout,
            num_blocks=32,
            max_num_seqs=4,
            max_num_batched_tokens=64,
        )
        self.core = InstanceCore(card, Scheduler(scheduler, 32), CoreConfig(**config))
        self.now = 0.0
        self.launched: list[Batch] = []
        self.timer_s = 0.0
        self.stopped, self.failure = False, ""

    def say(self, message: Any, peer: str = "s") -> list[Any]:
        return self._take(self.core.on_message(peer, decode(encode(message)), self.now))

    def attach(self, peer: str = "s", incarnation: int = 1, **more: Any) -> list[Any]:
        return self.say(Attach(peer, incarnation, PROTOCOL_VERSION, **more), peer)

    def submit(self, request_id: str = "r", peer: str = "s", **more: Any) -> list[Any]:
        fields: dict[str, Any] = {
            "attempt": 1,
            "service_incarnation": 1,
            "prompt_ids": [1, 2, 3],
            "sampling": SamplingParams(max_tokens=4, ignore_eos=True),
        } | more
        return self.say(Submit(request_id=request_id, service=peer, **fields), peer)

    def step(self, token: int = 5, error: ErrorInfo | None = None) -> list[Any]:
        batch = self.launched.pop(0)
        rows = [RowResult(r.slot, [token] if r.samples else []) for r in batch.rows]
        self.now += 0.01
        return self._take(
            self.core.on_step_done(StepResult(batch.step, rows, 0.01, error), self.now)
        )

    def wait(self, seconds: float) -> list[Any]:
        """Fire every timer on the way, as a driver does."""
        messages: list[Any] = []
        until = self.now + seconds
        while self.timer_s <= until:
            self.now = max(self.now, self.timer_s)
            messages += self._take(self.core.on_timer(self.now))
        self.now = until
        return messages

    def _take(self, effects: list[Effect]) -> list[Any]:
        messages = []
        for effect in effects:
            match effect:
                case Send(message=message):
                    messages.append(decode(encode(message)))
                case Launch(batch=batch):
                    self.launched.append(batch)
                case SetTimer(at_s=at_s):
                    self.timer_s = at_s
                case Stop(failure=failure):
                    self.stopped, self.failure = True, failure or ""
        return messages


def only(messages: list[Any], kind: type) -> Any:
    (found,) = [m for m in messages if isinstance(m, kind)]
    return found


def test_attach_refuses_other_versions_and_older_incarnations() -> None:
    bench = Bench()
    refused = only(bench.say(Attach("s", 1, PROTOCOL_VERSION + 1)), Refused)
    assert refused.code == "version_mismatch" and str(PROTOCOL_VERSION) in refused.reason
    assert only(bench.attach(incarnation=5), Attached).card.incarnation == 7
    assert only(bench.attach(incarnation=4), Refused).code == "stale_incarnation"


def test_nobody_submits_without_attaching() -> None:
    bench = Bench()
    refused = only(bench.submit(), Refused)
    assert (refused.code, refused.request_id) == ("not_attached", "r")
    bench.attach(incarnation=2)
    assert only(bench.submit(service_incarnation=1), Refused).code == "not_attached"
    assert bench.launched == []


def test_tokens_are_numbered_rows_and_end_once() -> None:
    bench = Bench()
    bench.attach()
    bench.submit()
    seen, numbers, finishes = [], [], []
    while bench.launched:
        for message in bench.step(token=len(seen) + 10):
            if isinstance(message, Tokens):
                numbers.append(message.number)
                (row,) = message.rows
                assert row.start == len(seen)
                seen += row.ids
                finishes.append(row.finish)
    assert seen == [10, 11, 12, 13]
    assert numbers == [1, 2, 3, 4]
    assert finishes == [None, None, None, "length"]
    assert bench.core.ready


def test_a_frame_delivered_twice_changes_nothing() -> None:
    bench = Bench()
    bench.attach()
    bench.submit()
    assert [m for m in bench.submit() if not isinstance(m, Load)] == []
    assert len(bench.core.scheduler.live("s")) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"adapter": "a"}, "adapter"),
        ({"inputs": [Input("image", 0, 1, b"h", "ref")]}, "inputs"),
        ({"plan": [Stage("encode", "i")]}, "plan"),
    ],
)
def test_what_is_not_supported_yet_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    bench = Bench()
    bench.attach()
    (row,) = only(bench.submit(**fields), Tokens).rows
    assert row.finish == "error"
    assert (row.error.code, row.error.param) == ("unsupported_feature", param)


def test_unknown_orders_are_refused_by_name() -> None:
    bench = Bench()
    bench.attach()
    refused = only(bench.say(Sleep()), Refused)
    assert refused.what == "sleep" and refused.code == "unsupported_feature"


def test_cancel_answers_once_and_frees() -> None:
    bench = Bench()
    bench.attach()
    bench.submit(sampling=SamplingParams(max_tokens=50))
    (row,) = only(bench.say(Cancel("r", 1)), Tokens).rows
    assert row.finish == "cancelled"
    assert bench.say(Cancel("r", 1)) == []
    while bench.launched:
        assert not any(isinstance(m, Tokens) for m in bench.step())
    assert not bench.core.scheduler.has_work()


def test_an_old_epoch_is_fenced_off() -> None:
    bench = Bench()
    bench.attach()
    assert only(bench.say(Assign("prefill", 3)), Assigned).epoch == 3
    assert only(bench.say(Assign("decode", 3)), Refused).code == "stale_epoch"
    plan = [Stage("prefill", "i", epoch=2)]
    assert only(bench.submit(plan=plan), Refused).code == "stale_epoch"
    assert bench.core.role == "prefill"


def test_a_service_without_credit_is_paused_and_then_freed() -> None:
    bench = Bench(credit_window=4, stall_limit_s=10.0, service_silent_s=100.0)
    bench.attach()
    bench.attach("other")
    bench.submit(sampling=SamplingParams(max_tokens=200, ignore_eos=True))
    for _ in range(30):
        if bench.launched:
            bench.step()
    assert not bench.launched  # paused, though there is work
    bench.submit("q", "other", sampling=SamplingParams(max_tokens=2, ignore_eos=True))
    assert bench.launched  # others go on
    while bench.launched:
        bench.step()
    sent = bench.core._links.get("s").sent
    bench.say(Credit(sent))
    assert bench.launched  # credit resumes it
    for _ in range(30):
        if bench.launched:
            bench.step()
    rows = [r for m in bench.wait(11.0) if isinstance(m, Tokens) for r in m.rows]
    assert [(r.request_id, r.finish, r.error.code) for r in rows] == [
        ("r", "error", "protocol_error")
    ]
    assert bench.core.scheduler.live("s") == []


def test_a_service_out_of_reach_loses_its_sequences_within_the_bound() -> None:
    bench = Bench(service_lost_s=3.0)
    bench.attach()
    bench.submit(sampling=SamplingParams(max_tokens=200))
    bench.core.on_sent("s", False, bench.now)
    bench.wait(2.0)
    assert len(bench.core.scheduler.live("s")) == 1
    bench.wait(2.0)
    assert bench.core.scheduler.live("s") == []
    assert only(bench.submit("q"), Refused).code == "not_attached"


def test_a_time_budget_ends_in_an_error() -> None:
    bench = Bench()
    bench.attach()
    bench.submit(sampling=SamplingParams(max_tokens=200), total_budget_s=1.0)
    rows = [r for m in bench.wait(2.0) if isinstance(m, Tokens) for r in m.rows]
    assert [(r.finish, r.error.code) for r in rows] == [("error", "engine_unavailable")]


def test_a_failed_step_ends_its_sequences_and_no_others() -> None:
    bench = Bench(overlap_steps=1)
    bench.attach()
    bench.submit("a")
    error = ErrorInfo("engine_failed", "broken")
    (row,) = only(bench.step(error=error), Tokens).rows
    assert (row.finish, row.error.code) == ("error", "engine_failed")
    bench.submit("b")
    (row,) = only(bench.step(), Tokens).rows
    assert row.ids == [5]


def test_a_new_incarnation_of_a_service_frees_the_old_ones_sequences() -> None:
    bench = Bench()
    bench.attach()
    bench.submit()
    bench.attach(incarnation=2)
    assert bench.core.scheduler.live("s") == []
    snapshot = only(bench.say(Resync()), Snapshot)
    assert snapshot.requests == []


def test_a_snapshot_names_what_lives_and_detach_frees_it() -> None:
    bench = Bench()
    bench.attach()
    bench.submit()
    bench.step()
    (live,) = only(bench.say(Resync()), Snapshot).requests
    assert (live.request_id, live.attempt, live.num_output_tokens) == ("r", 1, 1)
    bench.say(Detach("s", 1))
    assert bench.core.scheduler.live("s") == []


def test_drain_refuses_the_new_finishes_the_old_and_stops() -> None:
    bench = Bench()
    bench.attach()
    bench.submit()
    bench.say(Drain())
    assert not bench.stopped
    assert only(bench.submit("q"), Refused).code == "draining"
    while bench.launched:
        bench.step()
    assert bench.stopped


def test_probe_says_ready_only_after_a_real_token() -> None:
    bench = Bench()
    bench.attach()
    assert not only(bench.say(Probe(1)), Probed).ready
    bench.submit()
    bench.step()
    assert only(bench.say(Probe(2)), Probed).ready


def test_kv_events_are_numbered_and_agree_with_the_snapshot() -> None:
    bench = Bench()
    bench.attach(kv_events=True)
    bench.attach("quiet")
    ids = list(range(1, 41))
    keys = block_keys(root_key("d"), ids)
    bench.submit(prompt_ids=ids, block_keys=keys)
    events = []
    while bench.launched:
        events += [m for m in bench.step() if isinstance(m, KvEvents)]
    assert [e.number for e in events] == list(range(1, len(events) + 1))
    stored = b"".join(c.keys for e in events for c in e.changes if c.op == "stored")
    assert stored == keys
    snapshot = only(bench.say(Resync()), Snapshot)
    assert snapshot.keys == keys and snapshot.kv_number == events[-1].number
    assert only(bench.say(Resync(), "quiet"), Snapshot).keys == b""


def test_heartbeats_carry_load_and_the_predicted_end() -> None:
    bench = Bench()
    bench.attach()
    bench.submit(sampling=SamplingParams(max_tokens=200, ignore_eos=True))
    for _ in range(8):
        if not bench.launched:
            bench.wait(0.02)
        bench.step()
    loads = [m for m in bench.wait(0.6) if isinstance(m, Load)]
    assert loads and loads[0].running == {"online": 1, "offline": 0}
    assert loads[0].cost.num_steps >= 8
    assert loads[0].cost.base_s + loads[0].cost.per_row_s > 0
    assert [load.number for load in loads] == sorted({load.number for load in loads})


def test_a_step_is_prepared_ahead_but_not_too_early() -> None:
    """With a fitted model the second batch waits for arrivals, until the first is about to end."""
    bench = Bench()
    bench.attach()
    bench.submit("a", sampling=SamplingParams(max_tokens=200, ignore_eos=True))
    for _ in range(12):
        batch = bench.launched.pop(0)
        rows = [RowResult(r.slot, [5]) for r in batch.rows]
        bench.now += 0.1
        bench._take(bench.core.on_step_done(StepResult(batch.step, rows, 0.1), bench.now))
        if not bench.launched:
            bench.wait(0.09)
    while len(bench.launched) > 1:
        bench.step()
    bench.submit("b", sampling=SamplingParams(max_tokens=10, ignore_eos=True))
    bench.wait(0.2)
    slots = {r.slot for b in bench.launched for r in b.rows}
    assert len(bench.launched) == 2 and len(slots) == 2  # b got into the very next batch


def test_messages_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Cancel("r", 1).attempt = 2  # type: ignore[misc]
    assert msgspec.structs.replace(Cancel("r", 1), attempt=2) == Cancel("r", 2)


def test_a_sent_message_proves_the_service_within_reach() -> None:
    bench = Bench(service_lost_s=3.0)
    bench.attach()
    bench.submit(sampling=SamplingParams(max_tokens=200))
    bench.core.on_sent("s", False, bench.now)
    bench.core.on_sent("s", True, bench.now + 0.5)
    bench.wait(4.0)
    assert len(bench.core.scheduler.live("s")) == 1


def test_a_service_that_says_nothing_is_forgotten() -> None:
    bench = Bench(service_silent_s=5.0)
    bench.attach()
    bench.submit(sampling=SamplingParams(max_tokens=200))
    bench.wait(4.0)
    bench.say(Credit(0))
    bench.wait(4.0)
    assert len(bench.core.scheduler.live("s")) == 1
    bench.wait(2.0)
    assert bench.core.scheduler.live("s") == []


def test_its_own_pause_is_not_held_against_a_service() -> None:
    bench = Bench(service_silent_s=5.0)
    bench.attach()
    bench.submit(sampling=SamplingParams(max_tokens=200))
    bench.wait(1.0)
    bench.now += 60.0  # the machine slept
    bench._take(bench.core.on_timer(bench.now))
    assert len(bench.core.scheduler.live("s")) == 1


def test_a_stuck_device_ends_the_process_but_a_long_step_does_not() -> None:
    bench = Bench(stuck_after_s=30.0, service_silent_s=1e9)
    bench.attach()
    bench.submit(sampling=SamplingParams(max_tokens=200))
    bench.wait(25.0)
    assert not bench.stopped
    bench.wait(10.0)
    assert bench.stopped and "step" in bench.failure


def test_predictions_that_erred_do_not_add_up() -> None:
    """After a slow step the next batch is prepared in time all the same."""
    bench = Bench()
    bench.attach()
    bench.submit(sampling=SamplingParams(max_tokens=250, ignore_eos=True))

    def step(step_s: float) -> None:
        batch = bench.launched.pop(0)
        rows = [RowResult(r.slot, [5]) for r in batch.rows]
        bench.now += step_s
        result = StepResult(batch.step, rows, step_s)
        bench._take(bench.core.on_step_done(result, bench.now))

    for _ in range(8):
        step(0.1)
        bench.wait(0.0)
    step(5.0)
    for _ in range(10):
        bench.wait(0.0)
        before_s = bench.now
        bench.wait(0.099)
        assert len(bench.launched) == 2  # one runs, one is ready before it ends
        bench.now = before_s
        step(0.1)
