"""Where a request goes: pure functions from a view of the cluster to an explained decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from penstock.protocol.instance import Role
from penstock.protocol.request import RequestClass

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: The order of role codes in a view.
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """The instances that may take work now, as parallel arrays of length I.

    Loads are what this service has placed there plus what the instance's last `Load` says of other
    services. Cost coefficients are those of `protocol.CostModel`.
    """

    names: tuple[str, ...]
    #: Codes of `protocol.instance.Role`, in the order of `ROLES`.
    roles: Ints
    #: Prompt tokens whose sequences have had no token yet, and how many such sequences.
    queued_tokens: Floats
    queued: Floats
    #: Sequences past their first token, and their context in tokens.
    running: Floats
    running_tokens: Floats
    #: Of the step under way, from now on.
    step_left_s: Floats
    base_s: Floats
    per_token_s: Floats
    per_row_s: Floats
    per_context_token_s: Floats
    per_attention_s: Floats
    residual_s: Floats
    num_steps: Floats
    #: Actual over predicted TTFT of late, 1 until known (see `predict.py`).
    ttft_ratio: Floats
    #: Tokens that fit one step, and sequences that may run at once.
    step_tokens: Floats
    max_running: Floats
    #: Blocks that a new sequence could get (free ones and reusable ones), and the pool's size.
    free_blocks: Floats
    total_blocks: Floats
    #: Which instances share a host (equal numbers): there blocks are mapped instead of copied.
    hosts: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """One sequence. Hits are leading tokens of it that each instance of the view already has, by
    tier; all None where no index is kept."""

    #: Prompt and what was emitted before a move.
    num_tokens: int
    #: Output tokens still expected (its max_tokens, or what such requests have needed of late).
    expected_output_tokens: int = 0
    request_class: RequestClass = "online"
    #: Time left to the first token, and wanted between two; None: no SLO.
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    device_hits: Floats | None = None
    #: Those, and what lies behind them in host or disk (or store) tiers.
    tier_hits: Floats | None = None
    #: Not to be split between two instances (prompt logprobs, a single instance, ...): why; "".
    aggregated_because: str = ""
    #: Decode goes on: its prefill was there (so its KV is).
    prefilled_on: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Why an instance was chosen, or not: predicted time to first token and what it is made of."""

    instance: str
    predicted_ttft_s: float
    queue_s: float = 0.0
    prefill_s: float = 0.0
    #: Getting blocks from a peer or a slower tier.
    fetch_s: float = 0.0
    hit_tokens: int = 0
    predicted_tpot_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`candidates` are the best few, best first; the first is the choice, unless the reason says
    otherwise (`instance` is what counts)."""

    policy: str
    instance: str
    candidates: tuple[Candidate, ...]
    reason: str
    #: Where to decode, if not there.
    decode: str | None = None
    #: From whom leading blocks should be fetched, and how many tokens of them.
    source: str | None = None
    source_tokens: int = 0
    #: An instance whose role should change for this request's like (the leader may follow).
    wants_switch: str | None = None

    @property
    def predicted_ttft_s(self) -> float:
        return next(
            (c.predicted_ttft_s for c in self.candidates if c.instance == self.instance), 0.0
        )


Policy = Callable[[ClusterView, RouteRequest], Decision]

_KEPT = 4


def least_load(view: ClusterView, request: RouteRequest) -> Decision:
    """The instance with the least predicted time to first token: what waits there, plus this
    request, at the speed that the instance itself has measured. Ties go to the fewest running, then
    to the first name."""
    assert view.names, "a decision needs at least one candidate"
    work_tokens = view.queued_tokens + request.num_tokens
    ttft_s = view.base_s + work_tokens * view.per_token_s + view.running * view.per_row_s
    # Instances that have measured nothing yet compare by tokens alone.
    order = np.lexsort((np.arange(len(view.names)), view.running, work_tokens, ttft_s))[:_KEPT]
    kept = tuple(
        Candidate(instance=view.names[i], predicted_ttft_s=float(ttft_s[i])) for i in order
    )
    best = int(order[0])
    reason = (
        f"{view.names[best]} answers first: {int(view.queued_tokens[best])} tokens queued, "
        f"{int(view.running[best])} sequences running, "
        f"{1e3 * kept[0].predicted_ttft_s:.1f} ms predicted"
    )
    return Decision(policy="least-load", instance=view.names[best], candidates=kept, reason=reason)
