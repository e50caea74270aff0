"""A registry within one process, for any of its threads and loops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from penstock.registry.base import Event, Listing
from penstock.registry.leases import Leases

_R = TypeVar("_R")
#: Leases also end while nobody calls.
_LOOK_S = 0.1

_lock = threading.Lock()
_named: dict[str, _Shared] = {}


class _Shared:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.leases = Leases()
        self.watchers: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Queue[Event]]] = []

    def call(self, act: Callable[[Leases, float], _R]) -> _R:
        with self.lock:
            result = act(self.leases, time.monotonic())
            self.publish()
            return result

    def publish(self) -> None:
        for event in self.leases.changes:
            for prefix, loop, queue in self.watchers:
                if event.key.startswith(prefix):
                    loop.call_soon_threadsafe(queue.put_nowait, event)
        self.leases.changes.clear()


class MemoryStore:
    """Stores of one name share what is in them."""

    def __init__(self, name: str) -> None:
        with _lock:
            self._shared = _named.setdefault(name, _Shared())

    async def grant(self, ttl_s: float) -> int:
        return self._shared.call(lambda leases, now: leases.grant(ttl_s, now))

    async def keep_alive(self, lease: int) -> bool:
        return self._shared.call(lambda leases, now: leases.keep_alive(lease, now))

    async def revoke(self, lease: int) -> None:
        self._shared.call(lambda leases, now: leases.revoke(lease))

    async def put(self, key: str, value: bytes, lease: int | None = None) -> bool:
        return self._shared.call(lambda leases, now: leases.put(key, value, lease, now))

    async def get(self, key: str) -> bytes | None:
        return self._shared.call(lambda leases, now: leases.get(key, now))

    async def delete(self, key: str) -> None:
        self._shared.call(lambda leases, now: leases.delete(key))

    async def acquire(self, key: str, value: bytes, lease: int, at_least: int) -> int | None:
        return self._shared.call(
            lambda leases, now: leases.acquire(key, value, lease, at_least, now)
        )

    async def watch(self, prefix: str) -> AsyncGenerator[Event, None]:
        queue: asyncio.Queue[Event] = asyncio.Queue()
        shared = self._shared
        watcher = (prefix, asyncio.get_running_loop(), queue)

        def begin(leases: Leases, now: float) -> Listing:
            found = Listing(leases.listing(prefix, now))
            shared.publish()  # what `listing` has let expire is before it
            shared.watchers.append(watcher)
            return found

        yield shared.call(begin)
        try:
            while True:
                try:
                    async with asyncio.timeout(_LOOK_S):
                        event = await queue.get()
                except TimeoutError:
                    shared.call(lambda leases, now: leases.expire(now))
                    continue
                yield event
        finally:
            with shared.lock:
                shared.watchers.remove(watcher)

    async def close(self) -> None:
        return None
