"""What a router reads of a request that it passes on as it came: enough to choose an engine."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from penstock.protocol.kv import KEY_BYTES

#: Prompt bytes that one key of the approximate index stands for; about 64 tokens of English.
CHUNK_BYTES = 256
#: Keys of one request at most: a prefix of a megabyte. What follows changes no decision.
_MAX_CHUNKS = 4096

#: A limit above this one is none.
_MOST_TOKENS = 1 << 31

#: Computed anew wherever they are sent; to send them twice does no harm.
GENERATES = frozenset(
    f"/v1/{name}"
    for name in (
        "chat/completions", "completions", "embeddings", "responses", "messages", "rerank",
        "score", "pooling", "classify", "messages/count_tokens",
    )
)  # fmt: skip
_REPEATABLE = frozenset(("/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize", "/rerank"))

# An image's bytes are no text: they are taken out of the count, and some tokens put in for them.
_BASE64 = re.compile(rb"base64,[A-Za-z0-9+/=_-]{64,}")
_IMAGE_BYTES = 4096
_FORM_MODEL = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,512})\r\n')
_STORED_RESPONSE = re.compile(r"^/v1/responses/(resp_[A-Za-z0-9_-]{1,128})(?:/|$)")


class _Body(msgspec.Struct):
    """Nothing is checked here: what is wrong with a body is for the engine to say."""

    model: Any = None
    stream: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    previous_response_id: Any = None
    tools: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Body)


@dataclass(frozen=True, slots=True)
class Asked:
    #: None: the body names none.
    model: str | None
    stream: bool
    #: Bytes of what will be prompt, JSON's own quotes and all: divided by an engine's bytes a token
    #: they estimate its tokens.
    prompt_bytes: int
    #: 16 bytes for each whole chunk of it; equal keys, equal prefixes.
    keys: list[bytes]
    #: None: the request sets no limit.
    max_tokens: int | None
    #: May be sent to another engine after this one has begun to work on it.
    repeatable: bool
    #: Counts as a request for tokens in metrics and in predictions.
    generates: bool
    #: A stored response that only the engine which made it knows.
    response_id: str | None = None


def read(method: str, path: str, content_type: bytes, body: bytes) -> Asked:
    generates = method == "POST" and path in GENERATES
    repeatable = generates or method in ("GET", "HEAD", "OPTIONS") or path in _REPEATABLE
    stored = _STORED_RESPONSE.match(path)
    fields = _Body()
    if body and b"multipart/" in content_type:
        found = _FORM_MODEL.search(body[: 1 << 16]) or _FORM_MODEL.search(body[-(1 << 16) :])
        fields.model = found[1].decode("utf-8", "replace") if found else None
    elif body:
        try:
            fields = _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # no JSON object; its engine will say so
    text = b"\x00".join(
        bytes(part)
        for part in (
            fields.tools, fields.system, fields.instructions, fields.messages, fields.prompt,
            fields.input,
        )
        if part
    )  # fmt: skip
    model = fields.model if isinstance(fields.model, str) else None
    previous = fields.previous_response_id
    return Asked(
        model=model,
        stream=fields.stream is True,
        prompt_bytes=_text_bytes(text),
        keys=prefix_keys(model or "", text) if generates else [],
        max_tokens=_limit(fields),
        repeatable=repeatable,
        generates=generates,
        response_id=stored[1] if stored else previous if isinstance(previous, str) else None,
    )


def prefix_keys(model: str, text: bytes) -> list[bytes]:
    """The last chunk of a text, which is not whole (or ends with its closing bracket), has none."""
    parent = hashlib.sha256(model.encode()).digest()[:KEY_BYTES]
    keys: list[bytes] = []
    for start in range(0, min(len(text), _MAX_CHUNKS * CHUNK_BYTES) - CHUNK_BYTES, CHUNK_BYTES):
        parent = hashlib.sha256(parent + text[start : start + CHUNK_BYTES]).digest()[:KEY_BYTES]
        keys.append(parent)
    return keys


def _text_bytes(text: bytes) -> int:
    if len(text) < 1024 or b"base64," not in text:
        return len(text)
    without, images = _BASE64.subn(b"", text)
    return len(without) + images * _IMAGE_BYTES


def _limit(fields: _Body) -> int | None:
    for value in (fields.max_completion_tokens, fields.max_tokens, fields.max_output_tokens):
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return min(value, _MOST_TOKENS)
    return None
