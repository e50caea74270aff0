"""Which instances a service uses, as the registry tells it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from penstock.protocol.codec import PROTOCOL_VERSION
from penstock.protocol.errors import ConfigError
from penstock.registry.base import INSTANCES, Deleted, InstanceEntry, Listing, Put
from penstock.registry.registry import Registry
from penstock.service.cluster.fit import ANYTHING, Kind, Wanted

log = logging.getLogger(__name__)

#: How often those are looked at whose entry is gone.
_LOOK_S = 0.5


class Connections(Protocol):
    """What membership asks of the service's driver."""

    def connect(self, name: str, address: str) -> None: ...

    def replace(self, name: str, address: str) -> None:
        """A new process under this name: what ran on the old one is gone."""

    def refuse(self, name: str, reason: str) -> None: ...

    def remove(self, name: str) -> None: ...

    def still_lives(self, name: str) -> bool:
        """It was heard of not long ago, whatever the registry says."""


class Membership:
    """Follows a registry until `close`.

    An entry says that an instance is there; that it is gone is said by its silence. So an instance
    whose entry has ended is kept for as long as its heartbeats come, and a registry that loses its
    leases, or all it knew, loses nobody's requests.
    """

    def __init__(
        self,
        registry: Registry,
        connections: Connections,
        *,
        they_return: bool = False,
        wanted: Wanted = ANYTHING,
    ) -> None:
        """`they_return`: somebody starts these instances again, so none of them is removed."""
        self._registry = registry
        self._connections = connections
        self._wanted = wanted
        #: What the registry says, and which of it this service goes by.
        self._listed: dict[str, bytes] = {}
        self._known: dict[str, InstanceEntry] = {}
        self._refused: set[str] = set()
        self._leaving: set[str] = set()
        self._tasks = [asyncio.ensure_future(self._follow())]
        if not they_return:
            self._tasks.append(asyncio.ensure_future(self._look()))

    async def _follow(self) -> None:
        async for event in self._registry.watch(INSTANCES):
            match event:
                case Listing(entries=entries):
                    self._listed = dict(entries)
                    for name in self._known.keys() - entries.keys():
                        self._gone(name)
                    for key, value in entries.items():
                        self._there(key, value)
                case Put(key=key, value=value):
                    self._listed[key] = value
                    self._there(key, value)
                case Deleted(key=key):
                    self._listed.pop(key, None)
                    self._gone(key)

    def _there(self, key: str, value: bytes) -> None:
        try:
            entry = msgspec.json.decode(value, type=InstanceEntry)
        except msgspec.DecodeError as exc:
            log.warning("the entry of %s is not understood: %s", key, exc)
            return
        known = self._known.get(entry.name)
        if known is not None and entry.incarnation < known.incarnation:
            # A late word of an older one; or the newer one is dead, and this host's clock has been
            # put back meanwhile. Which it is, its silence tells.
            self._leaving.add(entry.name)
            return
        self._leaving.discard(entry.name)
        if known == entry:
            return
        reason = self._why_not(entry)
        if reason:
            self._known[entry.name] = entry
            self._refused.add(entry.name)
            log.warning("%s is not used: %s", entry.name, reason)
            self._connections.refuse(entry.name, reason)
            return
        if known is None:
            log.info("%s is at %s", entry.name, entry.address)
            self._take(entry, self._connections.connect)
        else:
            log.info("%s has started anew, at %s", entry.name, entry.address)
            self._take(entry, self._connections.replace)
        self._known[entry.name] = entry

    def _why_not(self, entry: InstanceEntry) -> str:
        """Other protocols cannot be spoken to. What this service was told that instances are holds
        before anything else; beyond that the first who came decide (see `fit.Kind`)."""
        if entry.protocol_version != PROTOCOL_VERSION:
            return (
                f"it speaks protocol version {entry.protocol_version}, this side "
                f"{PROTOCOL_VERSION}: run the same Penstock release everywhere"
            )
        if reason := self._wanted.refuses(entry):
            return reason
        for other in self._known.values():
            if other.name in self._refused or other.name in (entry.name, *self._leaving):
                continue
            kind = Kind(entry.model_digest, entry.layout_digest)
            if reason := kind.differs(Kind(other.model_digest, other.layout_digest), other.name):
                return reason
        return ""

    def _gone(self, name: str) -> None:
        if name in self._known:
            self._leaving.add(name)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for name in sorted(self._leaving):
                if name in self._refused or not self._connections.still_lives(name):
                    log.info("%s is gone", name)
                    self._leaving.discard(name)
                    self._refused.discard(name)
                    del self._known[name]
                    self._connections.remove(name)
                    if name in self._listed:
                        self._there(name, self._listed[name])
                    self._reconsider()

    def _reconsider(self) -> None:
        """Somebody has left: those who were refused for their sake may do now."""
        for name in sorted(self._refused):
            entry = self._known[name]
            if not self._why_not(entry):
                self._take(entry, self._connections.replace)

    def _take(self, entry: InstanceEntry, how: Callable[[str, str], None]) -> None:
        try:
            how(entry.name, entry.address)
        except ConfigError as exc:  # such as one on another host, and no secret here
            log.warning("%s is not used: %s", entry.name, exc.message)
            self._connections.refuse(entry.name, exc.message)
            self._refused.add(entry.name)
        else:
            self._refused.discard(entry.name)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
