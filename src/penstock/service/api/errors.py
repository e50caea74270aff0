"""Every failure as OpenAI's error body, whatever raised it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from penstock.protocol.errors import InvalidRequest, Overloaded, PenstockError, UnsupportedFeature

log = logging.getLogger("penstock.api")

#: nginx's status for a client that went away; nobody is left to read it, but logs are.
CLIENT_CLOSED_REQUEST = 499
UNFORESEEN = "an internal error has been logged: please report it with the log"


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(msgspec.Struct):
    error: ErrorDetail


class RouteNotFound(PenstockError):
    code = "not_found"
    type = "not_found_error"
    http_status = 404


class MethodNotAllowed(PenstockError):
    code = "method_not_allowed"
    type = "invalid_request_error"
    http_status = 405


class ClientDisconnected(Exception):
    """The client went away before its answer was complete. Ends the handler, answers nobody."""


def error_body(exc: PenstockError) -> ErrorResponse:
    return ErrorResponse(ErrorDetail(exc.message, exc.type, exc.param, exc.code))


def error_response(exc: PenstockError, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if isinstance(exc, Overloaded) or exc.retry_after_s is not None:
        # Whole seconds, rounded up: "0" would invite the client straight back.
        headers["retry-after"] = str(max(1, math.ceil(exc.retry_after_s or 1.0)))
    if exc.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(
        msgspec.json.encode(error_body(exc)),
        status_code=exc.http_status,
        headers=headers,
        media_type="application/json",
    )


# msgspec's messages end in " - at `$.a[0].b`"; its paths say `[...]` for any key of a dict.
_PATH = re.compile(r" - at `(?:key in )?\$?(?P<path>[^`]*)`$")
_UNKNOWN_FIELD = re.compile(r"^Object contains unknown field `(?P<field>.*?)`")
_MISSING_FIELD = re.compile(r"^Object missing required field `(?P<field>.*?)`")
_PART_TYPE = re.compile(r"^Invalid enum value '(?P<kind>.*?)'.*\.content\[\d+\]\.type`$", re.DOTALL)


def from_validation_error(exc: msgspec.ValidationError) -> InvalidRequest:
    """What a struct refused, as our error with the field's name in `param`."""
    text = str(exc)
    found = _PATH.search(text)
    path = found["path"].lstrip(".") if found else ""
    if part := _PART_TYPE.match(text):
        return UnsupportedFeature(
            f"content parts of type '{part['kind']}' are not supported: this model takes text",
            param=path.removesuffix(".type"),
        )
    if unknown := _UNKNOWN_FIELD.match(text):
        param = f"{path}.{unknown['field']}".lstrip(".")
        return UnsupportedFeature(f"'{param}' is not supported", param=param)
    if missing := _MISSING_FIELD.match(text):
        param = f"{path}.{missing['field']}".lstrip(".")
        return InvalidRequest(f"missing required parameter: '{param}'", param=param)
    said = _PATH.sub("", text)
    if not path:
        return InvalidRequest(f"the body does not fit: {said}")
    return InvalidRequest(f"invalid value for '{path}': {said}", param=path)


def internal_error(exc: BaseException) -> PenstockError:
    """Anything unforeseen: logged in full here, and told to the client without its insides."""
    log.error("unexpected %s", type(exc).__name__, exc_info=exc)
    return PenstockError(UNFORESEEN)


def from_http_exception(request: Request, exc: HTTPException) -> PenstockError:
    if exc.status_code == 404:
        return RouteNotFound(f"no such route: {request.url.path} (see /docs)")
    if exc.status_code == 405:
        return MethodNotAllowed(f"{request.method} is not allowed at {request.url.path}")
    found: PenstockError = (
        InvalidRequest(str(exc.detail)) if exc.status_code < 500 else PenstockError(str(exc.detail))
    )
    return found


def install(app: FastAPI, on_refused: Callable[[str, str], None]) -> None:
    """OpenAI's error shape for everything that a route of `app` raises; `on_refused` is told
    of each by path and code."""

    def refuse(
        request: Request, exc: PenstockError, headers: dict[str, str] | None = None
    ) -> Response:
        on_refused(request.scope["path"], exc.code)
        return error_response(exc, headers)

    async def penstock(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, PenstockError)
        return refuse(request, exc)

    async def http(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return refuse(request, from_http_exception(request, exc), dict(exc.headers or {}))

    async def too_deep(request: Request, exc: Exception) -> Response:
        return refuse(request, InvalidRequest("the request is nested too deeply"))

    async def gone(_: Request, exc: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def unforeseen(request: Request, exc: Exception) -> Response:
        return refuse(
            request, PenstockError(UNFORESEEN)
        )  # the server logs it: it is raised further

    app.add_exception_handler(PenstockError, penstock)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RecursionError, too_deep)
    app.add_exception_handler(ClientDisconnected, gone)
    app.add_exception_handler(Exception, unforeseen)
