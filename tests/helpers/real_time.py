"""Clusters of real processes whose devices are cost models: `penstock.simulator.real_time`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.helpers.processes import Command, Processes, processes
from tests.helpers.server import free_port

MODULE = "penstock.simulator.real_time"


@contextlib.contextmanager
def real_time_cluster(
    folder: Path,
    hardware: str,
    count: int,
    *,
    router: Sequence[str] = (),
    worker: Sequence[str] = (),
    model: str = "toy",
) -> Iterator[Command]:
    """A router, and `count` instances (gpu-0, ...) that it uses. Flags for each of both."""
    with processes(folder) as started:
        port = free_port()
        registry = ("--registry-address", f"tcp://127.0.0.1:{port}")
        found = started.server("router", model, *registry, *router)
        names = {f"gpu-{number}" for number in range(count)}
        where = f"penstock://127.0.0.1:{port}"
        workers = [_start(started, model, hardware, n, where, worker) for n in sorted(names)]

        def all_there() -> bool:
            for command in (found, *workers):
                assert command.process.poll() is None, f"it has ended:\n{command.log}"
            return found.active() == names

        started.until(all_there)
        yield found


def _start(
    started: Processes, model: str, hardware: str, name: str, registry: str, flags: Sequence[str]
) -> Command:
    where = ("--name", name, "--registry", registry)
    return started.start(model, "--hardware", hardware, *where, *flags, module=MODULE)
