"""Runs a router: its socket, its signals, its end; and several of them on one port."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from penstock.protocol.errors import ConfigError, StartupError
from penstock.service.config import ClusterConfig, ServeConfig, TlsConfig
from penstock.service.foreign.config import RouterConfig
from penstock.service.foreign.router import TICK_S, Router
from penstock.service.foreign.watch import Watch
from penstock.service.listener import bound, url_of

log = logging.getLogger(__name__)
_BACKLOG = 4096
#: Ends of processes that nobody asked for, for each of them.
_MOST_FAILURES = 5
#: Engines that stand ready should be known before the first request.
_FIRST_LOOK_S = 2.0


Worker = Callable[[RouterConfig, int], None]


def run(
    config: RouterConfig, on_ready: Callable[[str], None] = lambda _: None, worker: Worker = print
) -> int:
    """Route until SIGTERM or SIGINT; `on_ready(url)` once requests are taken. With several
    workers, `worker(config, parent's pid)` is what each process runs, and calls `run_one`. Returns
    the exit code. Raises `ConfigError` where the address cannot be had."""
    alone = config.workers == 1
    with bound(_socket_of(config, shared=not alone), listens=alone) as listener:
        if alone:
            return _run(config, listener, on_ready)
        return _Workers(config, listener, worker).run(on_ready)


def run_one(config: RouterConfig) -> None:
    """One of several on a port."""
    with bound(_socket_of(config, shared=True)) as listener:
        _run(config, listener, lambda _: None)


def _run(config: RouterConfig, listener: socket.socket, on_ready: Callable[[str], None]) -> int:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve(config, listener, on_ready))


async def serve(
    config: RouterConfig, listener: socket.socket, on_ready: Callable[[str], None]
) -> int:
    loop = asyncio.get_running_loop()
    router = Router(config)
    watch = Watch(router.fleet, config)
    stop = asyncio.Event()
    force = asyncio.Event()

    def asked_to_stop() -> None:
        if stop.is_set():
            force.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop)
    watch.start()
    ticking = asyncio.create_task(_tick(router))
    await _first_look(router)
    gc.collect()
    gc.freeze()  # modules and settings stay: no collection need look at them again
    server = await loop.create_server(
        router.connection, sock=listener, backlog=_BACKLOG, ssl=_tls(config.tls)
    )
    on_ready(url_of(_socket_of(config, False), listener))
    try:
        await stop.wait()
    finally:
        router.drain()
        server.close()
        finishing = asyncio.create_task(router.finished(config.drain_timeout_s))
        forcing = asyncio.create_task(force.wait())
        await asyncio.wait({finishing, forcing}, return_when=asyncio.FIRST_COMPLETED)
        for task in (finishing, forcing, ticking):
            task.cancel()
        await watch.stop()
    return 0


def _tls(config: TlsConfig) -> ssl.SSLContext | None:
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=config.ssl_ca_certs)
    context.verify_mode = ssl.CERT_REQUIRED if config.ssl_ca_certs else ssl.CERT_NONE
    context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    return context


async def _tick(router: Router) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        router.tick()


async def _first_look(router: Router) -> None:
    for _ in range(int(_FIRST_LOOK_S / 0.02)):
        if all(e.state != "connecting" and e.models is not None for e in router.fleet.engines):
            return
        await asyncio.sleep(0.02)


def _socket_of(config: RouterConfig, shared: bool) -> ServeConfig:
    """What `service/listener.py` wants to know."""
    return ServeConfig(
        model="",
        served_model_names=("",),
        host=config.host,
        port=config.port,
        uds=config.uds,
        tls=config.tls,
        cluster=ClusterConfig(reuse_port=shared),
    )


# --- several processes ---------------------------------------------------------------------------


class _Workers:
    """The kernel deals connections out among processes that listen on one port (SO_REUSEPORT).
    This one holds the port without listening, starts them, and starts again what dies."""

    def __init__(self, config: RouterConfig, listener: socket.socket, work: Worker) -> None:
        if config.uds is not None:
            raise ConfigError("--api-workers needs a port: several processes cannot share --uds")
        self._url = url_of(_socket_of(config, shared=True), listener)
        self._config = replace(config, port=listener.getsockname()[1], workers=1)
        self._count = config.workers
        self._work = work
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, BaseProcess] = {}
        self._stopping = False
        self._failures = 0

    def run(self, on_ready: Callable[[str], None]) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        for place in range(self._count):
            self._start(place)
        self._wait_until_they_listen()
        on_ready(self._url)
        while self._processes:
            self._watch()
        if self._failures > _MOST_FAILURES * self._count:
            raise StartupError("router processes keep ending: their reasons are above")
        return 0

    def _start(self, place: int) -> None:
        own = replace(self._config, name=f"{self._config.name}-{place}", worker=place)
        process = self._context.Process(target=self._work, args=(own, os.getpid()), name=own.name)
        process.start()
        self._processes[place] = process

    def _stop(self, number: int, _: object) -> None:
        self._stopping = True
        for process in self._processes.values():
            if process.pid is not None and process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def _wait_until_they_listen(self) -> None:
        """The first connection that is taken comes from one that does."""
        address = (self._config.host, self._config.port)
        while not self._stopping and all(p.is_alive() for p in self._processes.values()):
            with contextlib.suppress(OSError), socket.create_connection(address, timeout=1.0):
                return
            time.sleep(0.05)

    def _watch(self) -> None:
        sentinels = {process.sentinel: place for place, process in self._processes.items()}
        for sentinel in wait(list(sentinels), timeout=1.0):
            assert isinstance(sentinel, int)
            process = self._processes.pop(sentinels[sentinel])
            process.join()
            if self._stopping:
                continue
            log.error("router process %s ended with code %s", process.name, process.exitcode)
            self._failures += 1
            if self._failures > _MOST_FAILURES * self._count:
                self._stop(signal.SIGTERM, None)
            else:
                self._start(sentinels[sentinel])


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform
        return asyncio.new_event_loop
    return uvloop.new_event_loop
