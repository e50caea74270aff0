"""Experiments: what is asked of a cluster comes out of it, whatever the spec says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.simulator.build import Deployment
from penstock.simulator.experiment import run
from penstock.simulator.outcome import Outcome
from penstock.simulator.spec import ClusterSpec, FaultSpec, PoolSpec

GPU = PoolSpec(count=2, hardware="h100:llama3.1-8b:bf16:tp1", kv_tokens=60_000, max_num_seqs=64)
TWO = ClusterSpec(pools=(GPU,), pd="off")


def trace(count: int, rate: float, input_tokens: int = 400, output: int = 60) -> list[TraceRequest]:
    return [
        TraceRequest(i / rate, input_tokens + 13 * i % 200, 1 + (output * (1 + i % 3)) // 2)
        for i in range(count)
    ]


@pytest.mark.parametrize("mode", ["exact", "scale"])
@pytest.mark.parametrize("pd", ["off", "1:1"])
def test_everybody_gets_every_token_they_asked_for(mode: str, pd: str) -> None:
    requests = trace(60, 20.0)
    policy = "slo-aware" if pd == "off" else "split"
    outcome = run(replace(TWO, pd=pd, policy=policy), requests, mode=mode)
    assert outcome.finish == ["length"] * 60
    assert outcome.output_tokens.tolist() == [r.output_tokens for r in requests]
    assert outcome.input_tokens.tolist() == [r.input_tokens for r in requests]
    assert (outcome.ttft_s > 0).all() and (outcome.end_s >= outcome.first_s).all()
    assert outcome.handovers == (0 if pd == "off" else sum(r.output_tokens > 1 for r in requests))
    # Whole blocks are handed over: what is in the last one is computed again.
    assert outcome.recomputed_tokens <= 16 * outcome.handovers
    assert 0.0 < outcome.utilisation.max() <= 1.0
    assert outcome.events > 0 and len(outcome.digest) == 64


def test_scale_agrees_with_exact_where_nothing_is_close() -> None:
    requests = trace(80, 10.0)
    exact, scale = run(TWO, requests), run(TWO, requests, mode="scale")
    assert scale.events < exact.events / 3
    assert scale.first_s == pytest.approx(exact.first_s, abs=0.02)
    assert scale.end_s == pytest.approx(exact.end_s, rel=0.02)


def test_requests_are_made_when_their_time_comes() -> None:
    """A trace of any length is never in memory as a whole."""
    made: list[float] = []
    deployments: list[Deployment] = []

    def requests() -> Iterator[TraceRequest]:
        for request in trace(50, 5.0):
            made.append(deployments[0].world.now if deployments else 0.0)
            yield request

    seen: list[float] = []
    outcome = run(
        TWO, requests(), prepare=deployments.append, progress=lambda share: seen.append(share)
    )
    assert len(outcome.finish) == 50
    # Each is asked for when the one before it has come (3 s in, when all have attached).
    assert made[1:] == pytest.approx(3.0 + outcome.arrival_s[:-1])
    assert set(seen) == {0.0}, "how many there will be is not known"


def test_progress_goes_from_nothing_to_all() -> None:
    shares: list[float] = []
    run(TWO, trace(50, 10.0), progress=shares.append)
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0


def test_shared_prefixes_are_found_and_counted() -> None:
    requests = [TraceRequest(0.5 * i, 1024 + 100, 4, (1, 2)) for i in range(20)]
    one = replace(TWO, pools=(replace(GPU, count=1),))
    outcome = run(one, requests)
    assert outcome.cached_tokens.tolist() == [0] + [1024] * 19
    assert outcome.kv_hit_rate == pytest.approx(19 * 1024 / (20 * 1124))
    blind = replace(one, pools=(replace(GPU, count=1, enable_prefix_caching=False),))
    assert run(blind, requests).kv_hit_rate == 0.0


def test_slower_tiers_keep_what_the_device_has_no_room_for() -> None:
    """Twelve conversations in turn over room for six: without a tier, each finds nothing."""
    requests = [
        TraceRequest(0.4 * i, 1024 + 30, 4, (2 * (i % 12), 2 * (i % 12) + 1)) for i in range(48)
    ]

    def hit_rate(host_kv_tokens: int) -> float:
        pool = replace(GPU, count=1, kv_tokens=6_400, host_kv_tokens=host_kv_tokens)
        return run(replace(TWO, pools=(pool,)), requests).kv_hit_rate

    assert hit_rate(0) < 0.1
    assert hit_rate(30_000) > 0.6


def test_too_little_kv_preempts_and_says_what_was_computed_again() -> None:
    requests = trace(40, 200.0, input_tokens=600, output=400)
    pool = replace(GPU, count=1, kv_tokens=8_000)
    outcome = run(replace(TWO, pools=(pool,)), requests)
    assert outcome.finish == ["length"] * 40
    assert outcome.preemptions > 0 and outcome.recomputed_tokens > 0
    roomy = run(replace(TWO, pools=(replace(GPU, count=1),)), requests)
    assert (roomy.preemptions, roomy.recomputed_tokens) == (0, 0)


@pytest.mark.parametrize("mode", ["exact", "scale"])
def test_what_an_instance_did_before_it_crashed_counts(mode: str) -> None:
    """Also where it comes back as another process, whose own books begin at nothing."""
    requests = trace(60, 10.0, input_tokens=600, output=200)
    crash = FaultSpec(at_s=4.0, kind="crash", instance="gpu-0", for_s=2.0)
    outcome = run(replace(TWO, faults=(crash,)), requests, mode=mode)
    calm = run(TWO, requests, mode=mode)
    assert outcome.finish == calm.finish and outcome.resumed > 0
    busy = np.array([sample.busy for sample in outcome.samples])
    assert busy.min() >= 0.0 and busy.max() < 1.05  # a step counts where it ends
    assert calm.recomputed_tokens == 0
    assert outcome.computed_tokens > calm.computed_tokens and outcome.recomputed_tokens > 0
    by_samples = np.diff([0.0, *(s.at_s for s in outcome.samples)]) @ busy
    assert by_samples[0] == pytest.approx(outcome.busy_s[0], rel=0.3)


def test_changes_of_roles_are_noted_when_they_happen() -> None:
    spec = replace(TWO, pools=(replace(GPU, count=4),), pd="1:3")
    outcome = run(spec, trace(40, 10.0))
    assert sorted(outcome.samples[-1].roles) == ["decode"] * 3 + ["prefill"]
    last: dict[str, str] = {}
    for change in outcome.role_changes:
        last[change.instance] = change.role
    assert sorted(last.values()) == ["decode"] * 3 + ["prefill"]
    assert any(change.at_s % 1.0 for change in outcome.role_changes)


def test_samples_add_up() -> None:
    outcome = run(TWO, trace(60, 20.0))
    computed_s = np.sum([sample.busy for sample in outcome.samples], axis=0)
    assert computed_s == pytest.approx(outcome.busy_s, rel=1e-3)
    assert all(len(s.roles) == len(s.running) == len(s.kv_used) == 2 for s in outcome.samples)
    assert outcome.samples[-1].running.tolist() == [0, 0]


# --- what cannot be ------------------------------------------------------------------------------


def failure(spec: ClusterSpec, requests: list[TraceRequest], mode: str = "exact") -> str:
    built: list[Deployment] = []
    with pytest.raises(ConfigError) as found:
        run(spec, requests, mode=mode, prepare=built.append)
    assert not built, "said before anything is run"
    return str(found.value)


def test_a_request_that_no_instance_can_hold_is_named_with_what_would() -> None:
    long = [TraceRequest(0.0, 100, 10), TraceRequest(1.0, 50_000, 20_000)]
    said = failure(TWO, long)
    assert "request 1 " in said and "60000 tokens of KV" in said and "raise kv-tokens" in said
    short = replace(TWO, pools=(replace(GPU, max_model_len=8192),))
    said = failure(short, [TraceRequest(0.0, 8000, 200)])
    assert "max-model-len 8192" in said and "8200 or more" in said


def test_a_request_out_of_an_iterator_is_checked_when_it_comes() -> None:
    with pytest.raises(ConfigError, match="request 1 "):
        run(TWO, iter([TraceRequest(0.0, 100, 10), TraceRequest(1.0, 90_000, 1)]))


def test_hardware_without_room_for_kv() -> None:
    said = failure(replace(TWO, pools=(replace(GPU, kv_tokens=0),)), trace(1, 1.0))
    assert "room for 0 tokens" in said and "larger hardware" in said


@pytest.mark.parametrize(
    ("times", "word"), [((1.0, 0.5), "sort the trace"), ((-1.0, 2.0), "sort the trace")]
)
def test_times_that_go_back(times: tuple[float, ...], word: str) -> None:
    assert word in failure(TWO, [TraceRequest(at_s, 10, 2) for at_s in times])


def test_an_empty_trace_and_an_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="no requests"):
        run(TWO, [])
    assert "exact, scale" in failure(TWO, trace(1, 1.0), mode="fast")


def test_who_is_refused_is_answered_all_the_same() -> None:
    spec = replace(TWO, max_queue=3)
    outcome: Outcome = run(spec, [TraceRequest(0.0, 500, 5) for _ in range(20)])
    assert set(outcome.finish) == {"length", "refused"}
    assert np.isnan(outcome.first_s[[f == "refused" for f in outcome.finish]]).all()
