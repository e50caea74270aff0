"""The bytes of the slower tiers: one interface for each, and all of an instance's together.

Which key is where is decided by the books (`index.py`); a tier here does as it is told, on threads
of the data plane, several at once. Whatever goes wrong (a full disk, a spoilt block, a store out of
reach) is "not there": a False, with a warning, never an exception and never wrong bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from penstock.engine.memory.tiers.index import MAX_FAILURES_IN_A_ROW
from penstock.engine.transfer.jobs import Demotion
from penstock.protocol.kv import Tier

log = logging.getLogger(__name__)

#: One block's bytes: uint8 [block_bytes], C-contiguous.
Block = np.ndarray


class TierData(Protocol):
    """The blocks of one tier by key. Safe for several threads; no method raises for a failure of
    the medium."""

    def load(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        """Fill each (key, destination). False: not there, or not unspoilt (and now dropped); the
        destination may hold anything then."""

    def store(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        """Keep each (key, source). True also where the key is there already."""

    def drop(self, key: bytes) -> None:
        """Give up a key's room; does nothing if it is not there."""

    def close(self) -> None: ...


class Tiers:
    """All slower tiers of one instance. What `Load` and `Store` jobs ask for is one call each."""

    def __init__(self, tiers: Mapping[Tier, TierData], block_bytes: int) -> None:
        self._tiers = dict(tiers)
        self._block_bytes = block_bytes

    def load(self, tier: Tier, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        """Of each (key, destination), in order: is it filled?"""
        found = self._tiers.get(tier)
        return found.load(blocks) if found is not None else [False] * len(blocks)

    def store(
        self, tier: Tier, blocks: Sequence[tuple[bytes, Block]], before: Sequence[Demotion] = ()
    ) -> tuple[list[bool], list[bool]]:
        """Make room by `before`, in order, then keep each (key, source).

        Returns what became of the blocks, and of the steps before them.
        """
        demoted = self.demote(before)
        found = self._tiers.get(tier)
        return found.store(blocks) if found is not None else [False] * len(blocks), demoted

    def demote(self, steps: Sequence[Demotion]) -> list[bool]:
        """The key leaves its tier in any case; False: it did not arrive in the next one."""
        return [self._demote(step) for step in steps]

    def _demote(self, step: Demotion) -> bool:
        source = self._tiers.get(step.tier)
        if source is None:
            return False
        went_well = True
        if step.to is not None:
            staged = np.empty(self._block_bytes, np.uint8)
            went_well = source.load([(step.key, staged)])[0]
            went_well = went_well and self._tiers[step.to].store([(step.key, staged)])[0]
        source.drop(step.key)
        return went_well

    def close(self) -> None:
        """No job may be under way."""
        for tier in self._tiers.values():
            tier.close()
        self._tiers.clear()


NO_TIER_DATA = Tiers({}, 0)


class Health:
    """Of one medium: warns of its first failure, and gives it up after too many in a row."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures_in_a_row = 0
        self._has_warned = False
        self.given_up = False

    def succeeded(self) -> None:
        self._failures_in_a_row = 0

    def failed(self, why: str) -> None:
        if not self._has_warned:
            log.warning("the %s failed: %s; what it lacks is computed", self._name, why)
            self._has_warned = True
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW and not self.given_up:
            self.given_up = True
            log.warning(
                "the %s failed %d times in a row and is used no more, the last time: %s",
                self._name, self._failures_in_a_row, why,
            )  # fmt: skip
