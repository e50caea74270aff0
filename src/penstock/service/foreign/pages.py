"""What the router answers itself: health, metrics, models, and /admin. The rest is the engines'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock import __version__
from penstock.protocol.errors import ModelNotFound
from penstock.service.api.admin import ExplainedPrompt, ExplainResponse, LiveResponse
from penstock.service.api.auth import is_admin
from penstock.service.api.context import bare_id
from penstock.service.api.errors import MethodNotAllowed
from penstock.service.api.responses import HealthResponse, InstanceHealth, VersionResponse
from penstock.service.explain import Explanation, Record, SequenceExplanation
from penstock.service.explain_text import in_words
from penstock.service.foreign.client import Client, Request
from penstock.service.foreign.engine import Engine
from penstock.service.foreign.exchange import Exchange, respond
from penstock.service.foreign.target import for_engines
from penstock.service.metrics import CONTENT_TYPE, PREFIX
from penstock.service.operations import Conflict, LiveSequence, NotHere
from penstock.service.report import cluster_report
from penstock.service.siblings import merge

if TYPE_CHECKING:
    from penstock.service.foreign.router import Router

Page = Callable[[Client, Request], None]
_MAX_LIVE = 1000


class Pages:
    def __init__(self, router: Router) -> None:
        self._router = router
        self._registry = CollectorRegistry()
        self._registry.register(router.metrics)
        self._registry.register(router.models)
        self._registry.register(_EngineMetrics(router))
        self._pages: dict[str, Page] = {
            "/health": self._health,
            "/health/live": self._live,
            "/metrics": self._metrics,
            "/version": self._version,
            "/v1/models": self._models,
            "/admin/cluster": self._cluster,
            "/admin/requests": self._requests,
        }

    def find(self, request: Request) -> Page | None:
        """None: it is for an engine. Raises `NotHere` for what is neither theirs nor ours."""
        path = request.path
        page = self._pages.get(path)
        if page is None and path.startswith("/v1/models/"):
            page = self._model
        if page is None and is_admin(path):
            return self._under_admin(path)
        if page is None and not for_engines(path):
            raise NotHere(f"no such route: {path[:200]} (engines get what is under /v1)")
        if page is not None and request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"{request.method} is not allowed at {path}")
        return page

    def _under_admin(self, path: str) -> Page:
        match path.split("/")[2:]:
            case ["requests", _, "explain"]:
                return self._explain
            case ["instances", _, "drain" | "start"]:
                return self._drain_or_start
        raise NotHere(f"no such route: {path[:200]}")

    # --- pages ---------------------------------------------------------------------------------

    def _health(self, client: Client, request: Request) -> None:
        status = self._router.status()
        found = HealthResponse(
            "ok" if status.ready else "unavailable",
            status.reason,
            status.queue_depth,
            [InstanceHealth(str(i["name"]), str(i["state"])) for i in status.instances],
        )
        _json(client, request, found, 200 if status.ready else 503)

    def _live(self, client: Client, request: Request) -> None:
        _json(client, request, HealthResponse("ok", "", self._router.metrics.waiting, []))

    def _metrics(self, client: Client, request: Request) -> None:
        found, worker = generate_latest(self._registry), self._router.config.worker
        if worker is not None:  # a scraper reaches one by chance: each has series of its own
            found = merge({worker: found.decode()}).encode()
        respond(client, 200, found, CONTENT_TYPE.encode(), request.id)

    def _version(self, client: Client, request: Request) -> None:
        _json(client, request, VersionResponse(__version__))

    def _models(self, client: Client, request: Request) -> None:
        _json(client, request, {"object": "list", "data": self._router.fleet.models()})

    def _model(self, client: Client, request: Request) -> None:
        wanted = request.path.removeprefix("/v1/models/")
        for card in self._router.fleet.models():
            if card.get("id") == wanted:
                return _json(client, request, card)
        raise ModelNotFound(f"no engine serves the model {wanted[:200]!r}", param="model")

    def _cluster(self, client: Client, request: Request) -> None:
        _json(client, request, cluster_report(self._router.status(), self._router.metrics))

    def _requests(self, client: Client, request: Request) -> None:
        exchanges = [e for e in self._router.exchanges if e.asked.generates]
        found = [self._sequence(e) for e in exchanges[:_MAX_LIVE]]
        _json(client, request, LiveResponse(total=len(exchanges), requests=found))

    def _explain(self, client: Client, request: Request) -> None:
        wanted = request.path.split("/")[3]
        record, live = self._record(wanted)
        choice = self._with_notes(record.explain(record.output_tokens, record.last_token_s))
        found = Explanation(record.request_id, live, (choice,))
        prompt = ExplainedPrompt(prompt=0, live=live, choices=[choice], in_words=in_words(found))
        _json(client, request, ExplainResponse(id=wanted, live=live, prompts=[prompt]))

    def _drain_or_start(self, client: Client, request: Request) -> None:
        if request.method != "POST":
            raise MethodNotAllowed(f"{request.method} is not allowed at {request.path}")
        name, asked = request.path.split("/")[3:]
        engine = self._router.fleet.by_name.get(name)
        if engine is None:
            raise NotHere(f"there is no engine {name[:200]!r} here")
        if asked == "drain":
            engine.drain()
        elif not engine.drained:
            raise Conflict(f"{name} is {engine.state}: only what has been drained can be started")
        else:
            engine.start()
        _json(client, request, {"instance": name, "asked": asked, "role": None}, 202)

    def _with_notes(self, found: SequenceExplanation) -> SequenceExplanation:
        """Decisions say what in them is estimated."""
        explained = self._router.fleet.explained
        placements = tuple(
            replace(p, decision=explained(p.decision)) if p.decision is not None else p
            for p in found.placements
        )
        return replace(found, placements=placements)

    # --- inside --------------------------------------------------------------------------------

    def _record(self, wanted: str) -> tuple[Record, bool]:
        names = {wanted, bare_id(wanted)}
        for exchange in self._router.exchanges:
            if exchange.record.request_id in names:
                return exchange.record, True
        for name in sorted(names):
            if records := self._router.explainer.of_request(name):
                return records[-1], False
        raise NotHere(
            f"nothing is known of the request {wanted[:200]!r}: requests are found by their "
            f"x-request-id, live or among the last {self._router.config.explain_kept}"
        )

    def _sequence(self, exchange: Exchange) -> LiveSequence:
        attempt = exchange.attempt
        return LiveSequence(
            id=exchange.request.id,
            choice=0,
            instance=attempt.engine.name if attempt else None,
            phase="decoding" if exchange.started else "queued",
            age_s=exchange.clock() - exchange.record.accepted_s,
            prompt_tokens=exchange.num_tokens,
            output_tokens=exchange.num_tokens_out,
            attempt=len(exchange.record.placements),
            request_class="online",
        )


def _json(client: Client, request: Request, found: object, status: int = 200) -> None:
    respond(client, status, msgspec.json.encode(found), b"application/json", request.id)


class _EngineMetrics(Collector):
    """A series for each engine, labelled `engine`, as instances of ours have them."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        engines = self._router.fleet.engines
        audit = self._router.fleet.audit.accounts()
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["engine"])
            for engine in engines:
                gauge.add_metric([engine.name], read(engine))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, text, labels=["engine"])
            for engine in engines:
                counter.add_metric([engine.name], read(engine))
            yield counter
        error = GaugeMetricFamily(
            PREFIX + "kv_index_error",
            "Predicted against reported hit tokens, as a share of the prompt, of late.",
            labels=["engine"],
        )
        for name, account in audit.items():
            error.add_metric([name], account.error)
        yield error


