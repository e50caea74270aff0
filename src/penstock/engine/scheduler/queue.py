"""Who waits, and in which order they are served.

Within a class: lower priority value first; then whoever has been preempted, the earliest arrival
first; then the flows (service, cache salt) in turn, so that each gets the same number of *tokens*;
within a flow, first come, first served.

Fairness is start-time fair queueing (Goyal et al., SIGCOMM '96) over tokens, which for LLM serving
is known as the virtual token counter (Sheng et al., OSDI '24): each flow has a counter of the
tokens it was served, and the waiting flow with the smallest counter goes next. A flow that comes
(back) starts no lower than the counter last chosen, so idling saves up nothing. Prompt tokens that
the cache supplied cost nothing and are not counted; nor are tokens computed again after a
preemption, which are the engine's doing.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from penstock.engine.scheduler.sequence import CLASSES, Flow, Sequence
from penstock.protocol.request import RequestClass

#: Flows that went idle ahead of the others are remembered up to this many: salts come and go.
_MAX_IDLE_FLOWS = 1024


@dataclass(slots=True)
class _Flow:
    number: int  # breaks ties, in the order of appearance
    served_tokens: int
    num_live: int = 0  # sequences waiting or running


@dataclass(slots=True)
class _Level:
    """Those who wait at one priority."""

    preempted: dict[int, Sequence] = field(default_factory=dict)  # by arrival
    by_flow: dict[Flow, dict[int, Sequence]] = field(default_factory=dict)  # oldest first

    def __bool__(self) -> bool:
        return bool(self.preempted or self.by_flow)


class WaitingQueue:
    """The queue of one class. A sequence is live here from `enter` to `leave`, and in between it
    may be taken out (admitted) and put back (preempted) any number of times."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._flows: dict[Flow, _Flow] = {}  # those with live sequences
        self._idle: dict[Flow, int] = {}  # counters still ahead of virtual time, oldest first
        self._num_flows_seen = 0
        self._virtual_tokens = 0  # the counter of the flow chosen last
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def enter(self, seq: Sequence) -> None:
        """A new sequence waits."""
        flow = self._flows.get(seq.flow)
        if flow is None:
            served_tokens = max(self._idle.pop(seq.flow, 0), self._virtual_tokens)
            flow = self._flows[seq.flow] = _Flow(self._num_flows_seen, served_tokens)
            self._num_flows_seen += 1
        flow.num_live += 1
        self._level(seq).by_flow.setdefault(seq.flow, {})[seq.arrival] = seq
        self._len += 1

    def leave(self, seq: Sequence) -> None:
        """The sequence, taken out already, will not come back."""
        flow = self._flows[seq.flow]
        flow.num_live -= 1
        if flow.num_live:
            return
        del self._flows[seq.flow]
        if not self._flows:  # nobody left to be fair to
            self._idle.clear()
            self._virtual_tokens = 0
        elif flow.served_tokens > self._virtual_tokens:
            self._idle[seq.flow] = flow.served_tokens
            if len(self._idle) > _MAX_IDLE_FLOWS:
                del self._idle[next(iter(self._idle))]

    def put_back(self, seq: Sequence) -> None:
        """A preempted sequence waits at the head of its priority."""
        self._level(seq).preempted[seq.arrival] = seq
        self._len += 1

    def take_out(self, seq: Sequence) -> None:
        level = self._levels[seq.submit.priority]
        if seq.arrival in level.preempted:
            del level.preempted[seq.arrival]
        else:
            waiting = level.by_flow[seq.flow]
            del waiting[seq.arrival]
            if not waiting:
                del level.by_flow[seq.flow]
        if not level:
            del self._levels[seq.submit.priority]
        self._len -= 1

    def charge(self, flow: Flow, num_tokens: int) -> None:
        self._flows[flow].served_tokens += num_tokens

    def chosen(self, flow: Flow) -> None:
        """The head of `flow` is being admitted: virtual time moves on."""
        self._virtual_tokens = max(self._virtual_tokens, self._flows[flow].served_tokens)

    @property
    def takes_turns(self) -> bool:
        """Do several flows wait at one priority? Then what is served changes the order."""
        return any(len(level.by_flow) > 1 for level in self._levels.values())

    def in_order(self) -> Iterator[Sequence]:
        """Everyone who waits, best first. Charges made between two steps of the iteration count;
        sequences may be taken out only after it."""
        for priority in sorted(self._levels):
            level = self._levels[priority]
            for arrival in sorted(level.preempted):
                yield level.preempted[arrival]
            yield from self._in_turn(level)

    def __iter__(self) -> Iterator[Sequence]:
        for level in self._levels.values():
            yield from level.preempted.values()
            for waiting in level.by_flow.values():
                yield from waiting.values()

    def _in_turn(self, level: _Level) -> Iterator[Sequence]:
        heads = [(self._flows[f], iter(w.values())) for f, w in level.by_flow.items()]
        heap = [(flow.served_tokens, flow.number, flow, waiting) for flow, waiting in heads]
        heapq.heapify(heap)
        while heap:
            served_tokens, number, flow, waiting = heap[0]
            if served_tokens != flow.served_tokens:  # charged since it was pushed
                heapq.heapreplace(heap, (flow.served_tokens, number, flow, waiting))
            elif (seq := next(waiting, None)) is None:
                heapq.heappop(heap)
            else:
                yield seq

    def _level(self, seq: Sequence) -> _Level:
        return self._levels.setdefault(seq.submit.priority, _Level())


class Queues(dict[RequestClass, WaitingQueue]):
    """The queue of each class, in the order in which classes are served."""

    def __init__(self) -> None:
        super().__init__({c: WaitingQueue() for c in CLASSES})

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.values()))

    def waiting(self) -> Iterator[Sequence]:
        """Everyone who waits, in no order that means anything."""
        return chain.from_iterable(self.values())

    def next(self, count: int, paused: Container[str]) -> list[Sequence]:
        """The `count` who are served next, best first; nobody of a service that is `paused`."""
        in_order = chain.from_iterable(queue.in_order() for queue in self.values())
        return list(islice((seq for seq in in_order if seq.service not in paused), count))
