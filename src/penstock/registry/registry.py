"""What processes do with a registry: stay registered, watch, campaign. The same for every kind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, ClassVar

from penstock.registry.base import LEADER, ROOT, Deleted, Event, Listing, Put, RegistryGone, Store

log = logging.getLogger(__name__)

#: A registration that nobody renews ends after this. etcd's shortest is about two seconds.
LEASE_S = 3.0
#: Between two tries while the registry does not answer.
_RETRY_S = 0.5
#: A task of ours ends at once when told to; after this it is left behind, with a word.
_CLOSE_S = 5.0
#: Terms are at least the seconds since this moment: they grow even when a registry has lost all it
#: knew, as an embedded one has after a restart. (2024-01-01; terms stay below 2**31 until 2092.)
_TERMS_BEGIN_S = 1_704_067_200


def first_term() -> int:
    """The least term that anybody may have who begins to lead now."""
    return int(time.time()) - _TERMS_BEGIN_S


class Registry:
    """A store, and this cluster's folder in it. Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        url: str,
        cluster: str = "default",
        first_term: Callable[[], int] = first_term,
    ) -> None:
        self.url = url
        self._first_term = first_term
        self._store = store
        self._root = f"{ROOT}/{cluster}/"

    def register(self, key: str, value: bytes, ttl_s: float = LEASE_S) -> Registration:
        """Keep `key` there for as long as this process lives, whatever happens to the registry."""
        return Registration(self._store, self._root + key, value, ttl_s, self.url)

    async def watch(self, prefix: str) -> AsyncGenerator[Event, None]:
        """A `Listing` first, then changes; another `Listing` whenever something may have been
        missed. Never ends, and is silent while the registry is gone. Keys are below `prefix`."""
        full, trouble = self._root + prefix, _Trouble(self.url)
        while True:
            try:
                async with contextlib.aclosing(self._store.watch(full)) as events:
                    async for event in events:
                        trouble.over()
                        yield _below(full, event)
            except RegistryGone as exc:
                trouble.say(exc)
            await asyncio.sleep(_RETRY_S)

    def campaign(
        self,
        value: bytes,
        on_change: Callable[[int | None], None],
        ttl_s: float = LEASE_S,
        name: str = LEADER,
    ) -> Campaign:
        """Lead whenever nobody else does. `on_change(term)`, and `on_change(None)` at the latest
        when somebody else could begin to lead."""
        return Campaign(
            self._store, self._root + name, value, on_change, ttl_s, self.url, self._first_term
        )

    async def put(self, key: str, value: bytes) -> None:
        await self._store.put(self._root + key, value)

    async def get(self, key: str) -> bytes | None:
        return await self._store.get(self._root + key)

    async def close(self) -> None:
        await self._store.close()


def _below(prefix: str, event: Event) -> Event:
    cut = len(prefix)
    match event:
        case Listing(entries=entries):
            return Listing({key[cut:]: value for key, value in entries.items()})
        case Put(key=key, value=value):
            return Put(key[cut:], value)
        case Deleted(key=key):
            return Deleted(key[cut:])


class _Trouble:
    """Said once when it begins and once when it is over, not at every try, nor by everybody in this
    process who has to do with the same registry."""

    _having: ClassVar[dict[str, weakref.WeakSet[_Trouble]]] = {}

    def __init__(self, url: str) -> None:
        self._url = url
        self._all = self._having.setdefault(url, weakref.WeakSet())

    def say(self, exc: RegistryGone) -> None:
        if not self._all:
            log.warning("%s; going on with what is known", exc)
        self._all.add(self)

    def over(self) -> None:
        if self in self._all:
            self._all.discard(self)
            if not self._all:
                log.info("the registry %s answers again", self._url)


