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
        for name in sorted(names):
            _start(started, model, hardware, name, f"penstock://127.0.0.1:{port}", worker)
        started.until(lambda: found.active() == names)
        yield found


def _start(
    started: Processes, model: str, hardware: str, name: str, registry: str, flags: Sequence[str]
) -> None:
    where = ("--name", name, "--registry", registry)
    started.start(model, "--hardware", hardware, *where, *flags, module=MODULE)
