"""The transport that an address asks for. Drivers call these two and know no more."""

from __future__ import annotations

from penstock.protocol.transport import memory
from penstock.protocol.transport.base import Endpoint


def listen(address: str, name: str) -> Endpoint:
    """An instance's endpoint, for any number of services. Raises `ConfigError`."""
    if address.startswith("memory://"):
        return memory.listen(address, name)
    from penstock.protocol.transport import zmq

    return zmq.listen(address, name)


def connect(address: str, name: str, peer: str) -> Endpoint:
    """A service's endpoint, to the one instance that listens (or will listen) at `address`."""
    if address.startswith("memory://"):
        return memory.connect(address, name, peer)
    from penstock.protocol.transport import zmq

    return zmq.connect(address, name, peer)
