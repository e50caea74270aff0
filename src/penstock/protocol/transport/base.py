"""How frames travel between services and instances, whatever carries them.

An instance listens; a service connects to each instance it uses. An endpoint never blocks, neither
in `send` nor in `receive`, and may lose frames: when a peer is unknown, its queue is full, or a
connection ends. What is delivered arrives whole, once, and in the order in which that peer sent it.
Everything above (numbers, credits, attempts, resynchronisation) is built to live with that.

An endpoint belongs to one thread. `fileno()` can be waited on with select, poll, epoll or
`loop.add_reader`: it is readable as long as `receive` may return something, also when frames came
in during a `send` (level-triggered; nothing has to be drained to the end to be told again).
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from itertools import count, takewhile
from typing import Protocol

from penstock.protocol import secret
from penstock.protocol.errors import ConfigError, ProtocolError

#: Frames that may wait for one peer, in either direction.
HIGH_WATER_FRAMES = 4096
MAX_FRAME_BYTES = 256 << 20
MAX_NAME_BYTES = 200


class Endpoint(Protocol):
    """One side of the wire. `name` is what peers call it; `address` where it listens or connects.

    A listener knows its peers by the names they connected under; if a second connection comes under
    the same name it takes over, and the first one is cut off.
    """

    name: str
    address: str

    def send(self, peer: str, frame: bytes) -> bool:
        """Queue `frame` for `peer`; False if it is not connected or its queue is full.

        Never blocks. True promises nothing about delivery. False after `close`. A connection takes
        a moment to stand, so the first sends may be refused: try again on the next timer.
        Raises `ProtocolError` for a frame over `MAX_FRAME_BYTES`.
        """

    def receive(self) -> tuple[str, bytes] | None:
        """The next frame and the peer that sent it, or None if there is none now."""

    def drain(self, limit: int | None = None) -> Iterator[tuple[str, bytes]]:
        """What `receive` returns until it is None, but at most `limit` frames."""

    def trouble(self) -> str:
        """Why the connection does not stand, as far as its handshake says it; "" if all is well."""

    def fileno(self) -> int:
        """Readable when `receive` may return something (sometimes it is None all the same)."""

    def close(self, flush_s: float = 0.0) -> None:
        """Stop at once; frames not yet sent get `flush_s` more seconds in the background.

        May be called twice.
        """


def drain(endpoint: Endpoint, limit: int | None) -> Iterator[tuple[str, bytes]]:
    """`Endpoint.drain` for those who implement it."""
    turns = count() if limit is None else range(limit)
    received = (endpoint.receive() for _ in turns)
    for item in takewhile(lambda found: found is not None, received):
        assert item is not None
        yield item


def check_frame(frame: bytes) -> None:
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES} bytes"
        )


def check_name(name: str) -> None:
    encoded = name.encode("utf-8", "surrogateescape")
    if not 0 < len(encoded) <= MAX_NAME_BYTES or encoded[0] == 0:
        raise ConfigError(f"{name!r} is no name for an endpoint: give 1 to {MAX_NAME_BYTES} bytes")


def check_address(address: str) -> None:
    """Raises `ConfigError` unless the address stays on this host, or a cluster secret guards it.

    Without one, frames are neither encrypted nor authenticated: a TCP port that others can reach
    would hand them the engine.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or not rest:
        raise ConfigError(f"{address!r} is no address: write ipc:///path or tcp://127.0.0.1:port")
    if scheme == "ipc":
        # sun_path of sockaddr_un holds 108 bytes, the terminating zero included.
        if len(os.fsencode(rest)) > 107:
            raise ConfigError(f"{address} is too long for a Unix socket: 107 bytes at most")
        return
    if scheme == "tcp":
        if not stays_here(address) and secret.current() is None:
            raise ConfigError(
                f"{address} can be reached from other hosts, and without a cluster secret anybody "
                "there could use the engine: give every worker and router the same "
                f"--cluster-secret-file (openssl rand -hex 32 > FILE) or ${secret.VARIABLE}, or "
                "stay here with ipc:///path or tcp://127.0.0.1:port"
            )
        return
    raise ConfigError(f"{address}: {scheme!r} is not known, use ipc or tcp")


def stays_here(address: str) -> bool:
    """Whether nobody on another host can reach it."""
    scheme, _, rest = address.partition("://")
    return scheme != "tcp" or _is_loopback(rest.rpartition(":")[0].strip("[]"))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
