"""The OpenAPI document, from the very structs that parse requests and write answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from penstock import __version__
from penstock.service.api.auth import is_admin, is_open
from penstock.service.api.errors import ErrorResponse

_GENERATION_ERRORS = ("400", "404", "413", "429", "499", "500", "503")
_REASONS = {
    "400": "The request cannot be served as it is; `param` names the field",
    "401": "No API key, or a wrong one",
    "404": "No such model, request or instance",
    "413": "The body is over the limit",
    "429": "Too many requests wait already; see Retry-After",
    "499": "The client, or the server's drain, cancelled it",
    "500": "The engine failed",
    "503": "No engine is ready",
}


class Described(Protocol):
    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def answers(self) -> Any: ...
    @property
    def takes(self) -> Any: ...
    @property
    def streams(self) -> Any: ...


def document(apis: Sequence[Described], keys: bool) -> dict[str, Any]:
    types = [
        found
        for api in apis
        for found in (api.answers, api.takes, api.streams)
        if found is not None and found is not str
    ]
    types = list(dict.fromkeys([*types, ErrorResponse]))
    references, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schemas = dict(zip(types, references))
    paths: dict[str, dict[str, Any]] = {}
    for api in apis:
        path = api.path.replace(":path}", "}")
        paths.setdefault(path, {})[api.method.lower()] = _operation(api, path, schemas, keys)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _operation(
    api: Described, path: str, schemas: dict[Any, dict[str, Any]], keys: bool
) -> dict[str, Any]:
    errors: tuple[str, ...] = _GENERATION_ERRORS if api.takes is not None else ()
    parameters = re.findall(r"{(\w+)}", path)
    if parameters:
        errors = ("404",)
    if is_admin(path):
        errors = (*errors, "401") if api.method == "GET" else ("400", "401", "404", "413")
    guarded = keys and not is_open(path) and not is_admin(path)
    if guarded:
        errors = (*errors, "401")
    accepted = "202" if is_admin(path) and api.method == "POST" else "200"
    responses: dict[str, Any] = {accepted: _answer(api, schemas)}
    for status in sorted(errors):
        content = {"application/json": {"schema": schemas[ErrorResponse]}}
        responses[status] = {"description": _REASONS[status], "content": content}
    if path.startswith("/health"):
        responses["503"] = {**responses["200"], "description": "Not ready; `reason` says why"}
    operation: dict[str, Any] = {
        "summary": api.summary,
        "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
        "responses": responses,
    }
    if guarded:
        operation["security"] = [{"key": []}]
    if parameters:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in parameters
        ]
    if api.takes is not None:
        body = {"application/json": {"schema": schemas[api.takes]}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _answer(api: Described, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    if api.answers is str:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": schemas[api.answers]}}
    if api.streams is not None:
        # What one event is: a chunk, or an error that came too late for a status; then the end.
        chunk = {
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [schemas[api.streams], schemas[ErrorResponse]]},
        }
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, chunk]}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    return {"description": api.summary, "content": content}
