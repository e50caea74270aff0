"""Reading a request's body within its limit, and turning it into a struct once."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.types import Receive, Scope

from penstock.protocol.errors import InvalidRequest, PayloadTooLarge
from penstock.service.api.errors import ClientDisconnected, from_validation_error

T = TypeVar("T")


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def read_body(scope: Scope, receive: Receive, max_body_bytes: int) -> bytes:
    """The body; a chunked upload is refused as soon as it passes the limit.

    Raises `PayloadTooLarge`, or `ClientDisconnected` when the upload breaks off.
    """
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > max_body_bytes:
        raise _too_large(max_body_bytes)
    chunks: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        chunk = message.get("body", b"")
        size_bytes += len(chunk)
        if size_bytes > max_body_bytes:
            raise _too_large(max_body_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(max_body_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than the limit of {max_body_bytes} bytes")


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Raises `InvalidRequest` (or `UnsupportedFeature`) that names the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise from_validation_error(exc) from exc
    except msgspec.DecodeError as exc:
        raise InvalidRequest(f"the body is not JSON: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidRequest("the body is not valid UTF-8") from exc
    except RecursionError as exc:
        raise InvalidRequest("the body is nested too deeply") from exc
