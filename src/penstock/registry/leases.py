"""Keys, leases and terms as a state machine without I/O: what `memory` and `embedded` run."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.registry.base import Deleted, Put


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    ends_s: float


@dataclass(slots=True)
class _Item:
    value: bytes
    lease: int | None


class Leases:
    """Each change is appended to `changes`, which whoever runs this empties."""

    def __init__(self, first_lease: int = 1) -> None:
        """`first_lease`: above all leases of earlier lives of the same registry."""
        self._next_lease = first_lease
        self._leases: dict[int, _Lease] = {}
        self._items: dict[str, _Item] = {}
        self._terms: dict[str, int] = {}
        self.changes: list[Put | Deleted] = []

    def grant(self, ttl_s: float, now: float) -> int:
        self.expire(now)
        lease = self._next_lease
        self._next_lease += 1
        self._leases[lease] = _Lease(ttl_s, now + ttl_s)
        return lease

    def keep_alive(self, lease: int, now: float) -> bool:
        self.expire(now)
        found = self._leases.get(lease)
        if found is None:
            return False
        found.ends_s = now + found.ttl_s
        return True

    def revoke(self, lease: int) -> None:
        if self._leases.pop(lease, None) is not None:
            for key in [k for k, item in self._items.items() if item.lease == lease]:
                self.delete(key)

    def expire(self, now: float) -> None:
        for lease in [n for n, lease in self._leases.items() if lease.ends_s <= now]:
            self.revoke(lease)

    @property
    def next_end_s(self) -> float | None:
        return min((lease.ends_s for lease in self._leases.values()), default=None)

    def put(self, key: str, value: bytes, lease: int | None, now: float) -> bool:
        self.expire(now)
        if lease is not None and lease not in self._leases:
            return False
        held = self._items.get(key)
        if lease is not None and held is not None and held.lease is not None and lease < held.lease:
            # Overtaken on its way: whoever said it has been granted another lease since, and keeps
            # that one alive. The key would go with this one.
            return False
        self._items[key] = _Item(value, lease)
        self.changes.append(Put(key, value))
        return True

    def get(self, key: str, now: float) -> bytes | None:
        self.expire(now)
        item = self._items.get(key)
        return None if item is None else item.value

    def delete(self, key: str) -> None:
        if self._items.pop(key, None) is not None:
            self.changes.append(Deleted(key))

    def acquire(self, key: str, value: bytes, lease: int, at_least: int, now: float) -> int | None:
        self.expire(now)
        held = self._items.get(key)
        if held is not None:
            return self._terms.get(key) if held.lease == lease else None
        if not self.put(key, value, lease, now):
            return None
        self._terms[key] = max(self._terms.get(key, 0) + 1, at_least)
        return self._terms[key]

    def listing(self, prefix: str, now: float) -> dict[str, bytes]:
        self.expire(now)
        return {k: i.value for k, i in sorted(self._items.items()) if k.startswith(prefix)}
