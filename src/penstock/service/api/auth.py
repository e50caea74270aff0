"""API keys, compared in constant time and held only as digests; and who may ask /admin."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from starlette.types import Scope

from penstock.protocol.errors import AuthenticationFailed
from penstock.service.api.body import header

#: Probes and scrapers bring no key, and these paths tell nothing about requests.
OPEN_PREFIXES = ("/health", "/metrics", "/version", "/docs", "/openapi.json")


class Keys:
    """No keys: everybody may. Otherwise `Authorization: Bearer <one of the keys>`."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests have one length, so comparing them tells nothing about the length of a key.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, path: str, authorization: bytes | None) -> None:
        """Raises `AuthenticationFailed`; never says, or logs, what was sent."""
        if self._digests and not is_open(path):
            self.require(authorization)

    def require(self, authorization: bytes | None) -> None:
        """Raises `AuthenticationFailed` for anything but one of the keys."""
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


class AdminDoor:
    """/admin has keys of its own: one that may generate text may not drain an instance.

    Without a key it is open on loopback, to programs: a page in a browser on this machine sends an
    Origin (or, after DNS rebinding, a Host that is not loopback), a proxy on this machine says for
    whom it asks, and neither gets in.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = Keys(keys)

    def check(self, scope: Scope) -> None:
        """Raises `AuthenticationFailed`."""
        if self._keys:
            self._keys.require(header(scope, b"authorization"))
        elif not _is_local(scope):
            raise AuthenticationFailed(
                "without a key /admin answers on loopback only: start the server with an admin key"
            )


def is_admin(path: str) -> bool:
    return path == "/admin" or path.startswith("/admin/")


def _is_local(scope: Scope) -> bool:
    forwarded = (b"origin", b"forwarded", b"x-forwarded-for", b"x-real-ip")
    if any(header(scope, name) is not None for name in forwarded):
        return False
    client = scope.get("client")
    if client is None or not client[0]:
        return True  # a Unix socket: whoever may open it is on this machine
    host = (header(scope, b"host") or b"").decode("latin-1")
    name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host
    name = name.partition(":")[0] if not name.startswith("[") else name[1:-1]
    return _is_loopback(client[0]) and (name in ("", "localhost") or _is_loopback(name))


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