class Registration:
    """A key that is put again when its lease has ended. `close` takes it away."""

    def __init__(self, store: Store, key: str, value: bytes, ttl_s: float, url: str) -> None:
        self._store = store
        self._url = url
        self._key = key
        self._value = value
        self._ttl_s = ttl_s
        self._lease: int | None = None
        #: Set once it has stood for the first time.
        self.standing = asyncio.Event()
        self._task = _lasting(self._keep(), f"the registration of {key}")

    async def _keep(self) -> None:
        trouble = _Trouble(self._url)
        while True:
            try:
                await self._renew()
                trouble.over()
                self.standing.set()
                await asyncio.sleep(self._ttl_s / 3)
            except RegistryGone as exc:
                trouble.say(exc)
                await asyncio.sleep(_RETRY_S)

    async def _renew(self) -> None:
        if self._lease is not None and await self._store.keep_alive(self._lease):
            return
        if self._lease is not None:
            log.warning("the lease of %s had ended; registering again", self._key)
        self._lease = None
        lease = await self._store.grant(self._ttl_s)
        if await self._store.put(self._key, self._value, lease):
            self._lease = lease

    async def close(self) -> None:
        await _cancelled(self._task)
        if self._lease is not None:
            with contextlib.suppress(RegistryGone):  # it will end by itself
                await self._store.revoke(self._lease)


class Campaign:
    """One candidate. Leadership is held under a lease and given up, by this process's own clock,
    before the lease can have ended on the registry's side."""

    def __init__(
        self,
        store: Store,
        key: str,
        value: bytes,
        on_change: Callable[[int | None], None],
        ttl_s: float,
        url: str,
        first_term: Callable[[], int] = first_term,
    ) -> None:
        self._store = store
        self._url = url
        self._key = key
        self._value = value
        self._on_change = on_change
        self._ttl_s = ttl_s
        self._first_term = first_term
        self._lease: int | None = None
        #: Of a leadership given up while the registry was gone: there it may still hold the key.
        self._former: int | None = None
        self.term: int | None = None
        self._task = _lasting(self._run(), f"the campaign for {key}")

    async def _run(self) -> None:
        trouble = _Trouble(self._url)
        while True:
            try:
                await self._win()
                trouble.over()
                await self._hold()
            except RegistryGone as exc:
                trouble.say(exc)
                await asyncio.sleep(_RETRY_S)

    async def _win(self) -> None:
        """Returns as the leader."""
        await self._end_former()
        while True:
            if self._lease is None or not await self._store.keep_alive(self._lease):
                self._lease = await self._store.grant(self._ttl_s)
            self._asked_s = _now()
            term = await self._store.acquire(
                self._key, self._value, self._lease, self._first_term()
            )
            # The lease may be older than this very moment: renew it before counting on it.
            if term is not None and await self._renewed():
                self._change(term)
                return
            await asyncio.sleep(self._ttl_s / 6)

    async def _end_former(self) -> None:
        """Nobody, this candidate included, should have to wait until it ends by itself."""
        if self._former is not None:
            await self._store.revoke(self._former)
            self._former = None

    async def _renewed(self) -> bool:
        asked_s = _now()
        assert self._lease is not None
        if not await self._store.keep_alive(self._lease):
            return False
        self._asked_s = asked_s
        return True

    async def _hold(self) -> None:
        """Returns when no longer the leader."""
        try:
            while True:
                await asyncio.sleep(self._ttl_s / 6)
                left_s = self._asked_s + self._ttl_s * 5 / 6 - _now()
                try:
                    # (Not wait_for: until Python 3.12 it may swallow a cancellation.)
                    async with asyncio.timeout(max(0.0, left_s)):
                        renewed = await self._renewed()
                    if not renewed:
                        self._lease = None
                        return
                except TimeoutError:
                    self._former, self._lease = self._lease, None
                    return
                except RegistryGone:
                    continue  # until the time is up
        finally:
            self._change(None)

    def _change(self, term: int | None) -> None:
        if term != self.term:
            self.term = term
            self._on_change(term)

    async def close(self) -> None:
        await _cancelled(self._task)
        with contextlib.suppress(RegistryGone):  # they will end by themselves
            await self._end_former()
            if self._lease is not None:
                await self._store.revoke(self._lease)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _lasting(work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
    """A task that ends only when it is cancelled, or with a word in the log."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("%s has failed", what, exc_info=task.exception())

    task = asyncio.ensure_future(work)
    task.add_done_callback(ended)
    return task


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=_CLOSE_S)
    if not task.done():
        log.error("%s does not end", task)
