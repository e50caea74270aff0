"""A router over mock engines, in the test's own loop, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from tests.helpers.mock_openai import MockEngine

from penstock.service.foreign.config import RouterConfig
from penstock.service.foreign.router import Router
from penstock.service.foreign.watch import Watch


@dataclass
class Live:
    router: Router
    watch: Watch
    port: int

    async def look(self) -> None:
        """One round of health checks, now."""
        for engine in self.router.fleet.engines:
            await self.watch.check(engine)


@contextlib.asynccontextmanager
async def live_router(*engines: MockEngine, **settings: Any) -> AsyncIterator[Live]:
    """Ready: each engine has been asked for its models. Deadlines are looked at often."""
    settings.setdefault("health_every_s", 0.05)
    settings.setdefault("health_timeout_s", 0.3)
    config = RouterConfig(engines=tuple(e.url for e in engines), **settings)
    router = Router(config)
    watch = Watch(router.fleet, config)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(router.connection, "127.0.0.1", 0, backlog=2048)
    port = server.sockets[0].getsockname()[1]

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.02)
            router.tick()

    ticking = asyncio.create_task(tick())
    watch.start()
    try:
        async with asyncio.timeout(10):
            while any(e.models is None for e in router.fleet.engines):
                await asyncio.sleep(0.01)
        yield Live(router, watch, port)
    finally:
        ticking.cancel()
        router.drain()
        server.close()
        await watch.stop()
        await router.finished(0.0)
