"""One service process: core, engine processes, HTTP server, how they start and stop together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from penstock.protocol.errors import EngineUnavailable, StartupError
from penstock.registry.embedded import RegistryServer
from penstock.registry.open import open_registry
from penstock.repeats import OneASecond
from penstock.service.assemble import build_app, build_core, open_tape, policy_name
from penstock.service.cluster.cluster import Alone, AmongOthers
from penstock.service.cluster.fleet import Fleet
from penstock.service.cluster.roster import FolderRoster, LocalRoster, NobodyHere, Roster
from penstock.service.config import ServeConfig
from penstock.service.connection import Connection
from penstock.service.driver import ServiceDriver
from penstock.service.listener import bound, private_listener, url_of
from penstock.service.siblings import Siblings, ready_file, socket_of
from penstock.trace import open_trace

log = logging.getLogger(__name__)
logging.getLogger("uvicorn.error").addFilter(OneASecond("Invalid HTTP request received."))

#: What an engine that has fallen silent gets to attach anew, before it is killed.
_ANSWER_S = 2.0
#: After the drain: how long engines get to stop, and uvicorn to close what is left.
_STOP_S = 5.0


class _Server(uvicorn.Server):
    """Signals belong to the service: uvicorn would die of them before the engines are stopped."""

    def __init__(self, config: uvicorn.Config, private: Sequence[socket.socket]) -> None:
        """`private`: served besides, and never with TLS, whatever the public socket speaks."""
        super().__init__(config)
        self._private = private

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        for listener in self._private:
            self.servers.append(await loop.create_server(self._protocol, sock=listener))

    def _protocol(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(config: ServeConfig, on_ready: Callable[[str], None] = lambda _: None) -> int:
    """Serve until SIGTERM or SIGINT; `on_ready(url)` once a real token has been produced.

    Raises `StartupError` (also when the engine cannot be started). Returns the exit code.
    """
    if config.cluster.api_workers > 1:
        from penstock.service.api_workers import serve_with_workers

        return serve_with_workers(config, on_ready)
    with bound(config) as listener, asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(config, listener, on_ready))


async def _serve(
    config: ServeConfig, listener: socket.socket, on_ready: Callable[[str], None]
) -> int:
    service = _Service(config, listener, on_ready)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    try:
        return await service.run()
    finally:
        await service.close()


class _Service:
    def __init__(
        self, config: ServeConfig, listener: socket.socket, on_ready: Callable[[str], None]
    ) -> None:
        self._config = config
        self._listener = listener
        self._on_ready = on_ready
        self._announced = False
        self._failure: str | None = None
        self._registry_server: RegistryServer | None = None
        self._cluster: Alone | AmongOthers | None = None
        roster = self._roster_of(config)
        self._tape = open_tape(config)
        # First: they take longest, and load while the rest is set up.
        self._fleet = Fleet(
            0 if config.engine_addresses or config.cluster.registry else config.cluster.instances,
            config.worker_args,
            config.restart,
            on_ended=self._engine_ended,
            on_failed=self._fleet_failed,
            on_drained=self._engine_drained,
            roster=roster,
            share_weights=config.cluster.shares_weights,
            spare_engine=config.cluster.spare_engine,
        )
        self._fleet.start()
        core = build_core(config, self._tape)
        self.driver = ServiceDriver(
            core,
            on_active=self._attached,
            on_lost=self._silent,
            on_broken=lambda exc: self._fail(f"the service is broken: {exc}"),
            trace=open_trace(config.trace, "service"),
            roster=roster,
        )
        self.driver.facts |= {
            "policy": policy_name(config.cluster),
            "ttft_slo_s": config.cluster.ttft_slo_s,
            "tpot_slo_s": config.cluster.tpot_slo_s,
        }
        self._private: list[socket.socket] = []
        application = self._application()
        self._server = _Server(_uvicorn_config(config, application), self._private)

    def _roster_of(self, config: ServeConfig) -> Roster:
        cluster = config.cluster
        if cluster.engines_return:
            assert cluster.api_worker_folder is not None
            return FolderRoster(Path(cluster.api_worker_folder))
        if config.engine_addresses or cluster.registry:
            return NobodyHere()
        roster = LocalRoster()
        roster.on_change = lambda: self._fleet.follow_roster()
        return roster

    def _application(self) -> ASGIApp:
        app, cluster = build_app(self.driver, self._config), self._config.cluster
        if cluster.api_worker is None:
            return app
        assert cluster.api_worker_folder is not None
        folder, number = cluster.api_worker_folder, cluster.api_worker
        self._private.append(private_listener(socket_of(folder, number)))
        return Siblings(app, folder, number)

    # --- engines -------------------------------------------------------------------------------

    def _connect(self) -> None:
        for name, worker in self._fleet.workers.items():
            self.driver.core.expect(name, True)
            self.driver.connect(name, worker.address)
        for number, address in enumerate(self._config.engine_addresses):
            self.driver.connect(f"engine-{number}", address)
        core, registry = self.driver.core.config, self._config.cluster.registry
        if registry is None:
            self._cluster = Alone(self.driver, core.name)
            return
        self.driver.nobody = "no worker has registered"
        if self._config.cluster.offers_registry:
            self._registry_server = RegistryServer(self._config.cluster.registry_address)
            log.info("the registry of this cluster is at %s", registry)
        self._cluster = AmongOthers(
            open_registry(registry),
            self.driver,
            name=core.name,
            incarnation=core.incarnation,
            url=self._url(),
            they_return=self._config.cluster.engines_return,
            wanted=self._config.wanted,
        )

    def _attached(self, name: str) -> None:
        self._fleet.ready(name)
        # Whoever has been told to stop meanwhile listens no more, and is not ready for anything.
        if not self._announced and not self.driver.closing:
            self._announced = True
            self._on_ready(self._url())
            cluster = self._config.cluster
            if cluster.api_worker is not None and cluster.api_worker_folder is not None:
                ready_file(cluster.api_worker_folder, cluster.api_worker).touch()

    def _silent(self, name: str) -> None:
        """Perhaps it only has to attach anew. If it does not answer that either, it hangs, and its
        successor goes on with what it had; until then its requests wait."""
        out = self.driver.core.instances[name].is_out
        if not out and (name in self._fleet or self._config.cluster.engines_return):
            self.driver.core.expect(name, True)
        if name in self._fleet:
            self._fleet.kill_unless(name, lambda: self.driver.is_active(name), _ANSWER_S)

    def _engine_ended(self, name: str, starts_again: bool) -> None:
        if name in self.driver.core.instances:
            self.driver.instance_lost(name, starts_again)

    def _engine_drained(self, name: str) -> None:
        self.driver.operations.follow_roster()

    def _fleet_failed(self, reason: str) -> None:
        # Where the end has been asked for already, it is no failure to start.
        if self._announced or not self.driver.closing:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self.stop()

    # --- start and stop ------------------------------------------------------------------------

    async def run(self) -> int:
        self._connect()
        if self._failure is None:
            await self._server.serve(sockets=[self._listener])
        if self._failure is not None:
            raise StartupError(self._failure)
        return 0

    def stop(self) -> None:
        """Take nothing new, finish what runs within the drain time. Twice: stop now."""
        if self.driver.closing:
            self._server.force_exit = True
        self.driver.refuse_new()
        self._server.should_exit = True
        if self._failure is not None:
            # Nothing will answer any more: who waits gets the reason instead of a closed socket.
            self.driver.end_all(EngineUnavailable(self._failure))

    async def close(self) -> None:
        if self._cluster is not None:
            await self._cluster.close()
        self.driver.close(EngineUnavailable("the server was stopped before the request finished"))
        self._tape.close()
        if self._registry_server is not None:
            self._registry_server.close()
        await self._fleet.stop(_STOP_S)

    def _url(self) -> str:
        return url_of(self._config, self._listener)


def _uvicorn_config(config: ServeConfig, app: ASGIApp) -> uvicorn.Config:
    tls = config.tls
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,  # its lines look like ours
        log_level="warning",
        timeout_graceful_shutdown=max(1, int(config.drain_timeout_s)),
        ssl_keyfile=tls.ssl_keyfile,
        ssl_certfile=tls.ssl_certfile,
        ssl_ca_certs=tls.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls.ssl_ca_certs else ssl.CERT_NONE,
    )


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform
        return asyncio.new_event_loop
    return uvloop.new_event_loop
