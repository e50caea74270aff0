"""Who runs: sequences that have a slot and blocks, and have claimed the keys they will store."""

from __future__ import annotations

from bisect import insort
from collections.abc import Container

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.sequence import Sequence
from penstock.engine.scheduler.step import Claims, Slots
from penstock.protocol.request import RequestClass


class Running(list[Sequence]):
    """The sequences that run, by rank. What they hold is taken and given back here alone."""

    def __init__(
        self, pool: BlockPool, claims: Claims, max_num_seqs: int, block_tokens: int
    ) -> None:
        super().__init__()
        self.slots = Slots(max_num_seqs)
        self._pool = pool
        self._claims = claims
        self._max_num_seqs = max_num_seqs
        self._block_tokens = block_tokens

    def let_in(self, seq: Sequence, hits: list[int]) -> None:
        """Give `seq` a slot. It begins with the cached blocks `hits`, which it holds already."""
        seq.take_slot(self.slots.take(), hits, self._block_tokens)
        insort(self, seq, key=lambda s: s.rank)
        if seq.public:
            self._claims.claim(seq, seq.keys[len(hits) :])

    def cover(self, seq: Sequence, num_tokens: int) -> None:
        """Give `seq` the blocks that it lacks for its first `num_tokens`; the pool must have
        them."""
        num_held = len(seq.blocks)
        num_lacking = -(-num_tokens // self._block_tokens) - num_held
        if num_lacking > 0:
            seq.stale_maps.extend(range(num_held, num_held + num_lacking))
            seq.blocks += self._pool.allocate_many(num_lacking)

    def let_go(self, seq: Sequence, keep: bool) -> None:
        """Take slot and blocks away. `keep`: what has a key may serve later."""
        self._pool.release(seq.blocks, keep)
        self._claims.settle(seq, seq.keys[seq.num_keyed_blocks :])
        self.remove(seq)
        self.slots.give_back(seq.slot)
        seq.lose_slot()

    def of_class(
        self, request_class: RequestClass, paused: Container[str]
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Of one class, those that decode and those with more of a prompt to compute; nobody of a
        service that is `paused`."""
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for seq in self:
            if seq.request_class == request_class and seq.service not in paused:
                (decodes if seq.num_to_compute <= 1 else prompts).append(seq)
        return decodes, prompts

    def check(self) -> None:
        """Assert that every slot is accounted for once, and that everyone has the blocks for what
        is computed."""
        slots = sorted([*self.slots.free(), *(seq.slot for seq in self)])
        assert slots == list(range(self._max_num_seqs)), "a slot is lost or taken twice"
        for seq in self:
            num_blocks = -(-seq.num_computed // self._block_tokens)
            assert len(seq.blocks) == num_blocks, "blocks held"
