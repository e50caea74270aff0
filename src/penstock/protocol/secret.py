"""The cluster's secret: what processes of one cluster on several hosts know and nobody else does.

Set once for the process, before the first connection. Everything that leaves the host is derived
from it by label, so that one use tells nothing about another (HKDF-SHA256, RFC 5869).
"""

from __future__ import annotations

import hashlib
import hmac

from penstock.protocol.errors import ConfigError

VARIABLE = "PENSTOCK_CLUSTER_SECRET"
MIN_BYTES = 16
_DIGEST_BYTES = 32
_SALT = b"penstock cluster secret 1"

_current: ClusterSecret | None = None


class ClusterSecret:
    """Raises `ConfigError` for a secret that could be guessed."""

    __slots__ = ("_key",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) < MIN_BYTES:
            raise ConfigError(
                f"the cluster secret has {len(secret)} bytes and needs at least {MIN_BYTES}: "
                "make one with `openssl rand -hex 32`"
            )
        self._key = hmac.digest(_SALT, secret, hashlib.sha256)

    def derive(self, label: str, num_bytes: int = _DIGEST_BYTES) -> bytes:
        """Bytes for one purpose, the same on every host that has the secret."""
        found, last, number = b"", b"", 0
        while len(found) < num_bytes:
            number += 1
            last = hmac.digest(self._key, last + label.encode() + bytes([number]), hashlib.sha256)
            found += last
        return found[:num_bytes]

    def __repr__(self) -> str:
        return "ClusterSecret(...)"


def use(secret: ClusterSecret | None) -> None:
    """What connections of this process use from now on; None: they do not leave the host."""
    global _current
    _current = secret


def current() -> ClusterSecret | None:
    return _current
