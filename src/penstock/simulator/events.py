"""The virtual clock: a queue of calls, done in the order of (time, number)."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Call = Callable[[], None]


class Events:
    """`now`: seconds since the beginning of the world, as nobody in it can know them."""

    def __init__(self) -> None:
        self.now = 0.0
        #: Events done so far.
        self.num_done = 0
        self._queue: list[tuple[float, int, Call]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._queue)

    def at(self, when_s: float, call: Call) -> None:
        """Calls of one moment are done in the order in which they were asked for."""
        self._number += 1
        heapq.heappush(self._queue, (when_s, self._number, call))

    def run(self, until_s: float) -> None:
        """Do what is due up to `until_s`, and let it be that late."""
        queue, pop = self._queue, heapq.heappop
        while queue and queue[0][0] <= until_s:
            when_s, _, call = pop(queue)
            if when_s > self.now:
                self.now = when_s
            self.num_done += 1
            call()
        self.now = until_s
