"""A service among others: what it has to do with the registry from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from functools import partial
from typing import Protocol

import msgspec

from penstock import __version__
from penstock.registry.base import LEADER, ROUTERS, Deleted, Listing, Put, RouterEntry
from penstock.registry.registry import Registry, first_term
from penstock.service.cluster.fit import ANYTHING, Wanted
from penstock.service.cluster.membership import Connections, Membership


class Service(Connections, Protocol):
    """The driver, as far as it is concerned here."""

    #: For /admin: who else there is, and who leads.
    facts: dict[str, object]

    def lead(self, term: int | None, *, elected: bool = False) -> None: ...


class Alone:
    """No registry: this service leads the instances that it was told of."""

    def __init__(self, service: Service, name: str) -> None:
        service.facts |= {"routers": [name], "leader": name}
        service.lead(first_term())

    async def close(self) -> None:
        return None


class AmongOthers:
    """Follows the instances of a registry, is listed in it, and leads whenever nobody else does."""

    def __init__(
        self,
        registry: Registry,
        service: Service,
        *,
        name: str,
        incarnation: int,
        url: str,
        they_return: bool = False,
        wanted: Wanted = ANYTHING,
    ) -> None:
        self._service = service
        self._routers: dict[str, bytes] = {}
        self._registry = registry
        entry = RouterEntry(
            name=name,
            incarnation=incarnation,
            pid=os.getpid(),
            hostname=socket.gethostname(),
            url=url,
            version=__version__,
        )
        service.facts |= {"routers": [name], "leader": None}
        self._membership = Membership(registry, service, they_return=they_return, wanted=wanted)
        self._registration = registry.register(ROUTERS + name, msgspec.json.encode(entry))
        self._campaign = registry.campaign(name.encode(), partial(service.lead, elected=True))
        self._tasks = [
            asyncio.ensure_future(task) for task in (self._see_routers(), self._see_leader())
        ]

    async def _see_routers(self) -> None:
        async for event in self._registry.watch(ROUTERS):
            match event:
                case Listing(entries=entries):
                    self._routers = dict(entries)
                case Put(key=key, value=value):
                    self._routers[key] = value
                case Deleted(key=key):
                    self._routers.pop(key, None)
            self._service.facts["routers"] = sorted(self._routers)

    async def _see_leader(self) -> None:
        async for event in self._registry.watch(LEADER):
            match event:
                case Listing(entries=entries):
                    self._leader_is(entries.get(""))
                case Put(key="", value=value):
                    self._leader_is(value)
                case Deleted(key=""):
                    self._leader_is(None)

    def _leader_is(self, name: bytes | None) -> None:
        self._service.facts["leader"] = name.decode(errors="replace") if name else None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._membership.close()
        await asyncio.gather(self._campaign.close(), self._registration.close())
        await self._registry.close()
