"""A step from plan to result, and what the scheduler says about its steps."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from penstock.engine.scheduler.batch import BatchRow
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.sequence import Sequence


@dataclass(slots=True)
class Plan:
    """A batch in the making: how many tokens of which sequence, in order."""

    budget: int
    tokens: dict[Sequence, int] = field(default_factory=dict)
    #: Of the budget, what prompts may take (`engine/pace.py`).
    room: int = field(init=False)

    def __post_init__(self) -> None:
        self.room = self.budget

    def chunk(self, num_to_compute: int, config: SchedulerConfig) -> int:
        """How many of a sequence's tokens there is room for."""
        # What is less than a block is no prompt: who was handed over has that left to compute.
        paced = num_to_compute > config.block_tokens
        most = min(self.budget, max(self.room, 0)) if paced else self.budget
        return min(num_to_compute, most, config.max_chunk_tokens or most)

    def add(self, seq: Sequence, num_tokens: int) -> None:
        self.tokens[seq] = num_tokens
        self._spend(num_tokens)

    def drop(self, seq: Sequence) -> None:
        self._spend(-self.tokens.pop(seq, 0))

    def _spend(self, num_tokens: int) -> None:
        self.budget -= num_tokens
        if abs(num_tokens) > 1:  # one token is of who decodes
            self.room -= num_tokens


@dataclass(slots=True)
class InFlight:
    """A batch that was launched and not answered: whose rows, in which of their residences, and
    how many steps it is to have (fewer than when it was launched, if it was shortened)."""

    step: int
    rows: list[tuple[Sequence, BatchRow, int]] = field(default_factory=list)
    steps: int = 1


@dataclass(slots=True)
class Totals:
    """Since the start; fields of `SchedulerStats`."""

    steps: int = 0
    scheduled_tokens: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0


class Slots:
    """The runner's rows of state. The lowest free slot goes first, so that those in use lie
    close together."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))
        self._freed: list[int] = []

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self) -> int:
        return heapq.heappop(self._free)

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._free, slot)
        self._freed.append(slot)

    def take_freed(self) -> list[int]:
        """Slots given back since the last call; the runner hears of them with the next batch."""
        freed, self._freed = self._freed, []
        return freed

    def free(self) -> list[int]:
        return list(self._free)


class Claims:
    """Who is about to store which key, so that nobody computes (or fetches) it again: running
    sequences and imports."""

    def __init__(self) -> None:
        self._owner: dict[bytes, object] = {}

    def claim(self, claimant: object, keys: list[bytes]) -> None:
        """A later claim on a key wins: it is made only by who would not wait for the earlier."""
        self._owner.update(dict.fromkeys(keys, claimant))

    def settle(self, claimant: object, keys: list[bytes]) -> None:
        """`claimant` has stored these keys, or will not."""
        take = self._owner.pop
        for key in keys:
            owner = take(key, None)
            if owner is not None and owner is not claimant:
                self._owner[key] = owner

    def owner(self, key: bytes) -> object | None:
        return self._owner.get(key)

    def is_worth_waiting(self, key: bytes, seq: Sequence, paused: set[str]) -> bool:
        """Whether `seq` should leave `key` to who has claimed it. Imports end by themselves; of
        sequences one waits only for those that are served no later than oneself and are not
        paused, so whoever is waited for moves on. When it goes, so does its claim."""
        owner = self._owner.get(key)
        if isinstance(owner, Sequence):
            return owner.rank[:2] <= seq.rank[:2] and owner.service not in paused
        return owner is not None

    def clear(self) -> None:
        self._owner.clear()

    def owners(self) -> list[object]:
        return list(self._owner.values())


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts of this moment, then totals since the start."""

    waiting: dict[str, int]  # sequences by class
    running: dict[str, int]
    waiting_tokens: int  # known tokens of waiting sequences (the cache may have some of them)
    running_tokens: int  # context of running sequences
    prefills: int  # sequences that have no new token yet, waiting or running
    prefill_tokens_left: int  # what they have to compute (the cache may have some of it)
    decode_context_tokens: int  # context of the others that run
    kv_blocks_used: int
    kv_blocks_cached: int  # reusable: they have a key and nobody holds them
    kv_blocks_total: int
    steps: int
    scheduled_tokens: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
