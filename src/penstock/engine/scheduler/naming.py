"""Giving computed blocks their keys."""

from __future__ import annotations

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.sequence import Sequence
from penstock.engine.scheduler.step import Claims


def name_blocks(seq: Sequence, pool: BlockPool, claims: Claims, block_tokens: int) -> None:
    """Name the whole blocks that have become confirmed. A block that another sequence stored
    first is mapped in place of our own, which is released."""
    if not seq.trusted:
        return
    for index in range(seq.num_keyed_blocks, seq.num_confirmed // block_tokens):
        key = seq.block_key(index, block_tokens)
        parent = seq.keys[index - 1] if index else b""
        block = pool.register(seq.blocks[index], key, parent, seq.public)
        if block != seq.blocks[index]:
            seq.blocks[index] = block
            seq.stale_maps.append(index)
        claims.settle(seq, [key])
        seq.num_keyed_blocks = index + 1
