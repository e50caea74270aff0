"""The service's HTTP API as an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penstock import __version__
from penstock.service.api import openapi
from penstock.service.api.admin import (
    AdminEndpoints,
    Done,
    ExplainResponse,
    LiveResponse,
    RoleRequest,
    ScaleRequest,
)
from penstock.service.api.auth import AdminDoor, Keys, is_admin
from penstock.service.api.chat import ChatEndpoint
from penstock.service.api.completions import CompletionEndpoint
from penstock.service.api.config import ApiConfig
from penstock.service.api.context import Context
from penstock.service.api.edge import Edge
from penstock.service.api.errors import install
from penstock.service.api.health import OperatorEndpoints
from penstock.service.api.requests_chat import ChatRequest
from penstock.service.api.requests_completion import (
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from penstock.service.api.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    DetokenizeResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    VersionResponse,
)
from penstock.service.api.tokenize import DetokenizeEndpoint, TokenizeEndpoint
from penstock.service.generation import Generator
from penstock.service.operations import Scaled
from penstock.service.report import ClusterReport
from penstock.service.text.texts import Texts

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Api:
    """An endpoint's handler, and what the OpenAPI document says about it."""

    method: str
    path: str
    handler: Handler
    summary: str
    answers: Any
    takes: Any = None
    streams: Any = None


def create_app(generator: Generator, texts: Texts, config: ApiConfig) -> FastAPI:
    """Serve with any ASGI server; the application belongs to the loop it runs in.

    `app.state.context` holds the metrics and what else the endpoints share.
    """
    context = Context(generator, texts, config)
    app = FastAPI(title="Penstock", version=__version__, redirect_slashes=False, redoc_url=None)
    app.state.context = context
    table = _table(context)
    document = openapi.document(table, keys=bool(config.api_keys))
    # FastAPI's own way to serve a document that it has not made.
    app.openapi = lambda: document  # type: ignore[method-assign]
    for api in table:
        # Starlette's own routes: what FastAPI's add (parameters, exit stacks) is not used here.
        app.router.routes.append(
            Route(api.path, api.handler, methods=[api.method], include_in_schema=False)
        )

    def on_refused(path: str, code: str) -> None:
        if not is_admin(path):  # an operator's mistake is no client's refused request
            context.metrics.on_refused(code)

    install(app, on_refused)
    app.add_middleware(
        Edge,
        keys=Keys(config.api_keys),
        admin=AdminDoor(config.admin_keys),
        log_requests=config.log_requests,
    )
    return app


def _table(context: Context) -> list[Api]:
    operator = OperatorEndpoints(context)
    chat, completion = ChatEndpoint(context), CompletionEndpoint(context)
    tokenize, detokenize = TokenizeEndpoint(context), DetokenizeEndpoint(context)
    return [
        Api(
            "POST", "/v1/chat/completions", chat.__call__, "Answer a conversation",
            ChatCompletion, ChatRequest, ChatCompletionChunk,
        ),
        Api(
            "POST", "/v1/completions", completion.__call__, "Continue one or many prompts",
            Completion, CompletionRequest, Completion,
        ),
        Api("GET", "/v1/models", operator.models, "The models served", ModelList),
        Api("GET", "/v1/models/{model_id:path}", operator.model, "One model", ModelCard),
        Api(
            "POST", "/tokenize", tokenize.__call__, "Text or messages to token ids",
            TokenizeResponse, TokenizeRequest,
        ),
        Api(
            "POST", "/detokenize", detokenize.__call__, "Token ids to text",
            DetokenizeResponse, DetokenizeRequest,
        ),
        Api("GET", "/health", operator.health, "Ready: a real token was produced", HealthResponse),
        Api("GET", "/health/ready", operator.health, "The same as /health", HealthResponse),
        Api("GET", "/health/live", operator.live, "The process works", HealthResponse),
        Api("GET", "/metrics", operator.metrics, "Prometheus metrics", str),
        Api("GET", "/version", operator.version, "The server's version", VersionResponse),
        *_admin_table(context),
    ]  # fmt: skip


def _admin_table(context: Context) -> list[Api]:
    admin = AdminEndpoints(context)
    return [
        Api("GET", "/admin/cluster", admin.cluster, "Instances, loads, latencies", ClusterReport),
        Api("GET", "/admin/requests", admin.requests, "Requests that live", LiveResponse),
        Api(
            "GET", "/admin/requests/{request_id}/explain", admin.explain,
            "Why a request went where it went, and where its time was spent", ExplainResponse,
        ),
        Api(
            "POST", "/admin/instances/{name}/drain", admin.drain,
            "No new work for an instance; what it has goes on elsewhere, and it ends", Done,
        ),
        Api(
            "POST", "/admin/instances/{name}/start", admin.start,
            "Start an instance again that has been drained", Done,
        ),
        Api(
            "POST", "/admin/scale", admin.scale,
            "Have so many engines in service", Scaled, ScaleRequest,
        ),
        Api(
            "POST", "/admin/instances/{name}/role", admin.role,
            "Give an instance a role", Done, RoleRequest,
        ),
    ]  # fmt: skip
