"""ZeroMQ CURVE with keys that both sides derive from the cluster's secret.

The listener's key pair tells the connecting side that it has found its cluster; the one key pair
that connecting sides share tells the listener the same. Who lacks the secret has neither, and no
handshake: what is behind a port says nothing, and takes in nothing.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from penstock.protocol.errors import ConfigError
from penstock.protocol.secret import ClusterSecret

_LISTENER, _CONNECTOR = "curve listener", "curve connector"
_DOMAIN = b"penstock"
_FAILED = {
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
}
_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.Event(sum(_FAILED))

_lock = threading.Lock()
_admitted: set[bytes] = set()
_authenticator: ThreadAuthenticator | None = None


def _key_pair(secret: ClusterSecret, label: str) -> tuple[bytes, bytes]:
    """(public, secret), in ZeroMQ's own encoding."""
    private = z85.encode(secret.derive(label))
    return zmq.curve_public(private), private


def secure_listener(socket: zmq.Socket[bytes], secret: ClusterSecret) -> None:
    public, private = _key_pair(secret, _LISTENER)
    _admit(_key_pair(secret, _CONNECTOR)[0])
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, private)
    # Whoever comes must be let in by name: a listener without a judge would let in everybody who
    # knows its public key.
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)


def secure_connector(socket: zmq.Socket[bytes], secret: ClusterSecret) -> None:
    public, private = _key_pair(secret, _CONNECTOR)
    socket.setsockopt(zmq.CURVE_SERVERKEY, _key_pair(secret, _LISTENER)[0])
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, private)


class _Judge:
    """What pyzmq's authenticator asks whether a client's public key is one of ours."""

    def callback(self, domain: str, key: bytes) -> bool:
        return key in _admitted


def _admit(public: bytes) -> None:
    """The judge is a thread of the process's context, shared by all its listeners."""
    global _authenticator
    with _lock:
        _admitted.add(public)
        if _authenticator is not None:
            return
        found = ThreadAuthenticator(zmq.Context.instance(), log=_quiet())
        try:
            found.start()
        except zmq.ZMQError as exc:
            raise ConfigError(f"connections cannot be authenticated here: {exc.strerror}") from exc
        found.configure_curve_callback(_DOMAIN.decode(), credentials_provider=_Judge())
        _authenticator = found


def _quiet() -> logging.Logger:
    log = logging.getLogger("penstock.zap")
    log.setLevel(logging.ERROR)
    return log


class Watch:
    """Tells why a connection does not stand, as far as the handshake says it."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, guarded: bool = True) -> None:
        self._address = address
        self._guarded = guarded
        self._socket = socket
        self._monitor: zmq.Socket[Any] = socket.get_monitor_socket(_WATCHED)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._trouble = ""

    def trouble(self) -> str:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor, zmq.DONTWAIT)
            if event["event"] in _FAILED:
                self._trouble = self._words(int(event["value"]))
            else:
                self._trouble = ""
        return self._trouble

    def _words(self, value: int) -> str:
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return (
                f"{self._address} and this side do not both have a cluster secret: give the same "
                "--cluster-secret-file to all, or to none"
            )
        if not self._guarded:
            return (
                f"what listens at {self._address} does not speak this protocol: is it a Penstock "
                "worker or router?"
            )
        return (
            f"{self._address} has another cluster secret: give the same --cluster-secret-file "
            "to every worker and router"
        )

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
