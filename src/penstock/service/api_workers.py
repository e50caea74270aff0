"""--api-workers N: processes that share one port and the same engines, under one parent.

The parent owns the engines and a private registry, and answers no requests; each worker is a router
like any other. So what holds for several routers holds for workers: engines serve all of them, one
leads, and when one dies its engines free what it ran while the others notice nothing.

Over TCP every worker has a listening socket of its own on the shared port (SO_REUSEPORT): the
kernel spreads connections over those that are there, and what one that dies had not accepted yet is
reset with it. A Unix socket is inherited instead, since no two can be bound to a path.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from penstock.protocol.errors import StartupError
from penstock.registry.base import INSTANCES, Deleted, Listing, Put
from penstock.registry.embedded import RegistryServer
from penstock.registry.open import open_registry
from penstock.service.cluster.fleet import Fleet
from penstock.service.cluster.folders import SocketFolder
from penstock.service.cluster.roster import FolderRoster
from penstock.service.cluster.supervisor import Process
from penstock.service.config import RestartPolicy, ServeConfig
from penstock.service.listener import bound, url_of
from penstock.service.siblings import ready_file

log = logging.getLogger(__name__)

#: What an engine whose entry has ended gets to register again, before it is killed.
_ANSWER_S = 2.0
_STOP_S = 5.0
_LOOK_S = 0.05


def serve_with_workers(config: ServeConfig, on_ready: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT. Raises `StartupError`; returns the exit code."""
    from penstock.service.app import loop_factory

    with bound(config, listens=False) as held, asyncio.Runner(loop_factory=loop_factory()) as run:
        return run.run(_serve(config, held, on_ready))


async def _serve(config: ServeConfig, held: socket.socket, on_ready: Callable[[str], None]) -> int:
    parent = _Parent(config, held, on_ready)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, parent.stop)
    try:
        return await parent.run()
    finally:
        await parent.close()


