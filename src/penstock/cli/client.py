"""A small client of our own HTTP API, for `chat` and `bench`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from penstock.protocol.errors import (
    AuthenticationFailed,
    ConfigError,
    EngineUnavailable,
    InvalidRequest,
    PenstockError,
)

Http = httpx.Client

#: A first token may take as long as the queue is; a connection should stand at once.
TIMEOUT = httpx.Timeout(None, connect=10.0)
_POLL_S = 0.05


def headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def base_url(url: str) -> str:
    """With or without /v1 at its end. Raises `ConfigError`."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no URL: write http://host:port")
    return url.rstrip("/").removesuffix("/v1")


def connect(url: str, key: str | None, timeout: httpx.Timeout = TIMEOUT) -> Http:
    return httpx.Client(base_url=base_url(url), headers=headers(key), timeout=timeout)


def connect_uds(socket: Path) -> Http:
    transport = httpx.HTTPTransport(uds=str(socket))
    return httpx.Client(base_url="http://local", transport=transport, timeout=TIMEOUT)


def is_ready(http: Http) -> bool:
    """Whether `/health` says so. A server that does not answer yet is not."""
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def pause() -> None:
    time.sleep(_POLL_S)


def first_model(http: Http) -> str:
    """The name that the server prefers. Raises `PenstockError`s that say what to do."""
    try:
        response = http.get("/v1/models")
    except httpx.HTTPError as exc:
        raise EngineUnavailable(
            f"no server answers at {http.base_url} ({exc}): start one with `penstock serve MODEL`"
        ) from exc
    raise_for_status(response)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise EngineUnavailable(
            f"{http.base_url} does not list its models as an OpenAI-style server does"
        ) from None


def stream(http: Http, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Server-sent events as objects, up to [DONE]. Leaving the iteration cancels the request."""
    try:
        with http.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise_for_status(response)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise EngineUnavailable(str(event["error"].get("message", event["error"])))
                yield event
    except httpx.TransportError as exc:
        raise EngineUnavailable(f"the connection to the server broke: {exc}") from exc


def raise_for_status(response: httpx.Response) -> None:
    """The server's own words as one of our errors."""
    if not response.is_error:
        return
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{response.url} answered {response.status_code}: is this an OpenAI-style server?"
    kinds: dict[int, type[PenstockError]] = {401: AuthenticationFailed, 503: EngineUnavailable}
    raise kinds.get(response.status_code, InvalidRequest)(message)
