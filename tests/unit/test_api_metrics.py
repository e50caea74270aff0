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

from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
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
