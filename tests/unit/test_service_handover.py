"""Prefill here, decode there, as the service sees it: what it tells whom, and what goes wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.unit.test_service_core import Bench as PlainBench
from tests.unit.test_service_core import card as plain_card
from tests.unit.test_service_core import ends_of, ids_of, load

from penstock.protocol.codec import PROTOCOL_VERSION
from penstock.protocol.errors import ErrorInfo, Overloaded
from penstock.protocol.instance import (
    Assign,
    Assigned,
    Attached,
    Drain,
    Resync,
    Snapshot,
)
from penstock.protocol.kv import Fetch, Fetched, KvChange, KvEvents, Refused, block_keys, root_key
from penstock.protocol.request import Cancel, SamplingParams, Stage, Submit
from penstock.protocol.tokens import TokenRow
from penstock.service.cluster.finder import IndexFinder
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.explain import SequenceExplanation
from penstock.service.placement import PlacementConfig
from penstock.service.policies.view import Candidate, ClusterView, Decision, RouteRequest

PROMPT = list(range(1, 41))  # two whole blocks and a half


def card(name: str, incarnation: int = 1) -> Any:
    return msgspec.structs.replace(
        plain_card(name, incarnation), endpoints={"control": f"tcp://{name}"}, host="h"
    )


class Script:
    """A policy that does as told: prefill on the first name that is there, decode on the next."""

    def __init__(self) -> None:
        self.asked: list[RouteRequest] = []
        self.order = ["p", "d", "e"]
        self.ttft_s = 0.0

    def __call__(self, view: ClusterView, request: RouteRequest) -> Decision:
        self.asked.append(request)
        able = [name for name in self.order if name in view.names]
        decode = None
        if request.prefilled_on is not None:
            able = [n for n in able if n != request.prefilled_on] or able
        elif not request.aggregated_because and len(able) > 1:
            decode = able[1]
        candidates = (Candidate(instance=able[0], predicted_ttft_s=self.ttft_s),)
        return Decision(
            policy="script", instance=able[0], candidates=candidates, reason="told", decode=decode
        )


class Bench(PlainBench):
    def __init__(self, *names: str, finder: Any = None, **config: Any) -> None:
        super().__init__()
        self.policy = Script()
        known = PlacementConfig.__dataclass_fields__
        placement = PlacementConfig(**{k: config.pop(k) for k in list(config) if k in known})
        self.core = ServiceCore(
            ServiceCoreConfig(name="s", placement=placement, **config), self.policy, finder
        )
        for name in names:
            self._take(self.core.add_instance(name, self.now))
            self.attached(name)
        self.sent.clear()

    def attached(self, name: str, incarnation: int = 1) -> None:
        self.say(name, Attached(card(name, incarnation), PROTOCOL_VERSION))

    def sequence(self, request_id: str = "r") -> SequenceExplanation:
        explanation = self.core.explain(request_id)
        assert explanation is not None
        return explanation.choices[0]

    def split(self, **more: Any) -> None:
        """A request of which p computes the prompt for d."""
        self.submit(prompt_ids=PROMPT, **more)
        assert [peer for peer, _ in self.taken(Submit)] == ["p"]
        assert [peer for peer, _ in self.taken(Fetch)] == ["d"]

    def hand_over(self, token: int = 5) -> None:
        self.row("p", TokenRow("r/0", 1, 0, [token], "handover"))


def test_a_split_request_goes_to_both_and_on_from_the_first_token() -> None:
    bench = Bench("p", "d")
    bench.say("d", Assigned("d", "decode", 7))
    bench.submit(prompt_ids=PROMPT)
    ((first, submit),) = bench.taken(Submit)
    ((second, fetch),) = bench.taken(Fetch)
    assert (first, second) == ("p", "d")
    assert submit.plan == [Stage("prefill", "p", 0), Stage("decode", "d", 7)]
    assert (fetch.request_id, fetch.attempt, fetch.epoch) == ("r/0", 1, 7)
    assert fetch.keys == block_keys(root_key("d"), PROMPT) and fetch.num_tokens == 41
    assert (fetch.source.instance, fetch.source.address) == ("p", "tcp://p")
    assert fetch.source.num_blocks == 2 and fetch.lease_s > 0

    bench.hand_over()
    ((peer, again),) = bench.taken(Submit)
    assert (peer, again.attempt, again.resumed_ids) == ("d", 2, [5])
    assert again.plan == [Stage("decode", "d", 7)]
    assert again.kv_source is not None and again.kv_source.instance == "p"
    assert bench.taken(Cancel) == [] and len(bench.policy.asked) == 1
    assert ids_of(bench) == [5] and ends_of(bench) == []

    bench.row("d", TokenRow("r/0", 2, 1, [6, 7], "length", cached_tokens=32))
    assert ids_of(bench) == [5, 6, 7] and ends_of(bench) == ["length"]
    assert bench.core.placement.num_handovers == 1 and bench.core.placement.num_resumed == 0
    assert [p.because for p in bench.sequence().placements] == ["new", "handover"]


def test_an_answer_that_ends_with_its_first_token_frees_the_reservation() -> None:
    bench = Bench("p", "d")
    bench.split()
    bench.row("p", TokenRow("r/0", 1, 0, [5], "stop", stop_token=5))
    assert ends_of(bench) == ["stop"]
    assert [(peer, m.attempt) for peer, m in bench.taken(Cancel)] == [("d", 1)]
    assert not bench.core.instances["d"].coming


@pytest.mark.parametrize(
    "more",
    [
        {"sampling": SamplingParams(max_tokens=1)},
        {"sampling": SamplingParams(max_tokens=9, prompt_logprobs=0)},
    ],
)
def test_what_should_stay_whole_is_not_split(more: dict[str, Any]) -> None:
    bench = Bench("p", "d")
    bench.submit(prompt_ids=PROMPT, **more)
    assert bench.policy.asked[0].aggregated_because
    assert bench.taken(Fetch) == [] and bench.taken(Submit)[0][1].plan == []


def test_a_refused_fetch_asks_the_policy_when_the_prompt_is_done() -> None:
    bench = Bench("p", "d", "e")
    bench.split()
    bench.say("d", Refused("fetch", "no room", "r/0", 1, "no_room"))
    bench.say("d", Refused("fetch", "no room", "r/0", 1, "no_room"))
    assert bench.taken(Submit) == []  # the prompt goes on being computed
    bench.policy.order = ["p", "e", "d"]
    bench.hand_over()
    ((peer, again),) = bench.taken(Submit)
    assert (peer, again.resumed_ids) == ("e", [5])
    assert bench.policy.asked[-1].prefilled_on == "p"


def test_a_decode_instance_that_changed_meanwhile_is_not_taken_for_granted() -> None:
    bench = Bench("p", "d", "e")
    bench.split()
    bench.say("d", Assigned("d", "prefill", 1 << 32))
    bench.policy.order = ["p", "e", "d"]
    bench.hand_over()
    assert [peer for peer, _ in bench.taken(Cancel)] == ["d"]  # what it has taken in is freed
    assert [peer for peer, _ in bench.taken(Submit)] == ["e"]


def test_death_of_the_decode_instance_before_the_handover() -> None:
    bench = Bench("p", "d")
    bench.split()
    bench._take(bench.core.on_instance_lost("d", bench.now))
    bench.core.check()
    assert bench.taken(Submit) == []
    bench.hand_over()
    ((peer, again),) = bench.taken(Submit)  # nobody else is there: p goes on with it
    assert (peer, again.resumed_ids, again.kv_source) == ("p", [5], None)
    bench.row("p", TokenRow("r/0", 2, 1, [6], "length"))
    assert ids_of(bench) == [5, 6] and ends_of(bench) == ["length"]


def test_death_of_the_decode_instance_after_the_handover() -> None:
    bench = Bench("p", "d")
    bench.split()
    bench.hand_over()
    bench.taken(Submit)
    bench.row("d", TokenRow("r/0", 2, 1, [6]))
    bench._take(bench.core.on_instance_lost("d", bench.now))
    ((peer, again),) = bench.taken(Submit)
    assert (peer, again.resumed_ids, again.attempt) == ("p", [5, 6], 3)
    assert bench.policy.asked[-1].aggregated_because


def test_death_of_the_prefill_instance_before_the_handover() -> None:
    bench = Bench("p", "d")
    bench.split()
    bench._take(bench.core.on_instance_lost("p", bench.now))
    bench.core.check()
    assert [(peer, m.attempt) for peer, m in bench.taken(Cancel)] == [("d", 1)]
    ((peer, again),) = bench.taken(Submit)
    assert (peer, again.resumed_ids, again.plan) == ("d", [], [])


def test_a_lost_handover_row_is_drawn_again() -> None:
    bench = Bench("p", "d", resync_after_s=2.0)
    bench.split()
    bench.wait(2.5, alive=("p", "d"))
    ((_, resync),) = bench.taken(Resync)
    bench.say("p", Snapshot("p", 1, [], 0, b"", resync.nonce))
    ((peer, again),) = bench.taken(Submit)
    assert (peer, again.resumed_ids, again.plan) == ("p", [], [])
    bench.row("p", TokenRow("r/0", 2, 0, [5, 6], "length"))
    assert ids_of(bench) == [5, 6]


def test_a_handover_row_that_comes_twice_counts_once() -> None:
    bench = Bench("p", "d")
    bench.split()
    bench.hand_over()
    bench.hand_over()  # another number, the same row
    assert ids_of(bench) == [5] and len(bench.taken(Submit)) == 1
    assert bench.core.placement.num_handovers == 1


def test_a_plan_that_is_too_old_is_made_anew_and_without_the_epoch() -> None:
    bench = Bench("p")
    bench.say("p", Assigned("p", "prefill", 3))
    bench.submit(prompt_ids=PROMPT)
    ((_, first),) = bench.taken(Submit)
    assert first.plan == [Stage("prefill", "p", 3)]
    bench.say("p", Refused("submit", "the plan is older", "r/0", 1, "stale_epoch"))
    bench.wait(0.25)
    ((_, again),) = bench.taken(Submit)
    assert again.plan == []
    bench.say("p", Assigned("p", "decode", 4))
    assert not bench.core.instances["p"].epoch_in_doubt


def test_cancel_while_both_have_it() -> None:
    bench = Bench("p", "d")
    bench.split()
    bench._take(bench.core.cancel("r", None, bench.now))
    bench.core.check()
    assert sorted(peer for peer, _ in bench.taken(Cancel)) == ["d", "p"]


def test_a_failed_step_of_the_prefill_is_tried_again_whole() -> None:
    bench = Bench("p", "d")
    bench.split()
    bench.row("p", TokenRow("r/0", 1, 0, [], "error", error=ErrorInfo("engine_failed", "boom")))
    ((_, again),) = bench.taken(Submit)
    assert again.plan == [] and [peer for peer, _ in bench.taken(Cancel)] == ["d"]


# --- hand-over of what runs -----------------------------------------------------------------------


def running(bench: Bench, num_tokens: int = 20) -> None:
    bench.policy.order = ["d", "p", "e"]
    params = SamplingParams(max_tokens=200, prompt_logprobs=None)
    bench.submit(prompt_ids=PROMPT[:4], sampling=params)
    bench.taken(Fetch)
    ((peer, submit),) = bench.taken(Submit)
    ids = list(range(num_tokens))
    bench.row(peer, TokenRow("r/0", submit.attempt, 0, [50], "handover"))
    ((peer, submit),) = bench.taken(Submit)
    bench.row(peer, TokenRow("r/0", submit.attempt, 1, ids))
    bench.sent.clear()


def test_drain_moves_what_runs_and_then_lets_the_instance_go() -> None:
    bench = Bench("p", "d", "e")
    running(bench)
    assert list(bench.core.instances["p"].entries) == ["r/0"]
    bench._take(bench.core.drain_instance("p", bench.now))
    bench.core.check()
    ((peer, again),) = bench.taken(Submit)
    assert peer == "d" and len(again.resumed_ids) == 21
    assert again.kv_source is not None and again.kv_source.instance == "p"
    assert again.kv_source.num_blocks == 1  # 4 + 20 tokens have KV: one whole block
    assert [peer for peer, _ in bench.taken(Cancel)] == ["p"]
    assert bench.taken(Drain) == []  # d still wants its blocks
    bench.row("d", TokenRow("r/0", again.attempt, 21, [7]))
    bench.wait(0.25, alive=("p", "d", "e"))
    assert [peer for peer, _ in bench.taken(Drain)] == ["p"]
    bench.submit("q")
    assert "p" not in [peer for peer, _ in bench.taken(Submit)]
    assert bench.core.placement.num_migrated == 1 and bench.core.placement.num_resumed == 0


def test_the_last_instance_finishes_what_it_has() -> None:
    bench = Bench("p")
    bench.submit(sampling=SamplingParams(max_tokens=100))
    bench.taken(Submit)
    bench._take(bench.core.drain_instance("p", bench.now))
    assert bench.taken(Submit) == [] and len(bench.taken(Drain)) == 1
    bench.row("p", TokenRow("r/0", 1, 0, [5], "stop"))
    assert ends_of(bench) == ["stop"]


def test_an_instance_that_is_to_prefill_hands_over_what_it_decodes() -> None:
    bench = Bench("p", "d", "e")
    running(bench)
    bench.say("p", Assigned("p", "decode_to_prefill", 9))
    bench.wait(0.25, alive=())
    ((peer, again),) = bench.taken(Submit)
    assert peer == "d" and again.kv_source is not None
    assert "is to prefill" in bench.sequence().placements[-1].because


def test_a_removed_instance_leaves_nothing() -> None:
    bench = Bench("p", "d")
    bench.split()
    bench._take(bench.core.remove_instance("p", bench.now))
    bench.core.check()
    assert [peer for peer, _ in bench.taken(Submit)] == ["d"]
    assert list(bench.core.instances) == ["d"]


# --- what is known of caches ----------------------------------------------------------------------


def events(name: str, number: int, keys: bytes, op: Any = "stored") -> KvEvents:
    return KvEvents(name, 1, number, [KvChange(op, keys)])


def snapshot(bench: Bench, name: str, number: int, keys: bytes) -> None:
    (nonce,) = [m.nonce for peer, m in bench.taken(Resync) if peer == name]
    bench.say(name, Snapshot(name, 1, [], number, keys, nonce))


def test_hits_come_from_events_and_a_gap_from_a_snapshot() -> None:
    bench = Bench(finder=IndexFinder())
    bench._take(bench.core.add_instance("p", bench.now))
    bench.attached("p")
    keys = block_keys(root_key("d"), PROMPT)
    snapshot(bench, "p", 4, b"")
    bench.say("p", events("p", 5, keys[:16]))
    bench.submit("one", prompt_ids=PROMPT)
    assert bench.policy.asked[-1].device_hits is not None
    assert list(bench.policy.asked[-1].device_hits) == [16]
    bench.now += 2.0
    bench.say("p", events("p", 7, b""))  # 6 is missing
    snapshot(bench, "p", 7, keys)
    bench._take(bench.core.cancel("one", None, bench.now))
    bench.submit("two", prompt_ids=PROMPT)
    assert list(bench.policy.asked[-1].device_hits) == [32]
    bench._take(bench.core.on_instance_lost("p", bench.now))
    bench.attached("p", incarnation=2)
    assert list(bench.policy.asked[-1].device_hits) == [0]  # a new process has an empty cache


def test_a_sibling_that_waits_counts_as_a_hit_to_come() -> None:
    bench = Bench("p", finder=IndexFinder())
    bench.submit("one", prompt_ids=PROMPT)
    bench.submit("two", prompt_ids=[*PROMPT[:32], 99, 98])
    hits = bench.policy.asked[-1].device_hits
    assert hits is not None and list(hits) == [32]


def test_hits_are_audited() -> None:
    finder = IndexFinder()
    bench = Bench("p", finder=finder)
    bench.submit("one", prompt_ids=PROMPT)
    bench.row("p", TokenRow("one/0", 1, 0, [5], cached_tokens=16))
    account = finder.accounts["p"]
    assert (account.num_observed, account.actual_tokens) == (1, 16)


# --- in time or not at all ------------------------------------------------------------------------


def test_what_cannot_be_in_time_is_refused_with_both_times() -> None:
    bench = Bench("p", ttft_slo_s=0.5)
    bench.policy.ttft_s = 2.0
    with pytest.raises(Overloaded, match=r"2\.00 s.*0\.50 s") as caught:
        bench.submit()
    assert caught.value.retry_after_s == 1.5
    bench.submit("patient", ttft_slo_s=3.0)
    bench.submit("batch", request_class="offline")
    assert bench.policy.asked[-1].ttft_slo_s is None
    assert len(bench.core.journal) == 2


# --- work of others, and where the time went ------------------------------------------------------


def test_the_work_of_other_services_counts() -> None:
    bench = Bench("p", "d")
    busy = msgspec.structs.replace(
        load("p", 1), running={"online": 3}, running_tokens=300, waiting={"online": 2},
        waiting_tokens=50,
    )  # fmt: skip
    bench.say("p", busy)
    view = bench.core.placement.sight(bench.now)[1]
    assert list(view.running) == [3, 0] and list(view.queued) == [2, 0]
    assert list(view.running_tokens) == [300, 0] and list(view.queued_tokens) == [50, 0]


def test_where_the_time_went() -> None:
    bench = Bench("p", "d")
    bench.split()
    bench.now = 1.0
    bench.row("p", TokenRow("r/0", 1, 0, [5], "handover", queued_s=0.25))
    bench.now = 1.5
    bench.say("d", Fetched("d", 1, "r/0", 2, 2, 2, 8192, 0.4, "map"))
    bench.now = 2.0
    bench.row("d", TokenRow("r/0", 2, 1, [6], cached_tokens=32, queued_s=0.5))
    bench.now = 4.0
    bench.row("d", TokenRow("r/0", 2, 2, [7], "stop"))
    found = bench.sequence()
    assert (found.finish, found.output_tokens, found.ttft_s, found.tpot_s) == ("stop", 3, 1.0, 1.5)
    phases = found.phases
    assert phases.queue_s == pytest.approx(0.25 + 0.1)
    assert phases.transfer_s == pytest.approx(0.4)
    assert phases.prefill_s == pytest.approx(0.75 + 0.5)
    assert phases.decode_s == pytest.approx(2.0) and phases.lost_s == 0.0
    assert phases.total_s == pytest.approx(4.0)
    assert found.placements[1].fetched is not None and found.placements[1].source == "p"
    assert found.placements[1].cached_tokens == 32


def test_explanations_of_old_requests_go() -> None:
    bench = Bench("p", explained_requests=2)
    for number in range(4):
        bench.submit(f"r{number}", sampling=SamplingParams(max_tokens=1))
        bench.row("p", TokenRow(f"r{number}/0", 1, 0, [5], "length"))
    assert bench.core.explain("r1") is None
    kept = bench.core.explain("r3")
    assert kept is not None and not kept.live


# --- roles ----------------------------------------------------------------------------------------


def test_the_leader_alone_assigns_roles() -> None:
    bench = Bench("p", "d")
    with pytest.raises(Exception, match="does not lead"):
        bench.core.assign("p", "prefill", bench.now)
    bench.core.lead(3, bench.now)
    bench._take(bench.core.assign("p", "prefill", bench.now))
    ((peer, assign),) = bench.taken(Assign)
    assert (peer, assign) == ("p", Assign("prefill", 3 << 32 | 1))
    with pytest.raises(Exception, match="left to decode"):
        bench.core.assign("d", "prefill", bench.now)
    bench.wait(1.25)  # it did not hear us
    assert bench.taken(Assign)[0][1] == Assign("prefill", 3 << 32 | 2)
    bench.say("p", Assigned("p", "prefill", 3 << 32 | 2))
    bench.wait(0.75)
    assert bench.taken(Assign) == []


def test_a_new_process_is_told_again_what_it_was() -> None:
    bench = Bench("p", "d")
    bench.core.lead(1, bench.now)
    bench._take(bench.core.assign("p", "decode_to_prefill", bench.now))
    bench.say("p", Assigned("p", "decode_to_prefill", 1 << 32 | 1))
    bench.attached("p", incarnation=2)
    assert bench.core.instances["p"].epoch == 0
    bench.taken(Assign)
    bench.wait(0.75)
    ((_, assign),) = bench.taken(Assign)
    assert assign == Assign("prefill", 1 << 32 | 2)  # nothing of its old work is left to hand over


def test_what_was_fetched_ahead_is_what_the_record_says() -> None:
    bench = Bench("p", "d")
    bench.split()
    ahead = Fetched("d", 1, "r/0", 1, 2, 2, 8192, 0.1, "map")
    bench.say("d", ahead)
    bench.hand_over()
    bench.say("d", Fetched("d", 1, "r/0", 2, 0, 0, 0, 0.0, ""))  # nothing was left to fetch
    assert bench.sequence().placements[1].fetched == ahead


def test_what_is_handed_over_does_not_time_the_link() -> None:
    bench = Bench("p", "d")
    bench.split()
    transfer = bench.core.instances["d"].experience.transfer
    guess = transfer.line("map")
    bench.hand_over()
    # What was fetched ahead may be told of late: it came as fast as the prompt was computed.
    bench.say("d", Fetched("d", 1, "r/0", 1, 2, 2, 8192, 9.0, "map"))
    assert transfer.line("map") == guess
    bench.say("d", Fetched("d", 1, "r/0", 2, 2, 2, 8192, 0.5, "map"))  # this was there already
    seen = transfer.line("map")
    assert seen[0] + 32 * seen[1] == pytest.approx(0.5)
    bench.row("d", TokenRow("r/0", 2, 1, [6], "stop"))
    bench.say("d", Fetched("d", 1, "r/0", 2, 2, 2, 8192, 9.0, "map"))  # whose is it?
    assert transfer.line("map") == seen
