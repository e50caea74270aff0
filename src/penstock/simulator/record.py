"""What clients of a run saw, in columns: a run may have millions of them."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np

from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import PenstockError
from penstock.service.generation import TokenDelta
from penstock.simulator.gaps import GapHistogram
from penstock.simulator.world import World

_COLUMNS = ("arrival_s", "first_s", "end_s", "input_tokens", "output_tokens", "cached_tokens")


class Records:
    """Times are world seconds after `start_s`; NaN: it never came to that."""

    def __init__(self, world: World, start_s: float) -> None:
        self.world, self.start_s = world, start_s
        self.gaps = GapHistogram()
        self.arrival_s, self.first_s, self.end_s = array("d"), array("d"), array("d")
        self.input_tokens, self.output_tokens = array("d"), array("d")
        self.cached_tokens = array("d")
        self.finish: list[str] = []
        self.last_word_s = 0.0

    def __len__(self) -> int:
        return len(self.finish)

    def add(self, request: TraceRequest) -> Caller:
        """The next request, and who makes it."""
        self.arrival_s.append(request.arrival_s)
        self.first_s.append(math.nan)
        self.end_s.append(math.nan)
        self.input_tokens.append(request.input_tokens)
        self.output_tokens.append(0)
        self.cached_tokens.append(0)
        self.finish.append("")
        return Caller(self, len(self.finish) - 1)

    def columns(self) -> dict[str, Any]:
        """Fields of `Outcome`."""
        found = {name: np.array(getattr(self, name), np.float64) for name in _COLUMNS}
        return found | {"finish": self.finish}


class Caller:
    """The client of one request; it lives as long as that."""

    __slots__ = ("_last_s", "_records", "_row", "_tokens")

    def __init__(self, records: Records, row: int) -> None:
        self._records, self._row = records, row
        self._tokens, self._last_s = 0, 0.0

    def take(self, delta: TokenDelta) -> None:
        records, row = self._records, self._row
        now = records.last_word_s = records.world.now
        if count := len(delta.ids):
            if self._tokens:
                records.gaps.add((now - self._last_s) / count, count)
            else:
                records.first_s[row] = now - records.start_s
                records.cached_tokens[row] = delta.cached_tokens or 0
            self._tokens += count
            self._last_s = now
        if delta.finish is not None:
            assert not records.finish[row], "a second terminal reply"
            records.finish[row] = delta.finish
            records.end_s[row] = now - records.start_s
            records.output_tokens[row] = self._tokens

    def refused(self, error: PenstockError) -> None:
        self._records.finish[self._row] = "refused"
