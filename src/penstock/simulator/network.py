"""What messages meet on their way: latency, bandwidth, loss, copies, and walls between groups.

A link is an ordered pair of nodes. A link keeps its order, as a connection does; what goes over
different links overtakes freely.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

Link = tuple[str, str]


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """Each frame takes `latency_s` and up to `jitter_s` more; and of all frames that share ..."""

    latency_s: float = 0.0002
    jitter_s: float = 0.0003
    #: ... comes twice,
    duplicate: float = 0.0
    #: ... never comes,
    loss: float = 0.0
    #: ... is up to `late_s` late and overtaken by those sent after it over the same link, as what
    #: was on its way when a connection was made anew.
    reorder: float = 0.0
    late_s: float = 0.2
    #: Of one link; a frame waits until those before it are through. None: frames have no size.
    bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Wall:
    """Until then nothing passes between nodes of different groups."""

    group_of: dict[str, int]
    until_s: float

    def parts(self, source: str, target: str) -> bool:
        here, there = self.group_of.get(source), self.group_of.get(target)
        return here is not None and there is not None and here != there


class Network:
    """`faults` may be replaced at any time."""

    def __init__(self, faults: NetworkFaults, draw: random.Random) -> None:
        self.faults = faults
        self._draw = draw.random
        #: By link: when the last frame comes, when the wire is free, until when it is cut.
        self._last_arrival_s: dict[Link, float] = {}
        self._free_at_s: dict[Link, float] = {}
        self._cuts: dict[Link, float] = {}
        self._slow: dict[Link, tuple[float, float]] = {}
        self._walls: list[_Wall] = []

    # --- faults --------------------------------------------------------------------------------

    def cut(self, one: str, other: str, until_s: float, *, one_way: bool = False) -> None:
        """Nothing passes between the two; with `one_way`, from `one` to `other`."""
        for link in ((one, other),) if one_way else ((one, other), (other, one)):
            self._cuts[link] = max(self._cuts.get(link, 0.0), until_s)

    def partition(self, groups: Sequence[Collection[str]], until_s: float) -> None:
        """Nothing passes from one group to another. Who is in none talks to everybody."""
        group_of = {name: number for number, group in enumerate(groups) for name in group}
        self._walls.append(_Wall(group_of, until_s))

    def slow(self, one: str, other: str, extra_s: float, until_s: float) -> None:
        """Frames between the two take `extra_s` more, both ways."""
        for link in ((one, other), (other, one)):
            self._slow[link] = (extra_s, until_s)

    def heal(self) -> None:
        """Every wall falls. (What `faults` says goes on.)"""
        self._cuts.clear()
        self._slow.clear()
        self._walls.clear()

    # --- frames --------------------------------------------------------------------------------

    def passes(self, source: str, target: str, now: float) -> bool:
        if not (self._cuts or self._walls):
            return True
        if self._cuts.get((source, target), 0.0) > now:
            return False
        if self._walls:
            self._walls = [wall for wall in self._walls if wall.until_s > now]
        return not any(wall.parts(source, target) for wall in self._walls)

    def arrivals(self, source: str, target: str, num_bytes: int, now: float) -> list[float]:
        """When a frame sent now arrives: usually once, never if it is lost, or twice. Whether the
        two can talk at all is asked before (`passes`)."""
        faults, draw = self.faults, self._draw
        if faults.loss and draw() < faults.loss:
            return []
        link, twice = (source, target), faults.duplicate and draw() < faults.duplicate
        first_s = self._arrival_s(link, num_bytes, now)
        return [first_s, self._arrival_s(link, num_bytes, now)] if twice else [first_s]

    def _arrival_s(self, link: Link, num_bytes: int, now: float) -> float:
        faults = self.faults
        arrival_s = now + faults.latency_s
        if faults.jitter_s:
            arrival_s += self._draw() * faults.jitter_s
        if faults.bytes_per_s is not None:
            sent_s = max(now, self._free_at_s.get(link, 0.0)) + num_bytes / faults.bytes_per_s
            self._free_at_s[link] = sent_s
            arrival_s += sent_s - now
        if self._slow:
            extra_s, until_s = self._slow.get(link, (0.0, 0.0))
            arrival_s += extra_s if now < until_s else 0.0
        if faults.reorder and self._draw() < faults.reorder:
            return arrival_s + self._draw() * faults.late_s
        # A connection keeps its order: nothing overtakes what was sent before.
        last_s = self._last_arrival_s.get(link, 0.0)
        if arrival_s < last_s:
            return last_s
        self._last_arrival_s[link] = arrival_s
        return arrival_s
