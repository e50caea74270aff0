"""Maps blocks for the next step while this one is computed.

A step's maps are decided when it is launched, and then it waits behind the step under way: time
enough for a thread to lay its blocks in place, so that at its start `map` finds them there.

Why that is safe. Batches are B1, B2, ... in launch order; Bn is being mapped ahead while some of
its predecessors have not ended.

* What a step reads and writes are the places (slot, index) that its rows cover, index below
  ceil((start + num_tokens) / block_tokens). A place that a predecessor in flight covers, or maps
  itself, is not touched: it is left to the start of Bn, when all predecessors have ended. Steps in
  flight only become fewer, so what was true at the launch stays true.
* Later batches do not touch what Bn covers or maps until Bn has ended, by the same rule with Bn as
  the predecessor. So a place that was laid ahead still holds when Bn starts.
* At its start Bn asks for all of its maps again, in order. What was laid ahead is found in the
  table; what was not (refused, too late, taken down meanwhile for want of mappings) is laid then.
  Mapping ahead can therefore be left out at any point, and `starts` does: what is still waiting for
  Bn then is dropped, or it would undo, later, what Bn's successors have mapped.
* A physical block may be in several places at once, and laying it writes nothing into it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from queue import SimpleQueue
from typing import Protocol

from penstock.engine.scheduler.batch import Batch, BlockMap
from penstock.trace import NO_TRACE, Trace

log = logging.getLogger(__name__)


class MapsAhead(Protocol):
    def map_ahead(self, slot: int, index: int, block: int) -> None: ...


class Premapper:
    """Told of each batch: `launched` and then, by the thread that computes, `starts` and `ended`.

    Calls of `launched` come from one thread, in launch order.
    """

    def __init__(self, memory: MapsAhead, block_tokens: int, trace: Trace = NO_TRACE) -> None:
        self._memory = memory
        self._block_tokens = block_tokens
        self._trace = trace
        self._in_flight: deque[Batch] = deque()
        self._flight_changes = threading.Lock()
        self._gone = False  # the thread, for a reason of its own
        self._waiting: SimpleQueue[tuple[int, list[BlockMap]] | None] = SimpleQueue()
        self._started = -1  # the last step that has
        self._mapping = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="penstock-map", daemon=True)
        self._start()

    def _start(self) -> None:
        self._thread.start()

    def launched(self, batch: Batch) -> None:
        with self._flight_changes:
            before = tuple(self._in_flight)
            self._in_flight.append(batch)
        if self._gone or not batch.maps:
            return
        if before and (early := self.untouched(batch.maps, before)):
            self._waiting.put((batch.step, early))

    def starts(self, batch: Batch) -> None:
        """From here on nothing is mapped ahead for `batch`. Waits for the map under way."""
        with self._mapping:
            self._started = batch.step

    def ended(self) -> None:
        """The oldest batch in flight."""
        with self._flight_changes:
            self._in_flight.popleft()

    def close(self) -> None:
        """Before the memory is closed."""
        self._waiting.put(None)
        self._thread.join()

    def untouched(self, maps: list[BlockMap], before: tuple[Batch, ...]) -> list[BlockMap]:
        """Those of `maps` whose place no batch of `before` covers or maps."""
        ends: dict[int, int] = {}  # of what is covered, by slot
        for batch in before:
            for row in batch.rows:
                end = -(-(row.start + row.num_tokens) // self._block_tokens)
                ends[row.slot] = max(ends.get(row.slot, 0), end)
            for m in batch.maps:
                ends[m.slot] = max(ends.get(m.slot, 0), m.index + 1)
        return [m for m in maps if m.index >= ends.get(m.slot, 0)]

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            # No step needs us: each maps what it finds unmapped.
            self._gone = True
            log.exception("mapping ahead stops; from now on blocks are mapped as steps start")

    def _serve(self) -> None:
        while (work := self._waiting.get()) is not None:
            step, maps = work
            with self._trace.span(f"map for step {step}"):
                for m in maps:
                    self.map_one(step, m)

    def map_one(self, step: int, m: BlockMap) -> None:
        """Unless `step` has started: then it has its own way."""
        with self._mapping:
            if step > self._started:
                self._memory.map_ahead(m.slot, m.index, m.block)


class NoPremapper:
    """For memories whose maps cost nothing."""

    def launched(self, batch: Batch) -> None: ...
    def starts(self, batch: Batch) -> None: ...
    def ended(self) -> None: ...
    def close(self) -> None: ...
