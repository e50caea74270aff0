"""Frames over ZeroMQ between processes: ROUTER at an instance, DEALER at a service. Over TCP they
are encrypted and authenticated wherever the process has a cluster secret (curve.py).

The file descriptor that ZeroMQ offers is edge-triggered, and any call on the socket may swallow the
edge. An endpoint therefore hands out an epoll descriptor over that one and an eventfd of its own,
which it sets whenever it has seen that more frames wait. That makes it level-triggered.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket as unix
import time
from collections.abc import Iterator

import zmq

from penstock.protocol import secret
from penstock.protocol.errors import ConfigError
from penstock.protocol.transport import base, curve

#: After a lost connection, ms until the first try and at most between two tries.
_RECONNECT_MS = 20
_RECONNECT_MAX_MS = 200
#: How long a listener waits for a predecessor in this process to let go of the address.
_RELEASE_S = 1.0
_MAX_QUEUED_CONNECTIONS = 256


class _Readiness:
    """A descriptor that is readable while a ZeroMQ socket has something to receive."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._set = False
        self._epoll = select.epoll()
        self._epoll.register(socket.fileno(), select.EPOLLIN)
        self._epoll.register(self._event, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def refresh(self) -> None:
        """To be called after every call on the socket, since any of them may eat an edge."""
        readable = bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
        if readable and not self._set:
            os.eventfd_write(self._event, 1)
        elif self._set and not readable:
            os.eventfd_read(self._event)
        self._set = readable

    def close(self) -> None:
        self._epoll.close()
        os.close(self._event)


class ZmqEndpoint:
    """What `listen` and `connect` have in common. `peer` is None at a listener."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        address: str,
        name: str,
        peer: str | None,
        watch: curve.Watch | None = None,
    ) -> None:
        self.name = name
        self.address = address
        self._socket = socket
        self._peer = peer
        self._watch = watch
        self._ready = _Readiness(socket)
        # What came in while the socket was being set up raised an edge that is already gone.
        self._ready.refresh()
        self._closed = False

    def send(self, peer: str, frame: bytes) -> bool:
        base.check_frame(frame)
        if self._closed or (self._peer is not None and peer != self._peer):
            return False
        parts = [frame] if self._peer is not None else [_identity(peer), frame]
        try:
            self._socket.send_multipart(parts, zmq.DONTWAIT)
            return True
        except zmq.ZMQError as exc:
            if exc.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        finally:
            self._ready.refresh()

    def receive(self) -> tuple[str, bytes] | None:
        if self._closed:
            return None
        try:
            parts = self._socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        finally:
            self._ready.refresh()
        # Our own peers send one part. What else comes is for the codec to refuse.
        if self._peer is not None:
            return self._peer, b"".join(parts)
        return parts[0].decode("utf-8", "surrogateescape"), b"".join(parts[1:])

    def drain(self, limit: int | None = None) -> Iterator[tuple[str, bytes]]:
        return base.drain(self, limit)

    def trouble(self) -> str:
        return "" if self._watch is None or self._closed else self._watch.trouble()

    def fileno(self) -> int:
        return self._ready.fileno()

    def close(self, flush_s: float = 0.0) -> None:
        if self._closed:
            return
        self._closed = True
        self._ready.close()
        if self._watch is not None:
            self._watch.close()
        self._socket.close(linger=int(flush_s * 1000))


def listen(
    address: str, name: str, *, high_water_frames: int = base.HIGH_WATER_FRAMES
) -> ZmqEndpoint:
    """An instance's side: accepts any number of services.

    `tcp://127.0.0.1:0` picks a port; the endpoint's `address` says which. Raises `ConfigError` for
    an address that is taken, cannot be made, or would be open to other hosts.
    """
    base.check_address(address)
    base.check_name(name)
    if address.startswith("ipc://"):
        _refuse_if_taken(address)
    socket = _socket(zmq.ROUTER, high_water_frames)
    # Unknown peers and full queues are reported instead of dropped in silence.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    socket.setsockopt(zmq.BACKLOG, _MAX_QUEUED_CONNECTIONS)
    guard = _guard(address)
    if guard is not None:
        curve.secure_listener(socket, guard)
    try:
        _bind(socket, address)
    except zmq.ZMQError as exc:
        socket.close(linger=0)
        raise ConfigError(f"cannot listen at {address}: {exc.strerror}") from exc
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    return ZmqEndpoint(socket, bound.rstrip(b"\0").decode(), name, None)


def connect(
    address: str, name: str, peer: str, *, high_water_frames: int = base.HIGH_WATER_FRAMES
) -> ZmqEndpoint:
    """A service's side: one connection to the instance that listens at `address`.

    The instance need not be there yet, and may come back after it died: the connection is renewed
    by itself, and frames queued for the dead one are dropped, not handed to its successor.
    """
    base.check_address(address)
    base.check_name(name)
    socket = _socket(zmq.DEALER, high_water_frames)
    socket.setsockopt(zmq.IDENTITY, _identity(name))
    # Queue only for a connection that stands.
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    guard = _guard(address)
    if guard is not None:
        curve.secure_connector(socket, guard)
    # A connection without a guard is watched too: it may meet a listener that has one.
    watch = curve.Watch(socket, address, guard is not None) if address.startswith("tcp:") else None
    try:
        socket.connect(address)
    except zmq.ZMQError as exc:
        socket.close(linger=0)
        raise ConfigError(f"cannot connect to {address}: {exc.strerror}") from exc
    return ZmqEndpoint(socket, address, name, peer, watch)


def _guard(address: str) -> secret.ClusterSecret | None:
    return secret.current() if address.startswith("tcp:") else None


def _socket(kind: int, high_water_frames: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, high_water_frames)
    socket.setsockopt(zmq.RCVHWM, high_water_frames)
    socket.setsockopt(zmq.MAXMSGSIZE, base.MAX_FRAME_BYTES)
    return socket


def _identity(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    deadline_s = time.monotonic() + _RELEASE_S
    while True:
        try:
            # ZeroMQ's word for "any port" is `*`.
            socket.bind(address[:-1] + "*" if address.endswith(":0") else address)
            return
        except zmq.ZMQError as exc:
            if exc.errno != zmq.EADDRINUSE or time.monotonic() > deadline_s:
                raise
        time.sleep(0.01)


def _refuse_if_taken(address: str) -> None:
    """ZeroMQ would take a Unix socket away from a living listener without a word.

    A path that a dead process left behind answers nobody and is taken over.
    """
    deadline_s = time.monotonic() + _RELEASE_S
    while _answers(address.removeprefix("ipc://")):
        if time.monotonic() > deadline_s:
            raise ConfigError(f"another process listens at {address}: give another address")
        time.sleep(0.01)


def _answers(path: str) -> bool:
    with contextlib.closing(unix.socket(unix.AF_UNIX, unix.SOCK_STREAM)) as probe:
        return probe.connect_ex(path) == 0
