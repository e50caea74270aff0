"""Giving computed blocks their keys."""

from __future__ import annotations

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.sequence import Sequence
from penstock.engine.scheduler.step import Claims


def name_blocks(seq: Sequence, pool: BlockPool, claims: Claims, block_tokens: int) -> None:
    """Name the whole blocks that have become confirmed. A block that another sequence stored
    first is mapped in place of our own, which is released."""
    first, end = seq.num_keyed_blocks, seq.num_confirmed // block_tokens
    if first >= end or not seq.trusted:
        return
    seq.name_up_to(end, block_tokens)
    keys, blocks, public = seq.keys, seq.blocks, seq.public
    parent = keys[first - 1] if first else b""
    own = blocks[first:end]
    stored = pool.register_many(own, keys[first:end], parent, public)
    if stored != own:
        blocks[first:end] = stored
        seq.stale_maps += [i for i in range(first, end) if stored[i - first] != own[i - first]]
    seq.num_keyed_blocks = end
    if public:
        claims.settle(seq, keys[first:end])
