"""A data plane on the virtual clock: jobs take the time of their bytes, and may go wrong.

It carries out `engine.transfer.jobs` between `KvMemory`s. While a job fills a block there is
garbage in it, and what comes of a block is decided when the job ends: so whoever touches a block
too early, or gives it away too early, is found out by the tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from penstock.engine.transfer.jobs import (
    Abandon,
    Demotion,
    Import,
    Incoming,
    Job,
    LetGo,
    Load,
    Moved,
    Store,
)
from penstock.protocol.kv import Tier
from penstock.simulator.kv import KvMemory, Page

#: What a slower tier holds whose bytes are not what was stored there.
_SPOILT: list[int] = []


@dataclass(frozen=True, slots=True)
class DataFaults:
    """Times of jobs in seconds, and of each job the probability that ...

    `block_s`: of a block over the network (also to and from a store), `map_block_s`: of one that is
    mapped, `host_block_s` and `disk_block_s`: of one to or from the instance's own memory and disk.

    `fails`: nothing comes of it. `hangs`: it ends (well) only after `hang_s`. `corrupt`: of each
    copied block, that it arrives spoilt, which its checksum tells.
    """

    latency_s: float = 0.0005
    block_s: float = 0.00005
    map_block_s: float = 0.000002
    host_block_s: float = 0.00002
    disk_block_s: float = 0.0001
    fails: float = 0.0
    hangs: float = 0.0
    hang_s: float = 4.0
    corrupt: float = 0.0


class SimulatedDataPlane:
    """`find(endpoint)` gives the memory behind an owner's endpoint while its process lives."""

    def __init__(
        self,
        memory: KvMemory,
        faults: DataFaults,
        draw: random.Random,
        at: Callable[[float, Callable[[], None]], None],
        clock: Callable[[], float],
        find: Callable[[str], KvMemory | None],
        block_bytes: int,
    ) -> None:
        self._memory = memory
        self.faults = faults
        self._draw = draw
        self._at = at
        self._clock = clock
        self._find = find
        self._block_bytes = block_bytes
        #: What slower tiers hold, by key.
        self.tiers: dict[Tier, dict[bytes, list[int]]] = {}
        self._receives_until_s = 0.0
        #: By the kind of job and the tier: until when those that have begun take the way there.
        self._tier_until_s: dict[tuple[type[Load | Store], Tier], float] = {}
        self.closed = False

    def start(self, job: Job, done: Callable[[Moved], None]) -> None:
        if isinstance(job, LetGo):
            for window in job.windows:
                del self._memory.windows[window]
            return
        if isinstance(job, Abandon):
            return  # here every job begins at once
        began_s = self._clock()
        fails = self._draw.random() < self.faults.fails
        end_s = self._end_s(job)
        if self._draw.random() < self.faults.hangs:
            end_s += self.faults.hang_s
        for block in _filled_by(job):
            self._memory.spoil(block)

        def end() -> None:
            if self.closed:
                return
            demoted: tuple[bool, ...] = ()
            if isinstance(job, Store) and not fails:
                demoted = tuple([self._demote(step) for step in job.before])
            ok = (False,) * len(job.blocks) if fails else self._carry_out(job)
            num_bytes = sum(ok) * self._block_bytes if not _is_map(job) else 0
            reason = "" if all(ok) else "the simulated data plane says so"
            done(Moved(job.number, ok, num_bytes, self._clock() - began_s, reason, demoted))

        self._at(end_s, end)

    def spoil_tiers(self) -> None:
        """What slower tiers hold now is spoilt, which its checksum tells whoever loads it."""
        for held in self.tiers.values():
            for key in held:
                held[key] = _SPOILT

    def close(self) -> None:
        self.closed = True

    def _end_s(self, job: Import | Load | Store) -> float:
        """Copies share a link: whoever sends to several, or receives from several, does so one
        after the other, at the link's rate. So do loads from a tier, and stores to it."""
        now = self._clock()
        if _is_map(job):
            return now + self.faults.latency_s + self.faults.map_block_s * len(job.blocks)
        if not isinstance(job, Import):
            way = type(job), job.tier
            begins_s = max(now, self._tier_until_s.get(way, 0.0))
            self._tier_until_s[way] = begins_s + self._tier_block_s(job.tier) * len(job.blocks)
            return self._tier_until_s[way] + self.faults.latency_s
        seconds = self.faults.block_s * len(job.blocks)
        begins_s = now
        owner = self._find(job.peer.endpoint)
        if owner is not None:
            begins_s = max(now, owner.sends_until_s)
            owner.sends_until_s = begins_s + seconds
        begins_s = max(begins_s, self._receives_until_s)
        self._receives_until_s = begins_s + seconds
        return self._receives_until_s + self.faults.latency_s

    def _tier_block_s(self, tier: Tier) -> float:
        rates = {"host": self.faults.host_block_s, "disk": self.faults.disk_block_s}
        return rates.get(tier, self.faults.block_s)

    def _carry_out(self, job: Import | Load | Store) -> tuple[bool, ...]:
        match job:
            case Import():
                owner = self._find(job.peer.endpoint)
                take = self._map if job.peer.means == "map" else self._copy
                return tuple(
                    owner is not None and take(Page(owner, i.handle.block, i.handle.generation), i)
                    for i in job.blocks
                )
            case Load():
                return tuple(self._load(job.tier, key, block) for key, block in job.blocks)
            case Store():
                held = self.tiers.setdefault(job.tier, {})
                for key, block in job.blocks:
                    held[key] = list(self._memory.read(block))
                return (True,) * len(job.blocks)

    def _map(self, page: Page, incoming: Incoming) -> bool:
        window = incoming.block
        assert window not in self._memory.windows, f"window {window} is open"
        if page.moved_on:
            return False
        self._memory.windows[window] = page
        return True

    def _copy(self, page: Page, incoming: Incoming) -> bool:
        if page.moved_on or self._draw.random() < self.faults.corrupt:
            return False
        self._memory.fill(incoming.block, page.memory.read(page.block))
        return True

    def _load(self, tier: Tier, key: bytes, block: int) -> bool:
        cells = self.tiers.get(tier, {}).get(key)
        if cells is None or cells is _SPOILT or self._draw.random() < self.faults.corrupt:
            self.tiers.get(tier, {}).pop(key, None)
            return False
        self._memory.fill(block, cells)
        return True

    def _demote(self, step: Demotion) -> bool:
        key, tier, to = step.key, step.tier, step.to
        cells = self.tiers.get(tier, {}).pop(key, None)
        if cells is None or to is None:
            return cells is not None
        self.tiers.setdefault(to, {})[key] = cells
        return True


def _is_map(job: Job) -> bool:
    return isinstance(job, Import) and job.peer.means == "map"


def _filled_by(job: Import | Load | Store) -> list[int]:
    match job:
        case Import() if not _is_map(job):
            return [incoming.block for incoming in job.blocks]
        case Load():
            return [block for _, block in job.blocks]
        case _:
            return []
