"""From settings to the data plane of one instance: its header, its tiers, its mover."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any, cast

from penstock.engine.config import EngineConfig
from penstock.engine.memory.base import KvMemory
from penstock.engine.memory.tiers.index import NO_TIERS, TierIndex
from penstock.engine.memory.tiers.open import TierConfig, open_tiers
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.transfer.jobs import Import, Job, Load, Means, Moved, Mover, Store
from penstock.engine.transfer.mover import DataPlane, MoverConfig
from penstock.engine.transfer.pages import (
    Generations,
    Holders,
    PoolHeader,
    PoolIdentity,
    host_id,
)
from penstock.protocol import secret
from penstock.protocol.errors import ConfigError
from penstock.registry import here

log = logging.getLogger(__name__)

_SECRET_LABEL = "kv blocks"


class NoMover:
    """For memory whose blocks nobody else can get at."""

    def __init__(self) -> None:
        self.means: dict[str, str] = {}
        self.endpoints: dict[str, str] = {}

    def offer(self, key_of: Any) -> None: ...

    def start(self, job: Job, done: Any) -> None:
        if isinstance(job, (Import, Load, Store)):
            none_came = (False,) * len(job.blocks)
            done(Moved(job.number, none_came, 0, 0.0, "no blocks are moved here"))

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Transfer:
    """What the scheduler and the core are told of the data plane."""

    mover: Mover = field(default_factory=NoMover)
    tiers: TierIndex = NO_TIERS
    generations: Generations | None = None
    holders: Holders | None = None
    num_windows: int = 0
    #: `InstanceCard.host`
    host: str = ""


def _means(config: EngineConfig, address: str | None) -> tuple[Means, ...]:
    """Those wanted that may be. Raises `ConfigError` if none of them may.

    Who meets its peers at Unix sockets has them all on this host, where pages are mapped and each
    side knows the other's user. A port, even on loopback, is open to every user.
    """
    if config.kv_transfer == "off" or address is None or address.startswith("memory://"):
        return ()
    words = (word.strip() for word in config.kv_transfer.split(","))
    wanted = tuple(dict.fromkeys(cast(Means, word) for word in words))
    if not address.startswith("ipc://") or secret.current() is not None:
        return wanted
    if "map" not in wanted:
        raise ConfigError(
            f"--kv-transfer {config.kv_transfer} opens a port where any user of this host could "
            "ask for KV: use map, which is enough within a host, or give --cluster-secret-file "
            "(openssl rand -hex 32 > FILE)"
        )
    return ("map",)


def open_transfer(
    config: EngineConfig,
    memory: KvMemory,
    model_digest: str,
    *,
    name: str,
    incarnation: int,
    address: str | None,
    registry: str | None = None,
) -> Transfer:
    """`address` is where the instance will listen. Where that is inside the process (or nowhere),
    there are no peers. Raises `ConfigError` for what cannot work here."""
    means = _means(config, address)
    wanted = TierConfig(
        config.kv_host_cache_bytes, config.kv_disk_cache_bytes, config.kv_disk_path, config.kv_store
    )
    if not isinstance(memory, XTensorMemory):
        if wanted != TierConfig():
            raise ConfigError("KV tiers need the CPU's mapped KV memory: leave their flags out")
        return Transfer()
    layout = memory.layout
    with contextlib.ExitStack() as on_failure:
        tiers, index = open_tiers(wanted, layout, model_digest, name)
        on_failure.callback(tiers.close)
        stride = memory.block_stride_bytes
        header = PoolHeader(PoolIdentity(layout.digest(), incarnation, memory.num_blocks, stride))
        on_failure.callback(header.close)
        mover = DataPlane(memory, header, _mover_config(means, address, registry), tiers)
        on_failure.pop_all()
    if mover.endpoints:
        log.info("KV blocks of peers come by %s", ", ".join(mover.endpoints))
    return Transfer(
        mover,
        index,
        header.generations,
        header.holders,
        memory.num_blocks if "map" in means else 0,
        host_id() if "map" in means else "",
    )


def _mover_config(
    means: tuple[Means, ...], address: str | None, registry: str | None
) -> MoverConfig:
    found = secret.current()
    key = found.derive(_SECRET_LABEL) if found is not None else b""
    return MoverConfig(means, _host_of(address or "", registry), key)


def _host_of(address: str, registry: str | None) -> str:
    """Where peers reach this instance: the interface that its control address is on."""
    reachable = here.reachable(address, registry or "")
    scheme, _, rest = reachable.partition("://")
    host = rest.rpartition(":")[0].strip("[]")
    return host if scheme == "tcp" and host not in ("", "localhost", "*") else "127.0.0.1"