_GAUGES: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
    ("engine_up", "1 while the engine answers its health checks.",
     lambda e: float(e.state in ("active", "draining"))),
    ("engine_breaker_open", "1 while the breaker keeps requests away.",
     lambda e: float(e.breaker.open_until_s is not None)),
    ("engine_requests_running", "Requests of ours that generate there.", lambda e: e.running),
    ("engine_requests_waiting", "Requests of ours that wait there for a first token.",
     lambda e: e.queued),
    ("engine_running_tokens", "Their tokens, estimated.", lambda e: e.running_tokens),
    ("engine_waiting_tokens", "Their tokens, estimated.", lambda e: e.queued_tokens),
    ("engine_ttft_ratio", "Actual over predicted time to first token of late.",
     lambda e: e.ttft.ratio),
    ("engine_cost_residual_seconds", "Mean error of the fitted step time.",
     lambda e: e.cost.model().residual_s),
)  # fmt: skip
_COUNTERS: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
    ("engine_requests", "Requests sent to the engine.", lambda e: e.counts.requests),
    ("engine_failures", "Of them, failed by it.", lambda e: e.counts.failures),
    ("engine_refusals", "Of them, answered with 429 or 503.", lambda e: e.counts.refusals),
    ("engine_retried", "Of them, tried again elsewhere.", lambda e: e.counts.retried),
    ("engine_prompt_tokens", "Prompt tokens, as it counted them or estimated.",
     lambda e: e.counts.prompt_tokens),
    ("engine_prompt_tokens_cached", "Of them, found in its cache, where it says so.",
     lambda e: e.counts.cached_tokens),
    ("engine_generation_tokens", "Tokens generated.", lambda e: e.counts.generation_tokens),
)  # fmt: skip
