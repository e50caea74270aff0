"""What would fail in every engine that a command starts is said before the first one is."""

from __future__ import annotations

import os
from pathlib import Path

from penstock.engine.config import EngineConfig
from penstock.protocol.errors import ConfigError

GIB = 1 << 30
#: The least that a process with an engine in it takes, whatever its model.
_PROCESS_BYTES = 128 << 20


def check_disk(engine: EngineConfig) -> None:
    """Raises `ConfigError` where KV cannot be kept in the folder that was given."""
    if engine.kv_disk_path is None:
        return
    folder = Path(engine.kv_disk_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--kv-disk-path {folder}: {exc.strerror}") from exc
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--kv-disk-path {folder} cannot be written to")


def check_memory(engine: EngineConfig, num_instances: int, total_bytes: int | None = None) -> None:
    """Raises `ConfigError` where so many engines ask for more than this host has altogether. One
    alone is told more exactly when it has loaded."""
    if num_instances == 1 or engine.device == "cuda":
        return
    if total_bytes is None:
        total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    each = _PROCESS_BYTES + (engine.kv_cache_bytes or 0) + (engine.kv_host_cache_bytes or 0)
    if num_instances * each > total_bytes:
        needed = num_instances * each / GIB
        raise ConfigError(
            f"--instances {num_instances}: they would take at least {needed:.1f} GiB "
            f"({each / GIB:.2f} GiB each without the weights), and this host has "
            f"{total_bytes / GIB:.1f} GiB"
        )
