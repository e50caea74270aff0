"""How many prompt tokens a step may hold beside sequences that decode.

A step with a long chunk of a prompt in it makes everybody who decodes wait. Sarathi-Serve (OSDI'24)
chooses one chunk size for the TBT that is wanted; here each step takes what fits, by the fitted
cost model, given who decodes in it: `engine/pace.py`.
"""

from __future__ import annotations

from typing import Protocol

from penstock.engine.scheduler.sequence import Sequence


class Pace(Protocol):
    def room(self, decodes: list[Sequence]) -> int:
        """Prompt tokens of a step in which `decodes`, at least one, decode."""


class _Unpaced:
    def room(self, decodes: list[Sequence]) -> int:
        return 1 << 30


UNPACED = _Unpaced()
