"""For how many steps nothing but decode can change.

The next steps are alike as long as they have the same rows, one token each, drawn from the id that
was drawn before; nobody is let in, loses blocks or ends. What is known of the future is how much
each row may still draw, what blocks it will need, and why those who wait cannot come in. Not known
are stop tokens, and what comes from outside: arrivals, pauses, blocks on their way. Whoever acts on
what is said here watches `Scheduler.num_changes`.

Who waits for room cannot be let in before somebody ends: rows only take blocks. There are two ways
out of that, both through the cache. A row that stores what another has stored before gives its copy
back, and a row may store what the one that waits would begin with. Either needs two sequences that
agree up to the last whole block, and where there are such, only the next step is certain. (Of rows
that agree that is so though nobody waits: a run gives copies back only when it has ended, and
whoever came meanwhile would have found that room.) So it is where steps in flight will end somebody
or store what somebody waits for, and where the flows of several services wait, since their order
follows what each has been served.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.queue import WaitingQueue
from penstock.engine.scheduler.room import Room
from penstock.engine.scheduler.sequence import Sequence
from penstock.protocol.request import RequestClass


class Foresight:
    """`running` (by rank), `queues` and `paused` are the scheduler's own, as they change."""

    def __init__(
        self,
        budget: int,
        pool: BlockPool,
        room: Room,
        running: list[Sequence],
        queues: Mapping[RequestClass, WaitingQueue],
        paused: set[str],
        block_tokens: int,
    ) -> None:
        self._budget = budget
        self._pool = pool
        self._room = room
        self._running = running
        self._queues = queues
        self._paused = paused
        self._block_tokens = block_tokens

    def stable_steps(self, limit: int, further: int = 0) -> int:
        """How many of the next `limit` steps are alike; 0: the next one does more than decode, or
        there is none. The last of them may be somebody's last. There are blocks for so many steps
        `further`, too."""
        budget, steps = self._budget, limit
        rows: list[Sequence] = []
        num_ending = 0
        may_let_in: list[WaitingQueue] = []
        for request_class, queue in self._queues.items():
            num_prompts = 0
            for seq in self._running:
                if seq.request_class != request_class or seq.service in self._paused:
                    continue
                num_to_compute = seq.num_to_compute
                if num_to_compute > 1:
                    num_prompts += 1
                elif not num_to_compute:
                    num_ending += 1
                elif budget:
                    budget -= 1
                    rows.append(seq)
                    left = seq.num_tokens_here - seq.num_tokens
                    # Nobody's first token waits for the end of a run.
                    steps = min(steps, left) if seq.has_drawn else 0
            if num_prompts and budget:
                return 0
            if len(queue) and budget:
                may_let_in.append(queue)
        if not rows or not steps:
            return 0
        if steps > 1 and self._may_give_back(rows):
            steps = 1
        for queue in may_let_in:
            steps = min(steps, self._until_let_in(queue, rows, num_ending))
        return self._with_blocks(rows, steps, further)

    def may_preempt(self) -> bool:
        """May the next step take blocks from somebody? Not while a run is in flight, or what that
        has computed is lost: it has no keys yet."""
        if self._room.spare() < 0:
            return True
        waiting = [request_class for request_class, queue in self._queues.items() if len(queue)]
        return bool(waiting) and any(
            seq.service in self._paused or seq.request_class != waiting[0] for seq in self._running
        )

    def _with_blocks(self, rows: list[Sequence], steps: int, further: int) -> int:
        """As many of the steps as there are blocks for."""
        available = self._pool.num_available
        if self._num_missing(rows, steps + further) <= available:
            return steps
        counts = range(1 + further, steps + further + 1)
        return bisect_right(counts, available, key=lambda n: self._num_missing(rows, n))

    def _num_missing(self, rows: list[Sequence], steps: int) -> int:
        num_blocks = self._room.num_blocks
        return sum([num_blocks(s.num_computed + steps) - len(s.blocks) for s in rows])

    def _until_let_in(self, queue: WaitingQueue, rows: list[Sequence], num_ending: int) -> int:
        """0: somebody is let in with the next step; 1: then perhaps; else nobody is."""
        next_only, for_long = 1, 1 << 30
        awaited = False
        for seq in queue.in_order():
            if seq.service in self._paused:
                continue
            if seq.num_placeholders:
                return next_only
            if self._room.awaits(seq):
                awaited = True
                continue
            hits = self._room.match(seq)
            if not self._running or self._room.victims_for(seq, hits) is not None:
                return 0
            if num_ending or queue.takes_turns or _may_serve(rows, seq):
                return next_only
            break
        return next_only if awaited else for_long

    def _may_give_back(self, rows: list[Sequence]) -> bool:
        """Whether one of the rows may store what another sequence has stored, or will."""
        pool = self._pool
        coming: set[bytes] = set()
        for row in rows:
            if not row.public:
                continue
            last = row.keys[-1]
            block = pool.block_of(last)
            if block is None:  # its step is in flight
                if last in coming:
                    return True
                coming.add(last)
            elif pool.num_holders(block) > (row.num_keyed_blocks == len(row.keys)):
                return True
        return False


def _may_serve(rows: list[Sequence], seq: Sequence) -> bool:
    """Whether what one of the rows stores may be of use to `seq`, which waits."""
    keys = seq.keys
    return any(
        row.public and len(row.keys) <= len(keys) and row.keys[-1] == keys[len(row.keys) - 1]
        for row in rows
    )
