"""What a request asks for, so that router and engine read the same path in it.

A target may say one thing in many ways: with a scheme and a host before it, escaped, by way of
`..`. What engines would make of it is made of it here, before anybody asks what it may; and what
goes on to an engine says it in one way only (RFC 9112, 3.2; RFC 3986, 6.2.2).
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote_to_bytes

from penstock.protocol.errors import InvalidRequest

#: Paths that engines get: the API, and what else of them computes something. Engines keep more
#: beside these (weights to be loaded anew, caches to be emptied), which is for their operators.
COMPUTES = frozenset((
    "/tokenize", "/detokenize", "/rerank", "/score", "/pooling", "/classify", "/generate",
    "/completion", "/infill", "/embedding", "/apply-template", "/v2/rerank", "/v2/embed",
))  # fmt: skip

_ABSOLUTE = re.compile(rb"https?://[^/?#]+", re.IGNORECASE)
#: A path, and a query that is the engine's affair.
_ORIGIN = re.compile(rb"(/[\x21\x22\x24-\x3e\x40-\x7e]*)(\?[\x21\x22\x24-\x7e]*)?")
#: What is left after unescaping and would be read differently again: controls, backslashes, and
#: escapes of dots, slashes and percent signs.
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f\\]|%(?:2e|2f|5c|25)", re.IGNORECASE)
_SAFE = "/:@!$&'()*+,;="


def origin_form(target: bytes) -> tuple[bytes, str]:
    """A target without scheme and host, its path written plainly unless it was; and that path,
    unescaped. Raises `InvalidRequest` for what names no path, or more than one."""
    absolute = _ABSOLUTE.match(target)
    if absolute is not None:
        rest = target[absolute.end() :]
        target = rest if rest.startswith(b"/") else b"/" + rest
    match = _ORIGIN.fullmatch(target)
    if match is None:
        raise InvalidRequest("the request's target is no path, such as /v1/chat/completions")
    raw, query = match[1], match[2] or b""
    try:
        given = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the request's path is not UTF-8") from None
    if _AMBIGUOUS.search(given):
        raise InvalidRequest("the request's path can be read in more than one way")
    path = _resolved(given)
    if path == given:
        return raw + query, path  # as it came
    return quote(path, safe=_SAFE).encode() + query, path


def for_engines(path: str) -> bool:
    """Of a path as `origin_form` gives it."""
    return path.startswith("/v1/") or path in COMPUTES


def _resolved(path: str) -> str:
    """Without dot segments and empty ones; a slash at the end stays."""
    kept: list[str] = []
    segments = path.split("/")
    for segment in segments:
        name, semicolon, _ = segment.partition(";")
        if name in (".", "..") and semicolon:
            raise InvalidRequest("the request's path can be read in more than one way")
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    slash = "/" if kept and segments[-1] in ("", ".", "..") else ""
    return "/" + "/".join(kept) + slash
