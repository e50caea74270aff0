"""API keys, compared in constant time and held only as digests."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from penstock.protocol.errors import AuthenticationFailed

#: Probes and scrapers bring no key, and these paths tell nothing about requests.
OPEN_PREFIXES = ("/health", "/metrics", "/version", "/docs", "/openapi.json")


class Keys:
    """No keys: everybody may. Otherwise `Authorization: Bearer <one of the keys>`."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests have one length, so comparing them tells nothing about the length of a key.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, path: str, authorization: bytes | None) -> None:
        """Raises `AuthenticationFailed`; never says, or logs, what was sent."""
        if not self._digests or is_open(path):
            return
        if authorization is None:
            raise AuthenticationFailed("no API key: send 'Authorization: Bearer YOUR_KEY'")
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, so that time does not tell which one came close.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise AuthenticationFailed("the API key is not valid")


def is_open(path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in OPEN_PREFIXES)
