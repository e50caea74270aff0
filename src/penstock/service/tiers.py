"""How full each KV tier of an instance is, from what its `Load` says."""

from __future__ import annotations

import msgspec

from penstock.protocol.instance import Load


class TierUse(msgspec.Struct, kw_only=True):
    """Blocks of one tier; `total` is None where the tier grows without a bound of ours."""

    used: int
    total: int | None = None
    used_bytes: int | None = None
    total_bytes: int | None = None


def tiers_of(load: Load, block_bytes: int | None) -> dict[str, TierUse]:
    """Each tier that the instance has; on the device, what is cached counts as used."""
    used = load.kv_blocks_used + load.kv_blocks_cached
    tiers = {"device": _use(used, load.kv_blocks_total, block_bytes)}
    for tier in load.tiers:
        tiers[tier.tier] = _use(tier.used, tier.total or None, block_bytes)
    return tiers


def _use(used: int, total: int | None, block_bytes: int | None) -> TierUse:
    if block_bytes is None:
        return TierUse(used=used, total=total)
    total_bytes = None if total is None else total * block_bytes
    return TierUse(used=used, total=total, used_bytes=used * block_bytes, total_bytes=total_bytes)
