"""Where a request goes: pure functions from a view of the cluster to an explained decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The instances that may take work now, as parallel arrays.

    `queued_tokens` are prompt tokens sent to an instance whose first output token has not come
    back, `running` sequences past that point. Cost coefficients are those of `protocol.CostModel`.
    """

    names: tuple[str, ...]
    queued_tokens: Floats
    running: Floats
    base_s: Floats
    per_token_s: Floats
    per_row_s: Floats


@dataclass(frozen=True, slots=True)
class RouteRequest:
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Candidate:
    instance: str
    predicted_ttft_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """`candidates` are the best few, best first; the first is the choice."""

    policy: str
    candidates: tuple[Candidate, ...]
    reason: str

    @property
    def instance(self) -> str:
        return self.candidates[0].instance


Policy = Callable[[ClusterView, RouteRequest], Decision]

_KEPT = 4


def least_load(view: ClusterView, request: RouteRequest) -> Decision:
    """The instance with the least predicted time to first token: what waits there, plus this
    request, at the speed that the instance itself has measured. Ties go to the fewest running, then
    to the first name."""
    assert view.names, "a decision needs at least one candidate"
    work_tokens = view.queued_tokens + request.new_tokens
    ttft_s = view.base_s + work_tokens * view.per_token_s + view.running * view.per_row_s
    # Instances that have measured nothing yet compare by tokens alone.
    order = np.lexsort((np.arange(len(view.names)), view.running, work_tokens, ttft_s))[:_KEPT]
    kept = tuple(Candidate(view.names[i], float(ttft_s[i])) for i in order)
    best = int(order[0])
    reason = (
        f"{view.names[best]} answers first: {int(view.queued_tokens[best])} tokens queued, "
        f"{int(view.running[best])} sequences running, "
        f"{1e3 * kept[0].predicted_ttft_s:.1f} ms predicted"
    )
    return Decision("least-load", kept, reason)
