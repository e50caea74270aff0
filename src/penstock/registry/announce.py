"""An engine says where it is: a thread with a loop of its own, beside the driver and never in its
way."""

from __future__ import annotations

import asyncio
import logging
import threading

import msgspec

from penstock.registry.base import INSTANCES, InstanceEntry
from penstock.registry.open import open_registry
from penstock.registry.registry import LEASE_S

log = logging.getLogger(__name__)

#: What taking the entry away may take; after that its lease ends by itself.
_CLOSE_S = 2.0


class Announcer:
    """Registered from here until `close`. Raises `ConfigError` for a URL that says nothing."""

    def __init__(self, url: str, entry: InstanceEntry, ttl_s: float = LEASE_S) -> None:
        self._url = url
        self._entry = entry
        self._ttl_s = ttl_s
        open_registry(url)  # a mistake is said here, in the caller's thread
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="penstock-registry", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._stay())
        except Exception:
            log.exception("the engine cannot register any more")
        finally:
            self._loop.close()

    async def _stay(self) -> None:
        registry = open_registry(self._url)
        value = msgspec.json.encode(self._entry)
        registration = registry.register(INSTANCES + self._entry.name, value, self._ttl_s)
        await self._stop.wait()
        await registration.close()
        await registry.close()

    def close(self) -> None:
        """May be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_CLOSE_S)


class NoAnnouncer:
    """Of an instance whose services know where it is."""

    def close(self) -> None:
        return None
