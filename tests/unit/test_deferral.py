"""Too late for its SLO anyway: behind those that can still be in time, but not for ever. And steps
that are paced for those that decode in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tests.helpers.scheduling import submit
from tests.helpers.views import make_view
from tests.unit.test_service_core import Bench, load

from penstock.engine.cost import CostFitter
from penstock.engine.pace import CostPace
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.sequence import Sequence
from penstock.protocol.instance import CostModel
from penstock.protocol.request import Cancel, Submit
from penstock.protocol.tokens import TokenRow
from penstock.service.policies.routing import RouteRequest, slo_aware
from penstock.service.policies.slo_aware import split

PD = ["prefill", "prefill", "decode"]


def request(num_tokens: int, **more: Any) -> RouteRequest:
    return RouteRequest(
        num_tokens=num_tokens, expected_output_tokens=20, ttft_slo_s=1.0, tpot_slo_s=0.05, **more
    )


# --- the policy -----------------------------------------------------------------------------------


def test_what_cannot_be_in_time_anywhere_is_deferred() -> None:
    busy = make_view(3, roles=PD, queued_tokens=[60_000, 60_000, 0], queued=[9, 9, 0])
    late = split(busy, request(500))
    assert late.deferred
    assert "behind the others" in late.reason
    assert not split(make_view(3, roles=PD), request(500)).deferred
    assert not split(busy, replace(request(500), ttft_slo_s=None)).deferred


def test_who_was_deferred_holds_nobody_up_who_is_in_time() -> None:
    view = make_view(3, roles=PD, deferred_tokens=[9e5, 9e5, 0], deferred=[99, 99, 0])
    decision = slo_aware(view, request(500))
    assert not decision.deferred
    assert decision.predicted_ttft_s < 0.1


def test_deferred_ones_go_where_fewest_wait_of_all() -> None:
    view = make_view(
        3, roles=PD, queued_tokens=[60_000, 60_000, 0], queued=[9, 9, 0],
        deferred_tokens=[50_000, 0, 0], deferred=[5, 0, 0],
    )  # fmt: skip
    assert split(view, request(500)).instance == "i1"


def test_who_is_still_to_come_is_not_taken_for_present() -> None:
    crowded = make_view(
        3, roles=PD, queued_tokens=[20_000, 20_000, 0], queued=[3, 3, 0], running=[0, 0, 15],
        running_tokens=[0, 0, 8e6], prefill_share=[0.9, 0.9, 0],
    )  # fmt: skip
    wanted = replace(request(500, max_step_s=0.04), expected_output_tokens=2)
    assert slo_aware(crowded, wanted).decode is None, "its tokens would come too slowly there"
    to_come = replace(crowded, coming=np.array([0.0, 0, 15]), coming_tokens=np.array([0, 0, 8e6]))
    assert slo_aware(to_come, wanted).decode == "i2"


# --- the service ----------------------------------------------------------------------------------

MEASURED = CostModel(0.01, 1e-3, 0.0, 0.0, 0.0, 1e-4, 100)


def bench(**config: Any) -> Bench:
    b = Bench("a", ttft_slo_s=0.2, refuses_late=False, **config)
    b.core.placement._policy = slo_aware
    b.say("a", load("a", 1, MEASURED))
    return b


def test_late_ones_are_taken_with_a_lower_priority_and_overtake_after_half_a_minute() -> None:
    b = bench()
    b.submit("first", prompt_ids=list(range(120)))
    b.submit("late", prompt_ids=list(range(130)))
    (_, first), (_, late) = b.taken(Submit)
    assert (first.priority, late.priority) == (0, 1)
    a = b.core.instances["a"]
    assert (a.deferred, a.deferred_tokens) == (1, 130)
    b.submit("short", prompt_ids=[1, 2, 3])
    assert [m.priority for _, m in b.taken(Submit)] == [0], "the queue is not longer for it"
    b.wait(29.0, alive=("a",))
    assert not [m for _, m in b.taken(Submit) if m.request_id.startswith("late")]
    b.wait(2.0, alive=("a",))
    (again,) = [m for _, m in b.taken(Submit) if m.request_id.startswith("late")]
    assert (again.priority, again.attempt) == (-1, 2)
    assert [m.attempt for _, m in b.taken(Cancel) if m.request_id == again.request_id] == [1]
    assert (a.deferred, a.deferred_tokens) == (0, 0)


def test_who_has_started_is_deferred_no_more() -> None:
    b = bench()
    b.submit("first", prompt_ids=list(range(120)))
    b.submit("late", prompt_ids=list(range(130)))
    b.row("a", TokenRow("late/0", 1, 0, [5], None))
    assert b.core.instances["a"].deferred == 0
    b.taken(Submit)
    b.wait(31.0, alive=("a",))
    assert not [m for _, m in b.taken(Submit) if m.request_id.startswith("late")]


# --- the engine -----------------------------------------------------------------------------------


class _Room:
    def room(self, decodes: list[Sequence]) -> int:
        return 100


def test_prompts_take_what_those_that_decode_can_bear() -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=4096)
    scheduler = Scheduler(config, num_blocks=200)
    scheduler.pace = _Room()
    scheduler.add(submit("short", 40))
    first = scheduler.schedule()
    assert first is not None and first.num_tokens == 40
    scheduler.add(submit("long", 1000))
    scheduler.add(submit("other", 300))
    beside = scheduler.schedule()
    assert beside is not None
    assert [row.num_tokens for row in beside.rows] == [1, 100]
    scheduler.add(submit("tiny", 8))
    scheduler.cancel(("s", "other"))
    beside = scheduler.schedule()
    assert beside is not None
    assert [row.num_tokens for row in beside.rows] == [1, 100, 8], "less than a block comes in"
    scheduler.cancel(("s", "short"))
    scheduler.cancel(("s", "tiny"))
    alone = scheduler.schedule()
    assert alone is not None and alone.num_tokens == 512
    scheduler.check()


def test_who_only_waits_for_its_last_token_paces_nobody() -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=4096)
    scheduler = Scheduler(config, num_blocks=200)
    scheduler.pace = _Room()
    scheduler.add(submit("answered by one token", 40, max_tokens=1))
    scheduler.schedule()
    scheduler.add(submit("long", 1000))
    beside = scheduler.schedule()
    assert beside is not None and beside.num_tokens == 512


def test_those_that_decode_are_spared_by_prompts_of_either_class() -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=4096)
    scheduler = Scheduler(config, num_blocks=200)
    scheduler.pace = _Room()
    scheduler.add(submit("online", 40))
    scheduler.schedule()
    scheduler.add(submit("offline", 1000, offline=True))
    beside = scheduler.schedule()
    assert beside is not None
    assert [row.num_tokens for row in beside.rows] == [1, 100]


def test_the_bound_is_that_of_the_strictest_and_of_the_fitted_costs() -> None:
    class Fitted(CostFitter):
        def model(self) -> CostModel:
            return CostModel(0.01, 1e-4, 1e-4, 0.0, 0.0, 0.0, 100)

    def decoding(*bounds: float | None) -> list[Sequence]:
        return [Sequence.of(submit(max_step_s=b), n, 4096, False) for n, b in enumerate(bounds)]

    pace = CostPace(Fitted())
    # 10 ms, three rows and two tokens; the rest of 20 ms at 0.1 ms a token.
    assert pace.room(decoding(0.02, 0.05)) in (94, 95)
    assert pace.room(decoding(0.001)) == 64, "prompts always move"
    assert pace.room(decoding(None)) > 1 << 20
    assert CostPace(CostFitter()).room(decoding(0.02)) > 1 << 20, "nothing is known yet"
