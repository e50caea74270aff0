"""/metrics, read by prometheus-client's parser: what is counted, and that it is taken back."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.parser import text_string_to_metric_families
from tests.helpers.asgi_call import AsgiCall
from tests.helpers.fake_generator import FakeGenerator
from tests.helpers.live_fake import small_texts

from penstock.protocol.instance import CostModel, Load, MoveCounts, TierLoad
from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.cluster.outcomes import Outcomes
from penstock.service.explain import PlacementRecord
from penstock.service.generation import ServiceStatus
from penstock.service.metrics import CONTENT_TYPE, Histogram, Metrics


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> FakeGenerator:
    texts = small_texts(tmp_path_factory.mktemp("model") / "m")
    found = FakeGenerator(texts.tokenizer)
    found.texts = texts  # type: ignore[attr-defined]
    return found


@pytest.fixture
def app(generator: FakeGenerator) -> FastAPI:
    return create_app(generator, generator.texts, ApiConfig(("m",)))  # type: ignore[attr-defined]


def samples(metrics: Metrics) -> dict[str, float]:
    """Name and labels (but the model's) to value."""
    out = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            inner = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            out[f"{sample.name}{{{inner}}}"] = sample.value
    return out


async def test_names_and_values(app: FastAPI, generator: FakeGenerator) -> None:
    for body in ({"prompt": "a", "n": 2}, {"prompt": ["a", "bb"], "max_tokens": 2}):
        await AsgiCall(app, "POST", "/v1/completions", body).finished()
    call = await AsgiCall(app, "GET", "/metrics").finished()
    assert call.headers["content-type"] == CONTENT_TYPE
    found = samples(app.state.context.metrics)
    answer = len(generator.tokenizer.encode("Hello, world.", False)) + 1  # and its EOS
    tokens = 2 * answer + 2 * 2
    expected = {
        "penstock:num_requests_running{}": 0,
        "penstock:num_requests_waiting{}": 0,
        "penstock:generation_tokens_total{}": tokens,
        "penstock:prompt_tokens_total{}": 1 + 1 + 2,
        "penstock:request_success_total{finished_reason=stop}": 2,
        "penstock:request_success_total{finished_reason=length}": 2,
        "penstock:request_success_total{finished_reason=abort}": 0,
        "penstock:time_to_first_token_seconds_count{}": 4,
        "penstock:inter_token_latency_seconds_count{}": tokens - 4,
        "penstock:request_time_per_output_token_seconds_count{}": 4,
        "penstock:e2e_request_latency_seconds_count{}": 4,
        "penstock:request_generation_tokens_sum{}": tokens,
        "penstock:request_params_n_sum{}": 3,
        "penstock:kv_cache_usage_perc{engine=fake-0}": 0.25,
        "penstock:prefix_cache_queries_total{engine=fake-0}": 320,
        "penstock:prefix_cache_hits_total{engine=fake-0}": 160,
        "penstock:num_preemptions_total{engine=fake-0}": 6,
        "penstock:instance_requests_running{engine=fake-0}": 2,
        "penstock:kernel_info{engine=fake-0,kernel=fake,operation=attention}": 1,
    }
    assert {name: found.get(name) for name in expected} == expected


async def test_queue_time_where_the_engine_says(app: FastAPI, generator: FakeGenerator) -> None:
    metrics = app.state.context.metrics
    name = "penstock:request_queue_time_seconds"
    await AsgiCall(app, "POST", "/v1/completions", {"prompt": "a"}).finished()
    assert f"{name}_count{{}}" not in samples(metrics)
    generator.behaviour.queued_s = 0.5
    body = {"prompt": ["a", "b"], "stream": True}
    await AsgiCall(app, "POST", "/v1/completions", body).finished()
    generator.behaviour.queued_s = None
    found = samples(metrics)
    assert (found[f"{name}_count{{}}"], found[f"{name}_sum{{}}"]) == (2, 1.0)


async def test_refusals_are_counted_by_code(app: FastAPI) -> None:
    for body in ({"prompt": ""}, {"prompt": "a", "foo": 1}, {"prompt": "a", "foo": 1}):
        await AsgiCall(app, "POST", "/v1/completions", body).finished()
    found = samples(app.state.context.metrics)
    assert found["penstock:requests_refused_total{code=unsupported_feature}"] == 2
    assert found["penstock:requests_refused_total{code=invalid_request}"] == 1


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 3)), max_size=30))
def test_histograms_count_as_prometheus_does(values: list[tuple[float, int]]) -> None:
    bounds = (0.1, 1.0, 10.0)
    ours = Histogram(bounds)
    registry = CollectorRegistry()
    theirs = PrometheusHistogram("h", "", buckets=bounds, registry=registry)
    for value, count in values:
        ours.observe(value, count)
        for _ in range(count):
            theirs.observe(value)
    for bound, count in ours.cumulative():
        assert registry.get_sample_value("h_bucket", {"le": bound}) == count
    assert registry.get_sample_value("h_sum") == pytest.approx(ours.total)


