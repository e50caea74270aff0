"""Blocks go to slower tiers before the device evicts them.

When free blocks run low, what the LRU will evict next is copied out (`Store`), in the order of
eviction, so that each tier's list goes on where the device's ends. The blocks keep their place in
the LRU meanwhile (`BlockPool.begin_store`). What is not copied in time is lost to the tiers, and
computed again if need be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from penstock.engine.memory.tiers.index import StorePlan, TierIndex
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.transfer.jobs import Moved, Store
from penstock.protocol.effects import Effect, Move


class Spill:
    """Stores under way, at most `max_stores` rounds of them."""

    def __init__(
        self, scheduler: Scheduler, tiers: TierIndex, *, ahead_blocks: int, max_stores: int
    ) -> None:
        self._pool = scheduler.pool
        self._tiers = tiers
        self._ahead_blocks = min(ahead_blocks, max(1, self._pool.num_blocks // 2))
        self._max_stores = max_stores
        self._jobs: dict[int, tuple[StorePlan, list[int]]] = {}
        self._users: Counter[int] = Counter()  # stores that read a block
        self._seen: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def poll(self, next_number: Callable[[], int]) -> list[Effect]:
        """Stores that should begin now."""
        pool = self._pool
        if (
            not self._tiers.enabled
            or pool.num_free >= self._ahead_blocks
            or len(self._jobs) >= self._max_stores
        ):
            return []
        oldest = pool.oldest(self._ahead_blocks)
        seen = (oldest[0], len(oldest)) if oldest else None
        if seen == self._seen:
            return []  # nothing has been evicted since
        self._seen = seen
        block_of = {key: block for block in oldest if (key := pool.key_of(block)) is not None}
        effects: list[Effect] = []
        for plan in self._tiers.plan_store(list(block_of)):
            blocks = [block_of[key] for key in plan.keys]
            pool.begin_store(b for b in blocks if not self._users[b])
            self._users.update(blocks)
            number = next_number()
            self._jobs[number] = (plan, blocks)
            pairs = tuple(zip(plan.keys, blocks, strict=True))
            effects.append(Move(Store(number, plan.tier, pairs, plan.before)))
        return effects

    def on_moved(self, moved: Moved) -> bool:
        """Was it one of ours?"""
        found = self._jobs.pop(moved.number, None)
        if found is None:
            return False
        plan, blocks = found
        self._users.subtract(blocks)
        self._pool.end_store([b for b in blocks if not self._users[b]])
        self._users = +self._users
        self._tiers.end_store(plan, moved.ok, moved.demoted)
        self._seen = None
        return True
