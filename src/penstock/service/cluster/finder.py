"""Who holds which leading tokens of a prompt, as far as the service knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from penstock.protocol.instance import InstanceCard, Snapshot
from penstock.protocol.kv import KvEvents
from penstock.service.kv_index.approximate import ApproximateIndex
from penstock.service.kv_index.audit import Account, HitAudit
from penstock.service.kv_index.index import KvIndex
from penstock.service.policies.view import Floats


class Finder(Protocol):
    #: Whether instances are asked for `KvEvents`.
    listens: bool

    def attached(self, card: InstanceCard) -> bool:
        """Its events begin anew. True: they mean something only after a snapshot."""

    def events(self, instance: str, events: KvEvents) -> bool:
        """Take in what changed. False: something is missing, a snapshot is needed."""

    def snapshot(self, instance: str, snapshot: Snapshot) -> None:
        """What it holds is exactly this."""

    def gone(self, instance: str) -> None:
        """And what it held with it."""

    def hits(self, keys: bytes, names: Sequence[str]) -> tuple[Floats, Floats] | None:
        """Leading tokens with these block keys on the device of each of `names`, and in any of its
        tiers; None where nothing is known."""

    def submitted(self, instance: str, keys: bytes) -> None:
        """A sequence with these keys was sent there."""

    def came_true(self, instance: str, predicted: int, actual: int, num_tokens: int) -> None:
        """Tokens that were thought to be cached, of so many, and those that were."""

    @property
    def accounts(self) -> dict[str, Account]:
        """The audit: predicted against actual hits, by instance."""


class NoFinder:
    """Nothing is known of caches."""

    listens = False

    def attached(self, card: InstanceCard) -> bool:
        return False

    def events(self, instance: str, events: KvEvents) -> bool:
        return True

    def snapshot(self, instance: str, snapshot: Snapshot) -> None:
        pass

    def gone(self, instance: str) -> None:
        pass

    def hits(self, keys: bytes, names: Sequence[str]) -> tuple[Floats, Floats] | None:
        return None

    def submitted(self, instance: str, keys: bytes) -> None:
        pass

    def came_true(self, instance: str, predicted: int, actual: int, num_tokens: int) -> None:
        pass

    @property
    def accounts(self) -> dict[str, Account]:
        return {}


class IndexFinder:
    """The index that instances feed; for those that say nothing of their cache, or whose word has
    turned out wrong, what can be guessed from what they were sent since."""

    listens = True

    def __init__(self, index: KvIndex | None = None) -> None:
        self.index = index or KvIndex()
        self.audit = HitAudit()
        self._guesses = ApproximateIndex()
        #: Whether a snapshot has been had, and no events have been missed since.
        self._told: dict[str, bool] = {}
        self._doubted: tuple[Sequence[str], int, list[int]] | None = None
        self._version = 0

    def attached(self, card: InstanceCard) -> bool:
        self.index.distrust(card.name)
        self._tells(card.name, False)
        self._guesses.add(card.name, card.num_blocks)
        self.audit.drop(card.name)
        return True

    def events(self, instance: str, events: KvEvents) -> bool:
        if self.index.apply(instance, events):
            return True
        self._tells(instance, False)
        return False

    def snapshot(self, instance: str, snapshot: Snapshot) -> None:
        # Most are asked for because a sequence waits, not because events were lost.
        if self.index.is_at(instance, snapshot.incarnation, snapshot.kv_number):
            return
        tiers = {"device": snapshot.keys, **snapshot.tier_keys}
        self.index.replace(instance, snapshot.incarnation, snapshot.kv_number, tiers)
        self._tells(instance, True)

    def gone(self, instance: str) -> None:
        self.index.drop(instance)
        self._guesses.drop(instance)
        self.audit.drop(instance)
        self._tells(instance, False)
        del self._told[instance]

    def hits(self, keys: bytes, names: Sequence[str]) -> tuple[Floats, Floats] | None:
        device, tiers = self.index.hits(keys, names)
        if guessed := self._doubtful(names):
            there, _ = self._guesses.hits(keys, [names[i] for i in guessed])
            device[guessed] = tiers[guessed] = there
        return device, tiers

    def submitted(self, instance: str, keys: bytes) -> None:
        if not self._believes(instance):  # all that was ever sent to everybody would be too much
            self._guesses.sent(instance, keys)

    def came_true(self, instance: str, predicted: int, actual: int, num_tokens: int) -> None:
        self.audit.observe(instance, predicted, actual, num_tokens)

    @property
    def accounts(self) -> dict[str, Account]:
        return self.audit.accounts()

    def _doubtful(self, names: Sequence[str]) -> list[int]:
        """Places of those who are not believed. Asked for the same tuple again and again, it does
        not look again while nobody's credit has changed."""
        version, known = self._version + self.audit.version, self._doubted
        if known is not None and known[0] is names and known[1] == version:
            return known[2]
        found = [i for i, name in enumerate(names) if not self._believes(name)]
        if isinstance(names, tuple):  # a list may have changed meanwhile
            self._doubted = names, version, found
        return found

    def _tells(self, instance: str, all_of_it: bool) -> None:
        self._told[instance] = all_of_it
        self._version += 1

    def _believes(self, instance: str) -> bool:
        return self._told.get(instance, False) and self.audit.trusts(instance)
