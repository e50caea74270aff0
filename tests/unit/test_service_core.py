"""ServiceCore as a state machine: placement, the journal's checks, failures, bounds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.protocol.codec import PROTOCOL_VERSION, decode, encode
from penstock.protocol.effects import Effect, Reply, Send, SetTimer
from penstock.protocol.errors import ErrorInfo, Overloaded
from penstock.protocol.instance import (
    Attach,
    Attached,
    CostModel,
    InstanceCard,
    LiveRequest,
    Load,
    Probe,
    Resync,
    Snapshot,
)
from penstock.protocol.kv import KvLayout, Refused, block_keys, root_key
from penstock.protocol.request import Cancel, SamplingParams, Submit
from penstock.protocol.tokens import Credit, PromptLogprobs, TokenLogprobs, TokenRow, Tokens
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.service.placement import PlacementConfig


def card(name: str, incarnation: int) -> InstanceCard:
    return InstanceCard(
        name=name,
        incarnation=incarnation,
        pid=1,
        model="m",
        model_digest="d",
        vocab_size=100,
        max_model_len=256,
        dtype="float32",
        device="none",
        layout=KvLayout(1, 1, 8, 16, "float32", 4096),
        num_blocks=32,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )


class Bench:
    """A service core with instances that say what the test makes them say."""

    def __init__(self, *names: str, **config: Any) -> None:
        known = PlacementConfig.__dataclass_fields__
        placement = PlacementConfig(**{k: config.pop(k) for k in list(config) if k in known})
        self.core = ServiceCore(ServiceCoreConfig(name="s", placement=placement, **config))
        self.now = 0.0
        self.timer_s = 0.0
        self.sent: list[tuple[str, Any]] = []
        self.deltas: dict[str, list[TokenDelta]] = {}
        self._numbers: dict[str, int] = {}
        for name in names:
            self._take(self.core.add_instance(name, self.now))
            self.attached(name)
        self.sent.clear()

    def attached(self, name: str, incarnation: int = 1) -> None:
        self.say(name, Attached(card(name, incarnation), PROTOCOL_VERSION))

    def say(self, name: str, message: Any) -> None:
        self._take(self.core.on_message(name, decode(encode(message)), self.now))
        self.core.check()

    def submit(self, request_id: str = "r", **more: Any) -> None:
        fields: dict[str, Any] = {
            "prompt_ids": [1, 2, 3],
            "sampling": SamplingParams(max_tokens=10),
        } | more
        self._take(self.core.submit(GenerationSpec(request_id=request_id, **fields), self.now))
        self.core.check()

    def row(self, name: str, *rows: TokenRow, incarnation: int = 1, skip: int = 0) -> None:
        number = self._numbers[name] = self._numbers.get(name, 0) + 1 + skip
        self.say(name, Tokens(name, incarnation, number, list(rows)))

    def wait(self, seconds: float, alive: tuple[str, ...] = ()) -> None:
        """Timers fire; the instances in `alive` send heartbeats."""
        until, beat = self.now + seconds, 0
        while self.now < until:
            self.now += 0.25
            beat += 1
            for name in alive:
                self.say(name, load(name, beat))
            self._take(self.core.on_timer(self.now))
        self.core.check()

    def taken(self, kind: type) -> list[tuple[str, Any]]:
        """What was sent of that kind since the last look."""
        found = [(peer, m) for peer, m in self.sent if isinstance(m, kind)]
        self.sent = [(peer, m) for peer, m in self.sent if not isinstance(m, kind)]
        return found

    def _take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(peer=peer, message=message):
                    self.sent.append((peer, decode(encode(message))))
                case Reply(request_id=request_id, event=event):
                    self.deltas.setdefault(request_id, []).append(event)
                case SetTimer(at_s=at_s):
                    self.timer_s = at_s


def load(name: str, number: int, cost: CostModel | None = None) -> Load:
    return Load(
        instance=name,
        incarnation=1,
        number=number,
        step=0,
        step_end_in_s=0.0,
        waiting={},
        running={},
        waiting_tokens=0,
        running_tokens=0,
        kv_blocks_used=0,
        kv_blocks_cached=0,
        kv_blocks_total=32,
        preemptions=0,
        prefix_hit_tokens=0,
        prefix_query_tokens=0,
        steps=0,
        cost=cost or CostModel(),
    )


def ids_of(bench: Bench, request_id: str = "r", choice: int = 0) -> list[int]:
    return [i for d in bench.deltas.get(request_id, []) if d.choice == choice for i in d.ids]


def ends_of(bench: Bench, request_id: str = "r") -> list[str]:
    return [
        d.error.code if d.error else str(d.finish)
        for d in bench.deltas.get(request_id, [])
        if d.finish
    ]


def test_a_submit_carries_what_the_engine_needs() -> None:
    bench = Bench("a")
    prompt = list(range(1, 41))
    bench.submit(prompt_ids=prompt, n=2, cache_salt="x", priority=3)
    (_, first), (_, second) = bench.taken(Submit)
    assert (first.request_id, first.choice, first.group) == ("r/0", 0, "r")
    assert (second.request_id, second.choice, second.attempt) == ("r/1", 1, 1)
    assert first.block_keys == block_keys(root_key("d", salt="x"), prompt)
    # Room between two priorities for who is late and who is overdue.
    assert (first.priority, first.resumed_ids) == (3 * 3, [])


def test_rows_become_deltas_and_credit() -> None:
    bench = Bench("a", credit_every=2)
    bench.submit()
    bench.row("a", TokenRow("r/0", 1, 0, [5], cached_tokens=16))
    bench.row("a", TokenRow("r/0", 1, 1, [6], "stop", stop_token=6))
    assert ids_of(bench) == [5, 6] and ends_of(bench) == ["stop"]
    assert bench.deltas["r"][0].cached_tokens == 16
    assert [m.number for _, m in bench.taken(Credit)] == [2]
    assert len(bench.core.journal) == 0


def test_duplicates_old_attempts_and_strangers_are_dropped() -> None:
    bench = Bench("a")
    bench.submit()
    message = Tokens("a", 1, 1, [TokenRow("r/0", 1, 0, [5])])
    bench.say("a", message)
    bench.say("a", message)  # the frame again
    bench._numbers["a"] = 1
    bench.row("a", TokenRow("r/0", 1, 0, [5]))  # the row again, under another number
    bench.row("a", TokenRow("r/0", 0, 1, [9]))  # an older attempt
    bench.row("a", TokenRow("x/0", 1, 0, [9]))  # never ours
    bench.say("stranger", Tokens("stranger", 1, 1, [TokenRow("r/0", 1, 1, [9])]))
    assert ids_of(bench) == [5]


def test_a_gap_in_the_tokens_is_drawn_again() -> None:
    bench = Bench("a")
    bench.submit()
    bench.row("a", TokenRow("r/0", 1, 0, [5]))
    bench.taken(Submit)
    bench.row("a", TokenRow("r/0", 1, 2, [7]), skip=1)
    ((_, again),) = bench.taken(Submit)
    assert (again.attempt, again.resumed_ids) == (2, [5])
    assert len(bench.taken(Resync)) == 1
    assert ids_of(bench) == [5]


def test_a_lost_instance_is_left_for_another_with_what_was_emitted() -> None:
    bench = Bench("a", "b")
    bench.submit()
    ((first, _),) = bench.taken(Submit)
    bench.row(first, TokenRow("r/0", 1, 0, [5]))
    bench._take(bench.core.on_instance_lost(first, bench.now))
    ((second, again),) = bench.taken(Submit)
    assert second != first and again.resumed_ids == [5] and again.attempt == 2
    bench.row(first, TokenRow("r/0", 1, 1, [66]))  # the zombie still talks
    bench.row(second, TokenRow("r/0", 2, 1, [6], "length"))
    assert ids_of(bench) == [5, 6] and ends_of(bench) == ["length"]


def test_an_instance_that_forgot_us_is_left_at_once_and_taken_back() -> None:
    bench = Bench("a")
    bench.submit()
    bench.taken(Submit)
    bench.row("a", TokenRow("r/0", 1, 0, [5]))
    bench.say("a", Refused("submit", "attach first", "q/0", 1, "not_attached"))
    assert bench.core.instances["a"].state == "lost" and not bench.core.instances["a"].entries
    bench.attached("a")
    ((_, again),) = bench.taken(Submit)
    assert again.resumed_ids == [5]
    # It counts from one again; its rows must not be taken for old ones.
    bench.say("a", Tokens("a", 1, 1, [TokenRow("r/0", again.attempt, 1, [6])]))
    assert ids_of(bench) == [5, 6]


def test_a_lost_cancel_is_repeated_when_the_ghost_speaks() -> None:
    bench = Bench("a")
    bench.submit()
    bench._take(bench.core.cancel("r", None, bench.now))
    bench.sent.clear()
    bench.row("a", TokenRow("r/0", 1, 0, [5]))
    assert [m.attempt for _, m in bench.taken(Cancel)] == [1]
    bench.row("a", TokenRow("r/0", 1, 1, [], "cancelled"))
    assert bench.taken(Cancel) == []


def test_our_own_pause_is_not_an_instances_silence() -> None:
    bench = Bench("a", "b", lost_after_s=2.5)
    bench.submit()
    bench.wait(1.0, alive=("a", "b"))
    bench.now += 30.0  # the machine slept; timers come before the heartbeats that have gathered
    bench._take(bench.core.on_timer(bench.now))
    assert {i.state for i in bench.core.instances.values()} == {"active"}
    assert len(bench.taken(Submit)) == 1


def test_a_draining_instance_gets_nothing_new() -> None:
    bench = Bench("a", "b")
    draining = msgspec.structs.replace(load("a", 1), draining=True)
    bench.say("a", draining)
    for number in range(4):
        bench.submit(f"r{number}")
    assert {peer for peer, _ in bench.taken(Submit)} == {"b"}


def test_two_models_are_not_mixed() -> None:
    bench = Bench("a")
    bench._take(bench.core.add_instance("b", bench.now))
    other = msgspec.structs.replace(card("b", 1), model_digest="another")
    bench.say("b", Attached(other, PROTOCOL_VERSION))
    assert bench.core.instances["b"].state == "refused"
    assert "another model" in bench.core.instances["b"].refusal


def test_bystanders_survive_engines_that_die_in_a_row() -> None:
    bench = Bench("a")
    bench.submit()
    for incarnation in range(2, 7):
        bench.attached("a", incarnation=incarnation)
    assert ends_of(bench) == []
    assert len(bench.taken(Submit)) == 6


def test_missing_prompt_logprobs_are_asked_for_again() -> None:
    bench = Bench("a")
    params = SamplingParams(max_tokens=4, prompt_logprobs=0)
    bench.submit(prompt_ids=[1, 2, 3], sampling=params)
    bench.taken(Submit)
    bench.row("a", TokenRow("r/0", 1, 0, [5]))  # their message was lost on the way
    ((_, again),) = bench.taken(Submit)
    assert again.sampling.prompt_logprobs == 0 and ids_of(bench) == []


def test_services_speak_though_they_have_nothing_to_say() -> None:
    bench = Bench("a", speak_every_s=1.0)
    bench.wait(4.0, alive=("a",))
    assert len(bench.taken(Credit)) >= 3


def test_silence_is_suspected_then_lost_within_the_bound() -> None:
    bench = Bench("a", "b", suspect_after_s=1.0, lost_after_s=3.0)
    bench.submit()
    ((first, _),) = bench.taken(Submit)
    other = "b" if first == "a" else "a"
    bench.wait(1.5, alive=(other,))
    assert bench.core.instances[first].state == "suspect"
    assert bench.taken(Probe)
    bench.submit("q")
    assert [peer for peer, _ in bench.taken(Submit)] == [other]  # nothing new for a suspect
    bench.wait(2.5, alive=(other,))
    assert bench.core.instances[first].state == "lost"
    assert [peer for peer, m in bench.taken(Submit) if m.request_id == "r/0"] == [other]


def test_a_woken_zombie_is_reconciled_and_taken_back() -> None:
    bench = Bench("a", "b", suspect_after_s=1.0, lost_after_s=3.0)
    bench.submit()
    ((first, _),) = bench.taken(Submit)
    other = "b" if first == "a" else "a"
    bench.wait(4.0, alive=(other,))
    bench.sent.clear()
    bench.say(first, load(first, 99))
    ((peer, resync),) = bench.taken(Resync)
    assert peer == first
    bench.say(first, Snapshot(first, 1, [LiveRequest("r/0", 1, 3)], 0, b"", resync.nonce))
    assert [(peer, m.attempt) for peer, m in bench.taken(Cancel)] == [(first, 1)]
    bench.wait(0.25, alive=(first, other))
    assert first in [peer for peer, _ in bench.taken(Attach)]
    bench.attached(first)
    assert bench.core.instances[first].state == "active"


def test_a_new_incarnation_replaces_the_old_at_once() -> None:
    bench = Bench("a")
    bench.submit()
    bench.taken(Submit)
    bench.row("a", TokenRow("r/0", 1, 0, [5]))
    bench.attached("a", incarnation=2)
    ((_, again),) = bench.taken(Submit)
    assert again.resumed_ids == [5]
    bench.say("a", Tokens("a", 1, 2, [TokenRow("r/0", 2, 1, [66])]))  # from before
    bench.say("a", Tokens("a", 2, 1, [TokenRow("r/0", 2, 1, [6])]))
    assert ids_of(bench) == [5, 6]


def test_without_an_instance_requests_wait_and_then_end_in_a_typed_error() -> None:
    bench = Bench(recovery_s=4.0)
    bench._take(bench.core.add_instance("a", 0.0))
    bench.submit()
    bench.wait(3.0)
    assert ends_of(bench) == []
    bench.wait(2.0)
    assert ends_of(bench) == ["engine_unavailable"]


def test_a_restart_that_is_under_way_is_waited_for() -> None:
    bench = Bench("a", recovery_s=4.0, restart_recovery_s=60.0)
    bench.submit()
    bench.core.expect("a", True)
    bench._take(bench.core.on_instance_lost("a", bench.now))
    bench.wait(20.0)
    assert ends_of(bench) == []
    bench.taken(Submit)
    bench.attached("a", incarnation=2)
    assert len(bench.taken(Submit)) == 1


def test_a_request_that_kills_its_engines_is_given_up() -> None:
    bench = Bench("a", max_failed_steps=2)
    bench.submit()
    failed = ErrorInfo("engine_failed", "boom")
    for attempt in (1, 2, 3):
        bench.row("a", TokenRow("r/0", attempt, 0, [], "error", error=failed))
    assert ends_of(bench) == ["engine_failed"]


def test_an_error_of_the_users_own_is_final() -> None:
    bench = Bench("a")
    bench.submit()
    wrong = ErrorInfo("invalid_request", "no", "logit_bias")
    bench.row("a", TokenRow("r/0", 1, 0, [], "error", error=wrong))
    assert ends_of(bench) == ["invalid_request"]
    assert bench.deltas["r"][-1].error == wrong


def test_a_lost_submit_is_noticed_and_sent_again() -> None:
    bench = Bench("a", resync_after_s=2.0)
    bench.submit()
    bench.sent.clear()
    bench.wait(2.5, alive=("a",))
    ((_, resync),) = bench.taken(Resync)
    bench.say("a", Snapshot("a", 1, [], 0, b"", resync.nonce - 1))  # an older answer
    assert bench.taken(Submit) == []
    bench.say("a", Snapshot("a", 1, [], 0, b"", resync.nonce))
    ((_, again),) = bench.taken(Submit)
    assert again.attempt == 2


def test_a_refusal_places_elsewhere() -> None:
    bench = Bench("a", "b")
    bench.submit()
    ((first, _),) = bench.taken(Submit)
    bench.say(first, Refused("submit", "draining", "r/0", 1, "draining"))
    ((second, again),) = bench.taken(Submit)
    assert second != first and again.attempt == 2


def test_the_queue_has_an_end() -> None:
    bench = Bench("a", max_queue=3)
    bench.submit("one", n=2)
    bench.submit("two")
    with pytest.raises(Overloaded) as caught:
        bench.submit("three")
    assert caught.value.retry_after_s
    bench.row("a", TokenRow("one/0", 1, 0, [5]))  # it runs now: a place is free
    bench.submit("three")


def test_cancel_is_final_for_the_caller_and_counted_back() -> None:
    bench = Bench("a")
    bench.submit(n=2)
    bench._take(bench.core.cancel("r", 1, bench.now))
    bench.row("a", TokenRow("r/1", 1, 0, [], "cancelled"), TokenRow("r/0", 1, 0, [6]))
    assert ids_of(bench, choice=1) == [] and ids_of(bench, choice=0) == [6]
    bench._take(bench.core.cancel("r", None, bench.now))
    bench._take(bench.core.cancel("r", None, bench.now))
    assert [m.request_id for _, m in bench.taken(Cancel)] == ["r/1", "r/0"]
    assert len(bench.core.journal) == 0 and bench.core.placement.num_queued == 0


def test_prompt_logprobs_are_not_repeated_after_a_move() -> None:
    bench = Bench("a")
    params = SamplingParams(max_tokens=4, prompt_logprobs=0)
    bench.submit(prompt_ids=[1, 2, 3, 4], sampling=params)

    def entry(position: int) -> TokenLogprobs:
        return TokenLogprobs(position, -1.0, 1, [], [])

    bench.say("a", PromptLogprobs("a", 1, "r/0", 1, 1, [entry(1), entry(2)]))
    bench.attached("a", incarnation=2)
    bench.say("a", PromptLogprobs("a", 2, "r/0", 2, 1, [entry(1), entry(2), entry(3)]))
    found = [e.token_id for d in bench.deltas["r"] for e in d.prompt_logprobs or ()]
    assert found == [1, 2, 3]
    bench.taken(Submit)
    bench.attached("a", incarnation=3)
    ((_, again),) = bench.taken(Submit)
    assert again.sampling.prompt_logprobs is None  # all known: not computed a third time


def test_a_time_budget_ends_in_an_error_and_frees_the_engine() -> None:
    bench = Bench("a")
    bench.submit(total_budget_s=1.0)
    ((_, submit),) = bench.taken(Submit)
    assert submit.total_budget_s == 1.0
    bench.wait(1.5, alive=("a",))
    assert ends_of(bench) == ["engine_unavailable"]
    assert len(bench.taken(Cancel)) == 1


def test_work_goes_where_it_will_start_first() -> None:
    bench = Bench("a", "b")
    fast = CostModel(per_token_s=1e-4, num_steps=100)
    slow = CostModel(per_token_s=1e-3, num_steps=100)
    bench.say("a", load("a", 1, slow))
    bench.say("b", load("b", 1, fast))
    bench.submit("one", prompt_ids=[1] * 100)
    bench.submit("two", prompt_ids=[1] * 100)
    assert [peer for peer, _ in bench.taken(Submit)] == ["b", "b"]
    explanation = bench.core.explain("two")
    assert explanation is not None and explanation.live
    decision = explanation.choices[0].placements[0].decision
    assert decision is not None
    assert [c.instance for c in decision.candidates] == ["b", "a"]
    assert "100 tokens queued" in decision.reason


def test_an_instance_of_another_version_is_not_used() -> None:
    bench = Bench()
    bench._take(bench.core.add_instance("a", 0.0))
    bench.say("a", Refused("attach", "speaks version 9", code="version_mismatch"))
    assert not bench.core.ready
    bench.submit()
    assert bench.taken(Submit) == []
