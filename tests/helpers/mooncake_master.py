"""A real `mooncake_master` for a test."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def require() -> None:
    """Skip the module where there is no Mooncake."""
    try:
        import mooncake.store  # noqa: F401
    except ImportError as exc:
        pytest.skip(f"no Mooncake here (libibverbs1?): {exc}", allow_module_level=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def running(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Listens on loopback; its log goes into `folder`. Killed at the end, if not before."""
    import mooncake.store

    binary = Path(mooncake.store.__file__).with_name("mooncake_master")
    with (folder / "master.log").open("ab") as log:
        process = subprocess.Popen(
            [binary, f"--rpc_port={port}", f"--metrics_port={free_port()}",
             "--rpc_address=127.0.0.1", "--default_kv_lease_ttl=200"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        _wait_for(port, process, folder)
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError((folder / "master.log").read_text())
