"""One service process: core, engine processes, HTTP server, how they start and stop together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from penstock.checkpoint import resolve
from penstock.protocol.errors import ConfigError, EngineUnavailable, StartupError
from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.cluster.supervisor import Worker
from penstock.service.config import ServeConfig
from penstock.service.connection import Connection
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.driver import ServiceDriver
from penstock.service.text.texts import Texts
from penstock.trace import open_trace

log = logging.getLogger(__name__)

#: What an engine that has fallen silent gets to attach anew, before it is killed.
_ANSWER_S = 2.0
#: After the drain: how long engines get to stop, and uvicorn to close what is left.
_STOP_S = 5.0


class _Server(uvicorn.Server):
    """Signals belong to the service: uvicorn would die of them before the engines are stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(config: ServeConfig, on_ready: Callable[[str], None] = lambda _: None) -> int:
    """Serve until SIGTERM or SIGINT; `on_ready(url)` once a real token has been produced.

    Raises `StartupError` (also when the engine cannot be started). Returns the exit code.
    """
    with _bound(config) as listener:
        runner = asyncio.Runner(loop_factory=_loop_factory())
        with runner:
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
        self._workers: dict[str, Worker] = {}
        self._start_engines()  # first: they take longest, and load while the rest is set up
        core = ServiceCore(
            ServiceCoreConfig(
                name=config.name or f"{socket.gethostname()}-{os.getpid()}",
                # Grows with each start of the same name, as engines expect of it.
                incarnation=time.time_ns(),
                max_queue=config.max_queue,
                suspect_after_s=config.heartbeat_timeout_s / 2,
                lost_after_s=config.heartbeat_timeout_s,
            )
        )
        self.driver = ServiceDriver(
            core,
            on_active=self._attached,
            on_lost=self._silent,
            on_broken=lambda exc: self._fail(f"the service is broken: {exc}"),
            trace=open_trace(config.trace, "service"),
        )
        checkpoint = resolve(config.model, revision=config.revision)
        texts = Texts.from_checkpoint(
            checkpoint,
            chat_template=config.chat_template,
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        )
        app = create_app(
            self.driver,
            texts,
            ApiConfig(
                served_model_names=config.served_model_names,
                api_keys=config.api_keys,
                max_body_bytes=config.max_body_bytes,
                seed=config.seed,
                generation_config=checkpoint.generation_config,
                log_requests=config.log_requests,
                trust_request_chat_template=config.trust_request_chat_template,
            ),
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="warning",
                timeout_graceful_shutdown=max(1, int(config.drain_timeout_s)),
            )
        )

    # --- engines -------------------------------------------------------------------------------

    def _start_engines(self) -> None:
        config = self._config
        if config.engine_addresses:
            return
        worker = Worker("engine-0", config.worker_args, config.restart, self._engine_ended)
        self._workers[worker.name] = worker
        worker.start()

    def _connect(self) -> None:
        for name, worker in self._workers.items():
            self.driver.core.expect(name, True)
            self.driver.connect(name, worker.address)
        for number, address in enumerate(self._config.engine_addresses):
            self.driver.connect(f"engine-{number}", address)

    def _attached(self, name: str) -> None:
        if name in self._workers:
            self._workers[name].ready()
        # Whoever has been told to stop meanwhile listens no more, and is not ready for anything.
        if not self._announced and not self.driver.closing:
            self._announced = True
            self._on_ready(self._url())

    def _silent(self, name: str) -> None:
        """Perhaps it only has to attach anew. If it does not answer that either, it hangs, and its
        successor goes on with what it had; until then its requests wait."""
        if name not in self._workers:
            return
        incarnation = self._workers[name].incarnation

        def kill() -> None:
            worker = self._workers[name]
            if worker.incarnation == incarnation and not self.driver.is_active(name):
                worker.kill()

        self.driver.core.expect(name, True)
        asyncio.get_running_loop().call_later(_ANSWER_S, kill)

    def _engine_ended(self, name: str, code: int, starts_again: bool) -> None:
        if not self._announced:
            # It never ran: trying the same again will not help, and it has said why. Where the end
            # has been asked for already, it is no failure.
            if not self.driver.closing:
                self._fail(f"the engine did not start (exit code {code}): its reason is above")
            return
        self.driver.instance_lost(name, starts_again)
        if not starts_again:
            self._fail(f"engine {name} keeps failing; giving up")

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
        self.driver.close(EngineUnavailable("the server was stopped before the request finished"))
        await asyncio.gather(*(worker.stop(_STOP_S) for worker in self._workers.values()))

    def _url(self) -> str:
        if self._config.uds is not None:
            return f"unix:{self._config.uds}"
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
        return f"http://{host}:{port}"


def _bind(config: ServeConfig) -> socket.socket:
    """Taken before anything is loaded: a busy port is better known now than in a minute."""
    _raise_file_limit()
    where = config.uds or f"{config.host}:{config.port}"
    if config.uds is not None:
        _make_way(Path(config.uds))
        listener = socket.socket(socket.AF_UNIX)
        address: object = config.uds
    else:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = (config.host, config.port)
    try:
        listener.bind(address)  # type: ignore[arg-type]
        listener.listen(4096)
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot listen on {where}: {exc.strerror or exc}") from exc
    listener.setblocking(False)
    return listener


def _make_way(uds: Path) -> None:
    """A socket that a dead server left is replaced; nothing else is."""
    if not uds.exists():
        return
    if not uds.is_socket():
        raise ConfigError(f"--uds {uds} exists and is no socket: give another path")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(uds)) == 0:
            raise ConfigError(f"another server listens on {uds}: stop that, or give another --uds")
    uds.unlink()


@contextlib.contextmanager
def _bound(config: ServeConfig) -> Iterator[socket.socket]:
    """`_bind` for the time of the block. A Unix socket's file goes with us, if it is still ours."""
    with _bind(config) as listener:
        path = Path(config.uds) if config.uds is not None else None
        ours = path.stat().st_ino if path is not None else 0
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if path is not None and path.stat().st_ino == ours:
                    path.unlink()


def _raise_file_limit() -> None:
    """Each connection is a file: the soft limit of 1024 is a limit on users."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform
        return asyncio.new_event_loop
    return uvloop.new_event_loop
