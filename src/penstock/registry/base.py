"""What a registry is: where processes of one cluster find each other, and agree on who leads.

A `Store` is what differs between kinds (memory, embedded, etcd): keys that end with a lease,
watches that begin with all there is, and one atomic step that decides an election. What a process
does with it (registering, staying registered, campaigning) is in `registry.py`, the same for all.

A registry is never in the way of a request. While it is gone everything goes on with what is known,
and what changed meanwhile is found when it is back.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import msgspec

#: Under this in every store; then the cluster's name, then what it is about.
ROOT = "/penstock"
INSTANCES = "instances/"
ROUTERS = "routers/"
LEADER = "leader"


class RegistryGone(ConnectionError):
    """The registry does not answer. Internal: whoever talks to it tries again."""


class InstanceEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as it is registered: enough to connect, and to know that one should not."""

    name: str
    #: Grows with each start of the same name: a newer one replaces the older at once.
    incarnation: int
    pid: int
    #: Where services attach, e.g. tcp://10.0.0.7:41234.
    address: str
    #: The host's boot id: what two instances that can share memory have in common.
    host: str
    hostname: str
    model: str
    model_digest: str
    layout_digest: str
    protocol_version: int
    #: Of Penstock, for people.
    version: str
    #: How it computes, in the words of the flags; "" and 0: it does not say.
    dtype: str = ""
    kv_cache_dtype: str = ""
    quantization: str = ""
    max_model_len: int = 0


class RouterEntry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    incarnation: int
    pid: int
    hostname: str
    url: str
    version: str


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything under the prefix at one moment; whatever was known before and is not in it has
    gone."""

    entries: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Deleted:
    key: str


Event = Listing | Put | Deleted


class Store(Protocol):
    """Every call raises `RegistryGone` when the registry does not answer in a second or two. Calls
    may be repeated: each has the same effect twice as once (a second grant only wastes a lease).
    """

    async def grant(self, ttl_s: float) -> int:
        """A new lease, which ends `ttl_s` after its last `keep_alive`."""

    async def keep_alive(self, lease: int) -> bool:
        """False: the lease has ended, and so have its keys."""

    async def revoke(self, lease: int) -> None:
        """End it now."""

    async def put(self, key: str, value: bytes, lease: int | None = None) -> bool:
        """False: the lease has ended, and nothing was put."""

    async def get(self, key: str) -> bytes | None: ...

    async def delete(self, key: str) -> None: ...

    async def acquire(self, key: str, value: bytes, lease: int, at_least: int) -> int | None:
        """Put `key` unless somebody has it, and count one term up, to `at_least` or more; the new
        term, or None. Whoever has it under this very lease gets the term again."""

    def watch(self, prefix: str) -> AsyncGenerator[Event, None]:
        """A `Listing`, then each change after it, in order and without gaps. Raises `RegistryGone`
        where that cannot be promised any more."""

    async def close(self) -> None: ...
