"""The socket that clients connect to, taken before anything is loaded: a busy port is better known
now than in a minute."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

from penstock.protocol.errors import ConfigError
from penstock.service.config import ServeConfig

_BACKLOG = 4096


@contextlib.contextmanager
def bound(config: ServeConfig, *, listens: bool = True) -> Iterator[socket.socket]:
    """A socket for the time of the block. A Unix socket's file goes with us, if it is still ours.

    With `listens=False` the port is held for API workers, which bind it beside us.
    """
    with _bind(config, listens) as listener:
        inherited = config.cluster.inherited_socket is not None
        path = Path(config.uds) if config.uds is not None and not inherited else None
        ours = path.stat().st_ino if path is not None else 0
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if path is not None and path.stat().st_ino == ours:
                    path.unlink()


def private_listener(path: str) -> socket.socket:
    """An API worker's own, in a folder that is its user's alone."""
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    listener.setblocking(False)
    return listener


def url_of(config: ServeConfig, listener: socket.socket) -> str:
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    return f"{config.tls.scheme}://{host}:{port}"


def _bind(config: ServeConfig, listens: bool) -> socket.socket:
    _raise_file_limit()
    if config.cluster.inherited_socket is not None:
        listener = socket.socket(fileno=config.cluster.inherited_socket)
        listener.setblocking(False)
        return listener
    where = config.uds or f"{config.host}:{config.port}"
    if config.uds is not None:
        _make_way(Path(config.uds))
        listener = socket.socket(socket.AF_UNIX)
        address: str | tuple[str, int] = config.uds
    else:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config.cluster.reuse_port or not listens:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        address = (config.host, config.port)
    try:
        listener.bind(address)
        # One that holds the port and does not listen is given no connections by the kernel.
        if listens or config.uds is not None:
            listener.listen(_BACKLOG)
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


def _raise_file_limit() -> None:
    """Each connection is a file: the soft limit of 1024 is a limit on users."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