def _without_registry(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--registry":
            next(words, None)
        elif not word.startswith("--registry="):
            kept.append(word)
    return kept


class ApiWorker(Process):
    """A router process on the shared port."""

    kind = "API worker"

    def __init__(
        self,
        number: int,
        arguments: tuple[str, ...],
        ready_file: Path,
        inherits: socket.socket | None,
        policy: RestartPolicy,
        on_exit: Callable[[str, int, bool], None],
        registry: str,
    ) -> None:
        super().__init__(f"api-{number}", policy, on_exit)
        self._registry = registry
        self._arguments = arguments
        self._inherits = inherits
        self.ready_file = ready_file

    def arguments(self) -> list[str]:
        self.ready_file.unlink(missing_ok=True)
        return ["router", *self._arguments, "--stop-with-parent"]

    def environment(self) -> dict[str, str]:
        """With the registry's URL, whose password is for no command line."""
        return os.environ | {"PENSTOCK_REGISTRY": self._registry}

    def inherited(self) -> tuple[int, ...]:
        return () if self._inherits is None else (self._inherits.fileno(),)


class _Parent:
    def __init__(
        self, config: ServeConfig, held: socket.socket, on_ready: Callable[[str], None]
    ) -> None:
        self._config = config
        self._held = held
        self._on_ready = on_ready
        self._failure: str | None = None
        self._stopped = asyncio.Event()
        self._now = asyncio.Event()
        self._announced = False
        #: Engines that are registered.
        self._known: set[str] = set()
        self._folder = SocketFolder()
        self._server = self._registry_server()
        self._registry_url = self._url_for_workers()
        engines = 0 if config.engine_addresses or config.cluster.registry else (
            config.cluster.instances
        )  # fmt: skip
        self._fleet = Fleet(
            engines,
            (*config.worker_args, f"--registry={self._registry_url}"),
            config.restart,
            on_ended=lambda name, again: None,  # the workers see it themselves
            on_failed=self._fail,
            roster=FolderRoster(self._folder.path),
            share_weights=config.cluster.shares_weights,
            spare_engine=config.cluster.spare_engine,
        )
        self._workers = [self._worker(number) for number in range(config.cluster.api_workers)]

    def _registry_server(self) -> RegistryServer | None:
        """None where there is a registry of others already."""
        cluster = self._config.cluster
        if cluster.offers_registry:
            return RegistryServer(cluster.registry_address)
        if cluster.registry is None:
            return RegistryServer(f"ipc://{self._folder.path}/registry.sock")
        return None

    def _url_for_workers(self) -> str:
        cluster = self._config.cluster
        return cluster.registry or f"penstock+ipc://{self._folder.path}/registry.sock"

    def _worker(self, number: int) -> ApiWorker:
        config, uds = self._config, self._config.uds is not None
        words = [
            *_without_registry(config.arguments),
            *("--api-workers", "1", "--instances", "1", "--no-banner"),
            *(f"--api-worker={number}", f"--api-worker-folder={self._folder.path}"),
        ]
        if uds:
            words += ["--inherited-socket", str(self._held.fileno())]
        else:
            words += ["--port", str(self._held.getsockname()[1]), "--reuse-port"]
        return ApiWorker(
            number,
            tuple(words),
            ready_file(str(self._folder.path), number),
            self._held if uds else None,
            config.restart,
            self._worker_ended,
            self._registry_url,
        )

    # --- what happens --------------------------------------------------------------------------

    def _worker_ended(self, name: str, code: int, again: bool) -> None:
        if not again and not any(worker.running for worker in self._workers):
            self._fail(f"{name} keeps failing (exit code {code}): its reason is above")

    async def _watch_engines(self) -> None:
        """An engine whose entry has ended without its process hangs, or soon registers again."""
        registry = open_registry(self._registry_url)
        try:
            async for event in registry.watch(INSTANCES):
                gone: set[str] = set()
                match event:
                    case Listing(entries=entries):
                        gone = self._known - entries.keys()
                        self._known = set(entries)
                    case Put(key=key):
                        self._known.add(key)
                    case Deleted(key=key):
                        gone = {key}
                        self._known.discard(key)
                for name in self._known:
                    self._fleet.ready(name)
                for name in sorted(gone & self._fleet.workers.keys()):
                    self._fleet.kill_unless(name, partial(self._is_known, name), _ANSWER_S)
        finally:
            await registry.close()

    def _is_known(self, name: str) -> bool:
        return name in self._known

    async def _watch_workers(self) -> None:
        while True:
            self._fleet.follow_roster()
            for worker in self._workers:
                if worker.running and worker.ready_file.exists():
                    worker.ready()
                    if not self._announced:
                        self._announced = True
                        self._on_ready(url_of(self._config, self._held))
            await asyncio.sleep(_LOOK_S)

    def _fail(self, reason: str) -> None:
        if not self._stopped.is_set():
            self._failure = reason
            self._stopped.set()

    def stop(self) -> None:
        """Workers drain. Twice: now."""
        if self._stopped.is_set():
            self._now.set()
        self._stopped.set()

    # --- start and stop ------------------------------------------------------------------------

    async def run(self) -> int:
        self._fleet.start()
        for worker in self._workers:
            worker.start()
        watching = [asyncio.ensure_future(self._watch_workers())]
        if self._fleet.workers:
            watching.append(asyncio.ensure_future(self._watch_engines()))
        await self._stopped.wait()
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        if self._failure is not None:
            raise StartupError(self._failure)
        return 0

    async def close(self) -> None:
        drain_s = _STOP_S if self._failure else self._config.drain_timeout_s + _STOP_S
        stopping = asyncio.ensure_future(self._stop_workers(drain_s))
        hurry = asyncio.ensure_future(self._now.wait())
        await asyncio.wait([stopping, hurry], return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            for worker in self._workers:
                worker.kill()
        await stopping
        hurry.cancel()
        await self._fleet.stop(_STOP_S)
        if self._server is not None:
            self._server.close()
        self._folder.remove()

    async def _stop_workers(self, timeout_s: float) -> None:
        await asyncio.gather(*(worker.stop(timeout_s) for worker in self._workers))
