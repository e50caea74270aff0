"""Traces of requests, collected by OpenTelemetry's own in-memory exporter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from tests.helpers.asgi_call import AsgiCall
from tests.helpers.fake_generator import FakeGenerator
from tests.helpers.live_fake import small_texts

from penstock.protocol.errors import ConfigError
from penstock.protocol.kv import Fetched
from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.explain import Explanation, PlacementRecord, Record
from penstock.service.operations import NoOperations
from penstock.service.tracing import NO_TRACING, OtelTracing, open_tracing

export = pytest.importorskip(
    "opentelemetry.sdk.trace.export", reason="needs the extra otel: pip install 'penstock[otel]'"
)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


def handed_over(request_id: str) -> Explanation:
    """Prefilled on p (20 ms queue, 50 ms prefill), decoded on d (30 ms transfer, then 100 ms)."""
    record = Record(request_id=request_id, choice=0, accepted_s=100.0, prompt_tokens=64)
    record.placed(placement(1, "p", "new", 64), 100.0)
    record.started(16, 0.02, 100.07)
    record.left("handover", 1, 100.07, 100.07)
    record.placed(placement(2, "d", "handover", 65), 100.07)
    record.fetched(Fetched("d", 1, f"{request_id}/0", 2, 4, 4, 4096, 0.03, "tcp"), 100.1)
    record.started(64, 0.0, 100.11)
    record.left("stop", 11, 100.2, 100.2)
    record.ended("stop", 11, 100.2)
    return Explanation(request_id, False, (record.explain(11, 100.2),))


def placement(attempt: int, instance: str, because: str, num_tokens: int) -> PlacementRecord:
    return PlacementRecord(
        attempt=attempt, instance=instance, at_s=0.0, because=because, decision=None,
        num_tokens=num_tokens, predicted_ttft_s=None, predicted_cached_tokens=None,
    )  # fmt: skip


class HandedOver(NoOperations):
    def explain(self, request_id: str) -> Explanation | None:
        return handed_over(request_id)


class Site:
    def __init__(self, texts: Any) -> None:
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self.exporter = InMemorySpanExporter()
        self.generator = FakeGenerator(texts.tokenizer)
        self.generator.operations = HandedOver()
        self.app = create_app(self.generator, texts, ApiConfig(("m",)))
        self.app.state.context.tracing = OtelTracing(export.SimpleSpanProcessor(self.exporter))

    async def complete(self, body: dict[str, Any], **headers: str) -> AsgiCall:
        call = AsgiCall(self.app, "POST", "/v1/completions", body, headers=headers)
        return await call.finished()

    def spans(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for span in self.exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found


@pytest.fixture
def site(tmp_path: Any) -> Site:
    return Site(small_texts(tmp_path / "m"))


def ms(span: Any) -> float:
    return round((span.end_time - span.start_time) / 1e6, 3)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_hops_of_a_request_are_spans_under_the_clients(site: Site, stream: bool) -> None:
    call = await site.complete({"prompt": "a", "stream": stream}, traceparent=TRACEPARENT)
    assert call.status == 200
    spans = site.spans()
    (root,) = spans["llm_request"]
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == PARENT
    assert root.attributes["gen_ai.usage.completion_tokens"] == 11
    assert root.attributes["gen_ai.latency.time_to_first_token"] == pytest.approx(0.07)
    assert root.attributes["gen_ai.request.id"] == site.generator.specs[0].request_id
    inner = [s for name in ("queue", "prefill", "transfer", "decode") for s in spans[name]]
    assert all(s.parent.span_id == root.context.span_id for s in inner)
    times = {(s.name, s.attributes["penstock.instance"]): ms(s) for s in inner}
    assert times == {
        ("queue", "p"): 20, ("prefill", "p"): 50, ("decode", "p"): 0,
        ("queue", "d"): 0, ("transfer", "d"): 30, ("prefill", "d"): 10, ("decode", "d"): 90,
    }  # fmt: skip
    (transfer,) = spans["transfer"]
    assert transfer.attributes["penstock.means"] == "tcp"
    # They follow each other without a gap, in one line of time.
    ordered = sorted(inner, key=lambda s: (s.start_time, s.end_time))
    for before, after in itertools.pairwise(ordered):
        assert abs(after.start_time - before.end_time) < 1000


async def test_without_a_parent_it_is_a_trace_of_its_own(site: Site) -> None:
    for headers in ({}, {"traceparent": "garbage"}, {"traceparent": "00-0-0-01"}):
        await site.complete({"prompt": "a"}, **headers)
    roots = site.spans()["llm_request"]
    assert len({root.context.trace_id for root in roots}) == 3
    assert all(root.parent is None for root in roots)


async def test_a_failed_request_is_marked(site: Site) -> None:
    site.generator.behaviour.fail_after = 2
    await site.complete({"prompt": "a", "stream": True})
    (root,) = site.spans()["llm_request"]
    assert root.status.status_code.name == "ERROR"


async def test_a_request_the_core_refuses_is_marked(site: Site) -> None:
    from penstock.protocol.errors import Overloaded

    site.generator.behaviour.refuse = Overloaded("full")
    assert (await site.complete({"prompt": "a"})).status == 429
    (root,) = site.spans()["llm_request"]
    assert root.status.status_code.name == "ERROR"


def test_off_is_nothing_and_mistakes_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracing(None) is NO_TRACING
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "pigeon")
    with pytest.raises(ConfigError, match="pigeon"):
        open_tracing("http://localhost:4317")


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_exporters_open_without_a_collector(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    open_tracing("http://127.0.0.1:1/v1/traces").close()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"penstock\[otel\]"):
        open_tracing("http://localhost:4317")
