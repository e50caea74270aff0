"""A busy port: who has it, and which one is free."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

from penstock.protocol.errors import ConfigError

_LISTEN = "0A"  # the state in /proc/net/tcp
_TRIES = 100


def require_free(host: str, port: int) -> None:
    """Raises `ConfigError` that says who listens at `port` and which other one to use."""
    if port == 0 or _bind_error(host, port) is None:
        return
    error = _bind_error(host, port)
    assert error is not None
    if isinstance(error, socket.gaierror):
        raise ConfigError(f"--host {host} is no address of this machine: {error.strerror}")
    if isinstance(error, PermissionError):
        raise ConfigError(f"port {port} needs privileges: use --port 8000 or any above 1023")
    owner = holder(port)
    if owner is None and not _is_in_use(error):
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}")
    by = f" by {owner}" if owner else ""
    raise ConfigError(f"port {port} is taken{by}: stop that, or use --port {free_port(host, port)}")


def free_port(host: str, after: int) -> int:
    """The next free one; 0 (any) if there is none near."""
    near = range(after + 1, min(after + _TRIES, 65536))
    return next((port for port in near if _bind_error(host, port) is None), 0)


def holder(port: int) -> str | None:
    """`name (pid 123)` of the process that listens at a TCP port, where /proc shows it."""
    inodes = set(_listening_inodes(port))
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            if inodes & set(_open_files(process)):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:  # gone meanwhile, or another user's
            continue
    return None


def _open_files(process: Path) -> Iterator[str]:
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, such as what lists this folder
            yield link.readlink().name


def _listening_inodes(port: int) -> Iterator[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                yield f"socket:[{fields[9]}]"


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            # Binding alone does not meet a listener that also set SO_REUSEADDR; listening does.
            probe.listen(1)
    except OSError as exc:
        return exc
    return None


def _is_in_use(error: OSError) -> bool:
    return error.errno == errno.EADDRINUSE
