"""Threads that work off one queue, and do not all wait for the same peer."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)

#: Called once. With "" it works, and says why its peer is of no use ("": it is); with a reason it
#: only ends, for that reason.
Work = Callable[[str], str]


class Threads:
    """`count` threads, there from the first work on. In order, but for what waits for its peer:
    no more than `at_once` of them work with one.

    A peer that is silent costs the same bound each time: once one piece of work has found it of no
    use, those in the queue for it end at once. Work that is put later tries anew.
    """

    def __init__(self, count: int, name: str, at_once: int | None = None) -> None:
        self._count = count
        self._name = name
        self._at_once = at_once or count
        self._queue: deque[tuple[Hashable, Work]] = deque()
        self._at_work: Counter[Hashable] = Counter()
        self._threads: list[threading.Thread] = []
        self._changes = threading.Condition()
        self._closed = False

    def put(self, work: Work, peer: Hashable = None) -> None:
        """Called by one thread, and not after `close`."""
        with self._changes:
            self._queue.append((peer, work))
            self._changes.notify()
        if len(self._threads) < self._count:
            number = len(self._threads)
            thread = threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """What is queued is still run."""
        with self._changes:
            self._closed = True
            self._changes.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            peer, work = taken
            reason = self._do(work, "")
            for each in self._ended(peer, of_no_use=bool(reason)):
                self._do(each, reason)

    def _take(self) -> tuple[Hashable, Work] | None:
        """The next that may run; None: nothing more will come."""
        with self._changes:
            while not self._closed or self._queue:
                for i, (peer, work) in enumerate(self._queue):
                    if self._at_work[peer] < self._at_once:
                        del self._queue[i]
                        self._at_work[peer] += 1
                        return peer, work
                self._changes.wait()
            return None

    def _ended(self, peer: Hashable, of_no_use: bool) -> list[Work]:
        """Work with `peer` has ended. Returns what it takes along."""
        with self._changes:
            self._at_work[peer] -= 1
            if not self._at_work[peer]:
                del self._at_work[peer]
            lost: list[Work] = []
            if of_no_use:
                lost = [work for other, work in self._queue if other == peer]
                self._queue = deque(entry for entry in self._queue if entry[0] != peer)
            self._changes.notify_all()
            return lost

    def _do(self, work: Work, reason: str) -> str:
        try:
            return work(reason)
        except Exception:
            log.exception("%s: a job raised", self._name)
            return ""
