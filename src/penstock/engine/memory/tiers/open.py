"""From flags to the slower tiers of one instance: their books and their bytes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from penstock.engine.memory.sizing import GIB
from penstock.engine.memory.tiers.data import TierData, Tiers
from penstock.engine.memory.tiers.disk import DiskTier
from penstock.engine.memory.tiers.host import HostTier
from penstock.engine.memory.tiers.index import TierIndex, TierSizes
from penstock.protocol.errors import ConfigError
from penstock.protocol.kv import KvLayout, Tier

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TierConfig:
    """None: there is no such tier."""

    host_cache_bytes: int | None = None
    disk_cache_bytes: int | None = None
    #: The folder of the disk tier's file.
    disk_path: str | None = None
    #: `mooncake://host:port`, see `store.StoreConfig`.
    store: str | None = None


def open_tiers(
    config: TierConfig, layout: KvLayout, model_digest: str, name: str
) -> tuple[Tiers, TierIndex]:
    """The bytes and the books of instance `name`. Close the first.

    Raises `ConfigError` for settings that cannot work, `NotEnoughMemory` for too large a host tier.
    """
    block_bytes = layout.block_bytes
    digest = hashlib.sha256(f"{model_digest} {layout.digest()}".encode()).digest()
    tiers: dict[Tier, TierData] = {}
    recovered: dict[Tier, list[bytes]] = {}
    host_blocks = _num_blocks(config.host_cache_bytes, block_bytes, "--kv-host-cache-bytes")
    disk_blocks = _num_blocks(config.disk_cache_bytes, block_bytes, "--kv-disk-cache-bytes")
    if bool(disk_blocks) != (config.disk_path is not None):
        raise ConfigError("the disk KV cache needs both --kv-disk-cache-bytes and --kv-disk-path")
    with contextlib.ExitStack() as undo:
        if host_blocks:
            tiers["host"] = host = HostTier(host_blocks, block_bytes)
            undo.callback(host.close)
        if disk_blocks:
            assert config.disk_path is not None
            disk = DiskTier(Path(config.disk_path), name, disk_blocks, block_bytes, digest)
            tiers["disk"] = disk
            undo.callback(disk.close)
            disk_blocks, recovered["disk"] = disk.num_blocks, disk.recovered
        if config.store:
            # Imported where it is used: the library behind it is an extra.
            from penstock.engine.memory.tiers.store import StoreConfig, StoreTier

            tiers["store"] = StoreTier(
                StoreConfig.parse(config.store), block_bytes, digest.hex()[:32]
            )
        undo.pop_all()
    sizes = TierSizes(host_blocks, disk_blocks, store=bool(config.store))
    for tier, count in (("host", host_blocks), ("disk", disk_blocks)):
        if count:
            log.info("%s KV cache: %.2f GiB, %d blocks", tier, count * block_bytes / GIB, count)
    if recovered.get("disk"):
        log.info("disk KV cache: %d blocks are there from before", len(recovered["disk"]))
    return Tiers(tiers, block_bytes), TierIndex(sizes, recovered if disk_blocks else None)


def _num_blocks(num_bytes: int | None, block_bytes: int, flag: str) -> int:
    if num_bytes is None:
        return 0
    if num_bytes < block_bytes:
        raise ConfigError(f"{flag} {num_bytes} is less than one block, {block_bytes} bytes")
    return num_bytes // block_bytes
