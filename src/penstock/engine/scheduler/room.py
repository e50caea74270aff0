"""Who fits: what each sequence needs, what is spoken for, and who would have to go.

Blocks are *spoken for* when running sequences will need them for what they have to compute, and
when they are promised (`imports.py`), as long as anything runs.
"""

from __future__ import annotations

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.imports import Holds
from penstock.engine.scheduler.running import Running
from penstock.engine.scheduler.sequence import Sequence
from penstock.engine.scheduler.step import Claims


class Room:
    """`running` and `paused` are the scheduler's own, as they change."""

    def __init__(
        self,
        pool: BlockPool,
        holds: Holds,
        claims: Claims,
        running: Running,
        paused: set[str],
        block_tokens: int,
    ) -> None:
        self._pool = pool
        self._holds = holds
        self._claims = claims
        self._running = running
        self._paused = paused
        self._block_tokens = block_tokens

    def match(self, seq: Sequence) -> list[int]:
        """The cached blocks that `seq` could begin with. Takes no reference."""
        return self._pool.match(seq.keys[: seq.max_reusable_blocks(self._block_tokens)])

    def awaits(self, seq: Sequence) -> bool:
        """Will somebody store the next block that `seq` lacks? Then waiting is cheaper than
        computing it twice; this is how the choices of a request come to share their prompt.

        Hundreds may wait for one import, and all are asked in every step. What they waited for last
        is looked at first: as long as it is claimed, and not here, nothing has changed for them,
        since whoever claims a key holds what stands before it, or claims that too.
        """
        if not seq.public:
            return False
        key = seq.awaited_key
        if key and self._is_coming(key, seq):
            return True
        end = min(len(seq.keys), seq.max_reusable_blocks(self._block_tokens))
        num_hits = self._pool.num_cached(seq.keys, end)
        if num_hits == end or not self._is_coming(seq.keys[num_hits], seq):
            seq.awaited_key = b""
            return False
        seq.awaited_key = seq.keys[num_hits]
        return True

    def _is_coming(self, key: bytes, seq: Sequence) -> bool:
        return self._claims.is_worth_waiting(key, seq, self._paused) and not self._pool.has(key)

    def victims_for(self, seq: Sequence, hits: list[int]) -> list[Sequence] | None:
        """Who must be preempted so that there is a slot, and blocks for all known tokens of `seq`,
        given the cached ones in `hits`. None: it does not fit.

        What running prompts still need is spoken for; so is what has been promised, while anything
        runs. Only who is of a lower class, or paused, may be preempted, and only if that suffices:
        nobody loses blocks in vain.
        """
        short = self.num_blocks(seq.num_tokens) - len(hits) + self._pool.num_reusable_in(hits)
        short += sum(map(self.num_missing, self._running)) - self._pool.num_available
        if self._running:
            short += self._holds.promised(besides=seq.key)
        if short <= 0 and len(self._running.slots):
            return []
        victims = [s for s in self._running if s.service in self._paused or s.rank[0] > seq.rank[0]]
        if short > sum(len(s.blocks) + self.num_missing(s) for s in victims):
            return None  # an upper bound, and cheap: a blocked head is looked at in every step
        victims.sort(key=self.victim_rank, reverse=True)
        freed = self._pool.freed_by((s.blocks for s in victims), besides=hits)
        for count, (victim, num_freed) in enumerate(zip(victims, freed), start=1):
            short -= self.num_missing(victim)
            if num_freed >= short:
                return victims[:count]
        return None

    def victim_rank(self, seq: Sequence) -> tuple[bool, tuple[int, int, int]]:
        return seq.service in self._paused, seq.rank

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def num_missing(self, seq: Sequence) -> int:
        """Blocks that a running sequence needs for what it has to compute, and does not hold."""
        return self.num_blocks(seq.num_computed + seq.num_to_compute) - len(seq.blocks)

    def spare(self) -> int:
        """Blocks that running sequences can spare."""
        return self._pool.num_available - sum(map(self.num_missing, self._running))

    def is_all_but_here(self, seq: Sequence) -> bool:
        """Whether no whole block of `seq`, which waits, is left to compute."""
        left = seq.num_tokens - len(self.match(seq)) * self._block_tokens
        return left <= self._block_tokens

    def num_lacking(self, seq: Sequence) -> int:
        """Blocks that `seq`, which waits, would take from what is available if it came in now."""
        hits = self.match(seq)
        return self.num_blocks(seq.num_tokens) - len(hits) + self._pool.num_reusable_in(hits)
