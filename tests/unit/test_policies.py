"""Policies: where a request goes in clear cases, what holds in all cases, and what they say."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tests.helpers.views import hits, make_view

from penstock.protocol.errors import ConfigError
from penstock.service.policies import predict
from penstock.service.policies.routing import (
    POLICIES,
    ROLES,
    RouteRequest,
    TransferCosts,
    kv_aware,
    least_load,
    policy_named,
    round_robin,
    slo_aware,
)


def request(num_tokens: int = 1000, output: int = 100, **more) -> RouteRequest:
    return RouteRequest(num_tokens=num_tokens, expected_output_tokens=output, **more)


def test_policies_have_names_and_other_names_are_refused() -> None:
    assert list(POLICIES) == ["round-robin", "least-load", "kv-aware", "slo-aware", "split"]
    assert policy_named("kv-aware") is kv_aware
    with pytest.raises(ConfigError, match=r"fastest.* least-load"):
        policy_named("fastest")


def test_round_robin_goes_by_the_number_of_the_request() -> None:
    view = make_view(3)
    turns = [round_robin(view, request(number=n)).instance for n in range(7)]
    assert turns == ["i0", "i1", "i2", "i0", "i1", "i2", "i0"]


# --- least load -----------------------------------------------------------------------------------


def test_least_load_counts_what_waits_at_each_ones_own_speed() -> None:
    view = make_view(2, queued_tokens=[4000, 2000], queued=1, per_token_s=[1e-5, 1e-4])
    assert least_load(view, request()).instance == "i0"


def test_before_anything_is_measured_tokens_decide() -> None:
    nothing = dict(num_steps=0, base_s=0, per_token_s=0, per_row_s=0, per_context_token_s=0)
    view = make_view(3, per_attention_s=0, queued_tokens=[30, 10, 20], queued=1, **nothing)
    decision = least_load(view, request())
    assert decision.instance == "i1"
    assert [c.instance for c in decision.candidates] == ["i1", "i2", "i0"]
    assert "0 steps only" in decision.reason


def test_equals_are_told_apart_by_place() -> None:
    assert least_load(make_view(50), request()).instance == "i0"
    assert kv_aware(make_view(50), request()).instance == "i0"


def test_prompts_that_nobody_holds_go_in_turn_to_who_is_as_good() -> None:
    """Idle instances whose models say a little more or less; one is busy, one is slow."""
    view = make_view(5, queued_tokens=[0, 0, 0, 9000, 0], queued=[0, 0, 0, 2, 0])
    view = replace(view, per_token_s=view.per_token_s * [1.0, 0.99, 1.02, 1.0, 1.5])

    def chosen(number: int, **held: np.ndarray) -> str:
        return kv_aware(view, replace(request(2000, **held), number=number)).instance

    assert {chosen(n) for n in range(10)} == {"i0", "i1", "i2"}
    assert [chosen(n) for n in (5, 6, 7)] == ["i0", "i1", "i2"]
    # Who holds some of it has no equals, however quick they are.
    assert {chosen(n, device_hits=hits(0, 0, 480, 0, 0)) for n in range(10)} == {"i2"}
    assert "its turn" in kv_aware(view, replace(request(2000), number=5)).reason


# --- caches ---------------------------------------------------------------------------------------


def test_a_cached_prefix_draws_a_request_until_the_queue_outweighs_it() -> None:
    def chosen(queued: int) -> str:
        view = make_view(2, queued_tokens=[queued, 0], queued=[queued // 1000, 0], hosts=[0, 1])
        slow = TransferCosts(copy_s=10.0)
        found = request(2000, device_hits=hits(1920, 0))
        return kv_aware(replace(view, transfer=slow), found).instance

    assert chosen(0) == chosen(1000) == "i0"
    assert chosen(20_000) == "i1"


def test_what_a_peer_holds_is_fetched_where_that_is_faster_than_computing() -> None:
    view = make_view(2, queued_tokens=[20_000, 0], queued=[5, 0], hosts=[0, 0])
    found = request(2000, device_hits=hits(1920, 0))
    decision = kv_aware(view, found)
    assert (decision.instance, decision.source, decision.source_tokens) == ("i1", "i0", 1920)
    assert "fetches 1920 of 2000 tokens from i0" in decision.reason
    far = replace(view, hosts=np.array([0, 1]), transfer=TransferCosts(copy_token_s=1e-3))
    decision = kv_aware(far, found)
    assert (decision.instance, decision.source) == ("i1", None)
    assert "holds 0 of 2000" in decision.reason


def test_a_slower_tier_is_worth_what_loading_from_it_saves() -> None:
    quick = TransferCosts(tier_token_s=1e-6)
    view = replace(make_view(2, hosts=[0, 1]), transfer=quick)
    found = request(2000, device_hits=hits(0, 0), tier_hits=hits(0, 1920))
    decision = kv_aware(view, found)
    assert decision.instance == "i1"
    assert decision.candidates[0].hit_tokens == 1920
    assert "loads 1920 of 2000 tokens from its slower tiers" in decision.reason
    slow = replace(view, transfer=TransferCosts(tier_token_s=1e-3, copy_token_s=1e-3))
    assert kv_aware(slow, found).candidates[0].fetch_s == 0.0


def test_fetching_goes_on_while_the_request_queues() -> None:
    view = make_view(2, queued_tokens=[10_000, 10_000], queued=5, hosts=[0, 0])
    found = request(2000, device_hits=hits(1920, 0))
    first, second = kv_aware(view, found).candidates
    assert second.fetch_s > 0
    assert first.predicted_ttft_s == pytest.approx(second.predicted_ttft_s)


def test_a_hot_prefix_makes_no_hot_spot() -> None:
    """200 requests with one prefix, placed one after the other: nobody has twice the mean."""
    queued, holders = np.zeros(8), np.zeros(8)
    holders[0] = 1920
    for _ in range(200):
        view = make_view(8, queued_tokens=queued, queued=np.ceil(queued / 500), hosts=range(8))
        found = request(2000, device_hits=holders.copy())
        i = view.names.index(kv_aware(view, found).instance)
        queued[i] += 2000 - holders[i]
        holders[i] = 1920
    assert queued.max() < 2 * queued.mean()


# --- service levels -------------------------------------------------------------------------------

PD = ["prefill", "prefill", "decode", "decode"]


def test_a_long_prompt_is_computed_apart_from_those_that_decode() -> None:
    busy = dict(running=[0, 0, 8, 6], running_tokens=[0, 0, 8000, 6000])
    view = make_view(4, roles=PD, prefill_share=[0.5, 0.5, 0, 0], **busy)
    decision = slo_aware(view, request(6000, 20, tpot_slo_s=0.008, ttft_slo_s=1.0))
    assert (decision.instance, decision.decode) == ("i0", "i3")
    assert "apart (" in decision.reason and "each stage in its pool" in decision.reason


def test_a_short_prompt_stays_together() -> None:
    view = make_view(4, roles=PD, running=[0, 0, 2, 2], running_tokens=[0, 0, 500, 500])
    decision = slo_aware(view, request(20, 50))
    assert decision.decode is None
    assert "together (" in decision.reason


def test_under_light_load_nothing_is_moved() -> None:
    view = make_view(4, roles=PD, hosts=range(4))
    assert slo_aware(view, request(3000, 50)).decode is None


def test_a_dear_transfer_keeps_a_prompt_in_one_place() -> None:
    busy = dict(running=[0, 0, 4, 4], running_tokens=[0, 0, 2000, 2000])
    view = make_view(4, roles=PD, prefill_share=[0.5, 0.5, 0, 0], **busy)
    far = replace(view, hosts=np.arange(4))
    long = request(6000, 20)
    assert slo_aware(view, long).decode is not None
    slow = replace(far, transfer=TransferCosts(copy_s=0.5, copy_token_s=5e-3))
    assert slo_aware(slow, long).decode is None


@pytest.mark.parametrize(
    ("roles", "more", "why"),
    [
        (["any", "any"], {}, "no instance has a role"),
        (["decode"], {}, "there is one instance only"),
        (PD, {"aggregated_because": "its prompt's logprobs are wanted"}, "logprobs"),
    ],
)
def test_what_is_not_to_be_split_stays_together(roles, more, why) -> None:
    view = make_view(len(roles), roles=roles, running=5, running_tokens=5000)
    decision = slo_aware(view, request(6000, 10, **more))
    assert decision.decode is None
    assert why in decision.reason


def test_first_level_takes_the_pool_that_holds_the_slo() -> None:
    """P is late, D→P is not."""
    roles = ["prefill", "decode_to_prefill", "decode", "decode"]
    queued = [50_000, 0, 0, 0]
    busy = dict(running=[0, 0, 10, 9], running_tokens=[0, 0, 9000, 9000])
    view = make_view(
        4,
        roles=roles,
        queued_tokens=queued,
        queued=[20, 0, 0, 0],
        prefill_share=[0.5, 0.5, 0, 0],
        **busy,
    )
    decision = slo_aware(view, request(6000, 20, ttft_slo_s=0.8, tpot_slo_s=0.008))
    assert (decision.instance, decision.decode) == ("i1", "i2")


def test_when_nobody_holds_the_ttft_one_that_decodes_should_turn() -> None:
    view = make_view(
        4, roles=PD, queued_tokens=60_000, queued=20, running=[0, 0, 9, 3],
        running_tokens=[0, 0, 9000, 3000],
    )  # fmt: skip
    decision = slo_aware(view, request(6000, 20, ttft_slo_s=0.5))
    assert decision.wants_switch == "i3"
    last = replace(view, roles=np.array([ROLES.index(r) for r in ("prefill",) * 3 + ("decode",)]))
    assert slo_aware(last, request(6000, 20, ttft_slo_s=0.5)).wants_switch is None


def test_when_nobody_holds_the_tpot_one_that_prefills_should_turn() -> None:
    busy = dict(running=14, running_tokens=14_000, queued_tokens=[900, 100, 0, 0])
    view = make_view(4, roles=PD, queued=[1, 1, 0, 0], prefill_share=[0.9, 0.9, 0, 0], **busy)
    decision = slo_aware(view, request(100, 20, prefilled_on="i0", tpot_slo_s=0.001))
    assert decision.wants_switch == "i1"
    assert "nobody holds 1 ms a token" in decision.reason


def test_second_level_stays_where_the_prefill_was_if_that_serves() -> None:
    busy = dict(running=[0, 0, 8, 6], running_tokens=[0, 0, 8000, 6000])
    view = make_view(4, roles=PD, **busy)
    decision = slo_aware(view, request(3000, 50, prefilled_on="i0"))
    assert decision.instance == "i0" and decision.source is None


def test_second_level_goes_where_fewest_tokens_run_if_prompts_keep_the_first_busy() -> None:
    busy = dict(running=[0, 0, 8, 6], running_tokens=[0, 0, 8000, 6000])
    view = make_view(4, roles=PD, prefill_share=[0.9, 0.9, 0, 0], **busy)
    decision = slo_aware(view, request(3000, 50, prefilled_on="i0", tpot_slo_s=0.01))
    assert (decision.instance, decision.source, decision.source_tokens) == ("i3", "i0", 3000)


def test_second_level_without_the_first_instance_goes_on_elsewhere() -> None:
    view = make_view(4, roles=PD, running=[0, 0, 8, 6], running_tokens=[0, 0, 8000, 6000])
    decision = slo_aware(view, request(3000, 50, prefilled_on="gone"))
    assert (decision.instance, decision.decode, decision.source) == ("i3", None, "gone")


def test_roles_are_soft() -> None:
    everywhere = make_view(2, roles=["decode", "decode"], running=3, running_tokens=3000)
    assert slo_aware(everywhere, request(6000, 20, ttft_slo_s=1.0)).instance in ("i0", "i1")
    everywhere = make_view(2, roles=["prefill", "prefill"], running=3, running_tokens=3000)
    assert slo_aware(everywhere, request(20, 20, prefilled_on="i1")).instance in ("i0", "i1")
    last = make_view(2, roles=["encode", "any"], queued_tokens=[0, 90_000], queued=[0, 9])
    assert slo_aware(last, request()).instance == "i1"
    assert slo_aware(make_view(1, roles=["encode"]), request()).instance == "i0"


# --- simple policies over pools -------------------------------------------------------------------


def test_least_load_pairs_the_least_queue_of_p_with_the_fewest_tokens_of_d() -> None:
    view = make_view(
        5, roles=[*PD, "encode"], queued_tokens=[900, 100, 0, 0, 0], queued=[1, 1, 0, 0, 0],
        running=[0, 0, 2, 4, 0], running_tokens=[0, 0, 3000, 2000, 0],
    )  # fmt: skip
    decision = least_load(view, request())
    assert (decision.instance, decision.decode) == ("i1", "i3")
    assert [c.instance for c in decision.candidates] == ["i1", "i0"]
    goes_on = least_load(view, request(prefilled_on="i1"))
    assert (goes_on.instance, goes_on.decode) == ("i3", None)
    whole = least_load(view, request(aggregated_because="one token is wanted"))
    assert whole.decode is None


def test_round_robin_takes_turns_in_each_pool() -> None:
    view = make_view(5, roles=["prefill", "decode", "decode", "prefill", "decode"])
    turns = [round_robin(view, request(number=n)) for n in range(6)]
    assert [d.instance for d in turns] == ["i0", "i3", "i0", "i3", "i0", "i3"]
    assert [d.decode for d in turns] == ["i1", "i2", "i4", "i1", "i2", "i4"]
    on = [round_robin(view, request(number=n, prefilled_on="i0")).instance for n in range(3)]
    assert on == ["i1", "i2", "i4"]


def test_simple_policies_take_whom_they_find_where_a_pool_is_empty() -> None:
    for policy in (least_load, round_robin):
        decision = policy(make_view(3, roles=["prefill"] * 3), request())
        assert decision.decode not in (None, decision.instance)
        assert policy(make_view(1, roles=["decode"]), request()).decode is None


# --- in all cases ---------------------------------------------------------------------------------


@st.composite
def situations(draw):
    count = draw(st.integers(1, 9))

    def some(low: float, high: float):
        return draw(st.lists(st.floats(low, high), min_size=count, max_size=count))

    roles = draw(st.lists(st.sampled_from(ROLES), min_size=count, max_size=count))
    view = make_view(
        count, roles=roles, hosts=draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)),
        queued_tokens=np.floor(some(0, 1e5)), queued=np.floor(some(0, 50)),
        running=np.floor(some(0, 30)), running_tokens=np.floor(some(0, 5e4)),
        step_left_s=some(0, 1), base_s=some(-1e-4, 0.05), per_token_s=some(-1e-6, 1e-3),
        residual_s=some(0, 0.1), num_steps=np.floor(some(0, 30)),
        free_blocks=np.floor(some(0, 999)),
        ttft_ratio=some(0.2, 5), ttft_error=some(0, 3), prefill_share=some(0, 1),
    )  # fmt: skip
    tokens = draw(st.integers(1, 20_000))
    device = np.minimum(np.floor(np.array(some(0, 2e4))), tokens)
    tiers = np.minimum(device + np.floor(np.array(some(0, 2e3))), tokens)
    known = draw(st.booleans())
    wanted = RouteRequest(
        num_tokens=tokens,
        expected_output_tokens=draw(st.integers(0, 2000)),
        ttft_slo_s=draw(st.none() | st.floats(-1, 5)),
        tpot_slo_s=draw(st.none() | st.floats(1e-4, 0.5)),
        max_step_s=draw(st.none() | st.floats(1e-4, 0.5)),
        device_hits=device if known else None,
        tier_hits=tiers if known else None,
        prefilled_on=draw(st.none() | st.sampled_from([*view.names, "gone"])),
        number=draw(st.integers(0, 1000)),
    )
    return view, wanted


@settings(max_examples=300, deadline=None)
@given(situations(), st.sampled_from(list(POLICIES)))
def test_every_decision_is_a_sound_one(situation, name) -> None:
    view, wanted = situation
    decision = POLICIES[name](view, wanted)
    assert decision.policy == name
    assert decision.instance in view.names
    assert decision.decode is None or decision.decode in view.names
    assert decision.decode != decision.instance
    assert decision.source != decision.instance
    assert decision.source is None or 0 < decision.source_tokens <= wanted.num_tokens
    assert 1 <= len(decision.candidates) <= 4
    assert len({c.instance for c in decision.candidates}) == len(decision.candidates)
    assert decision.instance in {c.instance for c in decision.candidates}
    assert all(np.isfinite(c.predicted_ttft_s) for c in decision.candidates)
    assert all(0 <= c.hit_tokens <= wanted.num_tokens for c in decision.candidates)
    assert decision.reason and "nan" not in decision.reason
    # Pure: the same again, with speeds worked out before or not.
    assert POLICIES[name](view, wanted) == decision
    assert POLICIES[name](replace(view, speeds=predict.speeds(view)), wanted) == decision


@settings(max_examples=200, deadline=None)
@given(situations())
def test_kv_aware_is_never_later_than_any_other_choice(situation) -> None:
    """Against each way of each instance, one by one; those within 5% of its own time are alike."""
    view, wanted = situation
    decision = kv_aware(view, wanted)
    s = predict.speeds(view)
    q = predict.queues(view, s, wanted.num_tokens, wanted.expected_output_tokens, wanted.max_step_s)
    best, own_s = np.inf, 0.0
    t = view.transfer
    device = np.zeros(len(view.names)) if wanted.device_hits is None else wanted.device_hits
    for i in range(len(view.names)):
        ways = [(device[i], 0.0)]
        if wanted.tier_hits is not None:
            missing = wanted.tier_hits[i] - device[i]
            ways.append((wanted.tier_hits[i], t.tier_s + missing * t.tier_token_s))
            top = int(device.argmax())
            missing = device[top] - device[i]
            near = view.hosts[i] == view.hosts[top]
            near_s, far_s = t.map_s + missing * t.map_token_s, t.copy_s + missing * t.copy_token_s
            ways.append((device[top], near_s if near else far_s))
        for found, fetch_s in ways:
            prefill = predict.prefill_s(s, q, wanted.num_tokens, float(found))[i]
            found_s = s.ratio[i] * (max(q.queue_s[i], fetch_s) + prefill)
            if found_s < best:
                best, own_s = found_s, s.ratio[i] * prefill
    # Those within a twentieth of the prompt's own time take turns.
    assert decision.predicted_ttft_s <= best + 0.05 * own_s + 1e-6


def test_the_best_few_of_many_are_the_least() -> None:
    rng = np.random.default_rng(3)
    view = make_view(1000, queued_tokens=rng.permutation(1000) * 10.0, queued=1)
    kept = least_load(view, request()).candidates
    expected = np.argsort(view.queued_tokens)[:4]
    assert [c.instance for c in kept] == [f"i{n}" for n in expected]
