"""OpenTelemetry traces, made from what the service's records say: the engine needs none of it.

One `llm_request` span for each HTTP request, under whatever span the client's `traceparent` names,
with a child for each stretch of time on each instance: queue, transfer, prefill, decode. Names and
attributes are vLLM's where it has them. Spans are made when the request is over, so that a request
costs nothing more while it runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from penstock import PROJECT, __version__
from penstock.protocol.errors import ConfigError
from penstock.service.explain import Explanation, PlacementRecord, SequenceExplanation

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanProcessor
    from opentelemetry.trace import Tracer

#: As vLLM and the OpenTelemetry SDK have it; grpc or http/protobuf.
PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_PROPAGATED = ("traceparent", "tracestate")


class RequestTrace(Protocol):
    def accepted(self) -> None:
        """The service's core has it: times in explanations count from here."""

    def end(self, explanations: Sequence[Explanation], reason: str) -> None:
        """The request is over; `reason` as in RequestMetrics.close. Once."""


class Tracing(Protocol):
    def start(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace:
        """A request has come in."""

    def close(self) -> None:
        """Send what has not been sent."""


class NoTracing:
    """Both of them, when nobody traces."""

    def start(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace:
        return self

    def accepted(self) -> None:
        return None

    def end(self, explanations: Sequence[Explanation], reason: str) -> None:
        return None

    def close(self) -> None:
        return None


NO_TRACING = NoTracing()


def open_tracing(endpoint: str | None) -> Tracing:
    """Raises `ConfigError` where the extra is missing or the protocol is none."""
    return NO_TRACING if endpoint is None else OtelTracing(_exporter(endpoint))


def _exporter(endpoint: str) -> SpanProcessor:
    protocol = os.environ.get(PROTOCOL_VARIABLE, "grpc")
    if protocol not in ("grpc", "http/protobuf"):
        raise ConfigError(f"{PROTOCOL_VARIABLE}={protocol} is not known: grpc or http/protobuf")
    try:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc import trace_exporter

            insecure = not endpoint.startswith("https://")
            return BatchSpanProcessor(
                trace_exporter.OTLPSpanExporter(endpoint=endpoint, insecure=insecure)
            )
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

        return BatchSpanProcessor(over_http.OTLPSpanExporter(endpoint=endpoint))
    except ImportError as exc:
        raise ConfigError(
            f"--otlp-traces-endpoint needs OpenTelemetry: pip install '{PROJECT}[otel]' ({exc})"
        ) from exc


class OtelTracing:
    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", PROJECT)
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(PROJECT, __version__)
        self._propagator = TraceContextTextMapPropagator()

    def start(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace:
        found = {k.decode("latin-1"): v.decode("latin-1") for k, v in headers}
        carrier = {name: found[name] for name in _PROPAGATED if name in found}
        return _Trace(self._tracer, self._propagator.extract(carrier), path)

    def close(self) -> None:
        self._provider.shutdown()


class _Trace:
    def __init__(self, tracer: Tracer, parent: Context, path: str) -> None:
        self._tracer = tracer
        self._parent = parent
        self._path = path
        self._arrived_ns = self._accepted_ns = time.time_ns()

    def accepted(self) -> None:
        self._accepted_ns = time.time_ns()

    def end(self, explanations: Sequence[Explanation], reason: str) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        root = self._tracer.start_span(
            "llm_request",
            context=self._parent,
            kind=SpanKind.SERVER,
            start_time=self._arrived_ns,
            attributes=_request_attributes(
                self._path, explanations, time.time_ns() - self._arrived_ns
            ),
        )
        if reason == "error":
            root.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(root, self._parent)
        for explanation in explanations:
            for choice in explanation.choices:
                self._choice(inside, choice)
        root.end()

    def _choice(self, inside: Context, choice: SequenceExplanation) -> None:
        until_s = _last_token_s(choice)
        for i, placement in enumerate(choice.placements):
            following = choice.placements[i + 1 :]
            end_s = following[0].at_s if following else max(until_s, placement.at_s)
            for name, since_s, length_s, more in _stretches(placement, end_s):
                attributes = {
                    "penstock.instance": placement.instance,
                    "penstock.attempt": placement.attempt,
                    "penstock.choice": choice.choice,
                    **more,
                }
                self._span(inside, name, since_s, length_s, attributes)

    def _span(
        self, inside: Context, name: str, since_s: float, length_s: float, found: Mapping[str, Any]
    ) -> None:
        start_ns = self._accepted_ns + round(since_s * 1e9)
        span = self._tracer.start_span(
            name, context=inside, start_time=start_ns, attributes=dict(found)
        )
        span.end(start_ns + round(length_s * 1e9))


def _last_token_s(choice: SequenceExplanation) -> float:
    if choice.ttft_s is None:
        return choice.phases.total_s
    return choice.ttft_s + (choice.tpot_s or 0.0) * max(0, choice.output_tokens - 1)


def _stretches(p: PlacementRecord, end_s: float) -> list[tuple[str, float, float, dict[str, Any]]]:
    """(name, begin, length, attributes) of what one placement spent its time with."""
    because: dict[str, Any] = {"penstock.because": p.because}
    if p.actual_ttft_s is None:  # it never began
        return [("queue", p.at_s, max(0.0, end_s - p.at_s), because)]
    left_s = p.actual_ttft_s
    queue_s = min(left_s, p.queued_s or 0.0)
    left_s -= queue_s
    found = [("queue", p.at_s, queue_s, because)]
    begin_s = p.at_s + queue_s
    if p.fetched is not None and p.fetched.means:
        f = p.fetched
        transfer_s = min(left_s, f.seconds)
        more = {
            "penstock.means": f.means,
            "penstock.bytes": f.num_bytes,
            "penstock.blocks": f.num_blocks,
        }
        found.append(("transfer", begin_s, transfer_s, more))
        begin_s, left_s = begin_s + transfer_s, left_s - transfer_s
    cached = {"penstock.cached_tokens": p.cached_tokens or 0}
    found.append(("prefill", begin_s, left_s, cached))
    begin_s += left_s
    found.append(("decode", begin_s, max(0.0, end_s - begin_s), {}))
    return found


def _request_attributes(
    path: str, explanations: Sequence[Explanation], spent_ns: int
) -> dict[str, Any]:
    choices = [choice for found in explanations for choice in found.choices]
    firsts = [choice.ttft_s for choice in choices if choice.ttft_s is not None]
    found: dict[str, Any] = {
        "http.request.method": "POST",
        "url.path": path,
        "gen_ai.request.n": len(choices),
        "gen_ai.usage.prompt_tokens": sum(f.choices[0].prompt_tokens for f in explanations),
        "gen_ai.usage.completion_tokens": sum(c.output_tokens for c in choices),
        "gen_ai.latency.time_in_queue": sum(c.phases.queue_s for c in choices),
        "gen_ai.latency.e2e": spent_ns / 1e9,
    }
    if explanations:
        found["gen_ai.request.id"] = explanations[0].request_id
    if firsts:
        found["gen_ai.latency.time_to_first_token"] = min(firsts)
    return found
