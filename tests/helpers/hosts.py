"""Several hosts, as far as one machine can be: network namespaces joined by Ethernet pairs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


class NoHosts(Exception):
    """This machine lets us make no namespaces; the message says why."""


@dataclass(frozen=True)
class Host:
    namespace: str
    #: Addresses of our side of its cable and of its own.
    here: str
    there: str

    def ip(self, *words: str) -> None:
        """`ip` in that namespace."""
        _ip("-n", self.namespace, *words)


@dataclass(frozen=True)
class Pair:
    """Two hosts, each with a cable to us, and one cable between the two that can be cut."""

    a: Host
    b: Host

    @property
    def cable(self) -> str:
        return f"{self.a.namespace}-d"

    def cut(self) -> None:
        """At b's end: a only sees that nothing comes back."""
        self.b.ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        self.b.ip("link", "set", self.cable, "up")
        self._route(self.b, self.a)

    def lay(self) -> None:
        self.a.ip(
            "link", "add", self.cable, "type", "veth", "peer", "name", self.cable,
            "netns", self.b.namespace,
        )  # fmt: skip
        for host, other in ((self.a, self.b), (self.b, self.a)):
            host.ip("link", "set", self.cable, "up")
            self._route(host, other)

    def _route(self, host: Host, other: Host) -> None:
        """To the other's one address by the direct cable."""
        host.ip("route", "replace", f"{other.there}/32", "dev", self.cable, "src", host.there)


@contextlib.contextmanager
def pair_of_hosts() -> Iterator[Pair]:
    """Raises `NoHosts`."""
    with _host("a") as a, _host("b") as b:
        pair = Pair(a, b)
        pair.lay()
        yield pair


@contextlib.contextmanager
def _host(letter: str) -> Iterator[Host]:
    if shutil.which("ip") is None:
        raise NoHosts("no `ip` here: apt-get install iproute2")
    number = secrets.randbelow(250) + 1
    second = {"a": 232, "b": 233}[letter]
    host = Host(
        f"psh{os.getpid() % 10**6}{letter}", f"10.{second}.{number}.1", f"10.{second}.{number}.2"
    )
    try:
        _ip("netns", "add", host.namespace)
    except subprocess.CalledProcessError as exc:
        raise NoHosts(f"no network namespaces here: {exc.stderr.strip()}") from exc
    try:
        near, far = f"{host.namespace}-n", f"{host.namespace}-f"
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", host.namespace)
        _ip("addr", "add", f"{host.here}/24", "dev", near)
        _ip("link", "set", near, "up")
        host.ip("addr", "add", f"{host.there}/24", "dev", far)
        host.ip("link", "set", far, "up")
        host.ip("link", "set", "lo", "up")
        yield host
    finally:
        # The pair goes with the namespace that one of its ends is in.
        _ip("netns", "del", host.namespace)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