@given(
    n=st.integers(1, 3),
    prompts=st.integers(1, 3),
    moves=st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["token", "stop", "length"]))),
    end=st.sampled_from(["abort", "error"]),
)
def test_gauges_are_exact_whatever_happens(
    n: int, prompts: int, moves: list[tuple[int, str]], end: str
) -> None:
    """Against a plain model of which choices wait, run, or have ended."""
    metrics = Metrics("m")
    request = metrics.start_request([5] * prompts, n, 10)
    state = dict.fromkeys(range(n * prompts), "waiting")
    for choice, move in moves:
        choice %= len(state)
        if state[choice] == "ended":
            continue
        if move == "token":
            request.on_tokens(choice, 2)
            state[choice] = "running"
        else:
            request.on_finish(choice, move)
            state[choice] = "ended"
        assert metrics.waiting == list(state.values()).count("waiting")
        assert metrics.running == list(state.values()).count("running")
    request.close(end)
    request.close("stop")  # a second time changes nothing
    assert (metrics.waiting, metrics.running) == (0, 0)
    assert sum(metrics.finished.values()) == n * prompts
    assert metrics.finished[end] == sum(s != "ended" for s in state.values())


def cluster_samples(*instances: dict[str, object], **facts: object) -> dict[str, float]:
    status = ServiceStatus(True, True, "", 0, list(instances), 1, dict(facts))
    return samples(Metrics("m", lambda: status))


def test_what_is_said_of_an_instance_in_a_cluster() -> None:
    outcomes = Outcomes()
    placement = PlacementRecord(
        attempt=1, instance="a", at_s=0.0, because="new", decision=None, num_tokens=64,
        predicted_ttft_s=0.5, predicted_cached_tokens=48, actual_ttft_s=0.75, cached_tokens=16,
    )  # fmt: skip
    outcomes.started(placement, 1.0)
    load = load_of(
        "a", tiers=[TierLoad("host", 30, 60)], moves=[MoveCounts("tcp", 8, 2, 4096, 0.5)]
    )
    found = cluster_samples(
        {
            "name": "a", "state": "active", "role": "prefill", "epoch": 3, "load": load,
            "outcomes": outcomes, "role_changes": 2, "silent_s": 0.25, "draining": False,
        },
        {"name": "b", "state": "lost"},
        handovers=4,
        migrated=5,
    )  # fmt: skip
    expected = {
        "penstock:instance_state{engine=a,state=active}": 1,
        "penstock:instance_state{engine=b,state=lost}": 1,
        "penstock:instance_role{engine=a,role=prefill}": 1,
        "penstock:instance_epoch{engine=a}": 3,
        "penstock:instance_silent_seconds{engine=a}": 0.25,
        "penstock:role_changes_total{engine=a}": 2,
        "penstock:kv_tier_blocks_used{engine=a,tier=host}": 30,
        "penstock:kv_tier_usage_perc{engine=a,tier=host}": 0.5,
        "penstock:kv_tier_blocks_used{engine=a,tier=device}": 30,
        "penstock:kv_transfer_bytes_total{engine=a,means=tcp}": 4096,
        "penstock:kv_transfer_failed_blocks_total{engine=a,means=tcp}": 2,
        "penstock:kv_transfer_seconds_total{engine=a,means=tcp}": 0.5,
        "penstock:ttft_predictions_total{engine=a}": 1,
        "penstock:ttft_prediction_error_seconds_total{engine=a}": 0.25,
        "penstock:kv_hit_error_tokens_total{engine=a}": 32,
        "penstock:sequences_handed_over_total{}": 4,
        "penstock:sequences_migrated_total{}": 5,
        "penstock:sequences_resumed_total{}": 1,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_series_grow_with_instances_and_with_nothing_else() -> None:
    one = len(cluster_samples({"name": "a", "state": "active", "load": load_of("a")}))
    two = len(
        cluster_samples(
            {"name": "a", "state": "active", "load": load_of("a")},
            {"name": "b", "state": "active", "load": load_of("b")},
        )
    )
    none = len(cluster_samples())
    assert two - one == one - none


def load_of(name: str, **more: object) -> Load:
    return Load(
        instance=name, incarnation=1, number=1, step=7, step_end_in_s=0.0, waiting={}, running={},
        waiting_tokens=3, running_tokens=4, kv_blocks_used=25, kv_blocks_cached=5,
        kv_blocks_total=100, preemptions=6, prefix_hit_tokens=160, prefix_query_tokens=320,
        steps=7, cost=CostModel(), **more,
    )  # type: ignore[arg-type]  # fmt: skip
