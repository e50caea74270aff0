"""What a policy sees and what it answers: the cluster as arrays, a request, an explained decision.

A policy is a pure function `(ClusterView, RouteRequest) -> Decision`. It holds no clock, no socket
and no memory of its own, so the same function runs in production, in tests and in the simulator,
and what it decided can be explained afterwards from what it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from penstock.protocol.instance import Role
from penstock.protocol.request import RequestClass

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

#: The order of role codes in a view.
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCosts:
    """What it takes to bring blocks to each instance: seconds once, and for each token.

    From a peer's pages on the same host (`map`), from a peer over a network (`copy`), and from the
    instance's own slower tiers (`tier`). Arrays of length I, or one number for all. The defaults
    are guesses, and cautious ones, that stand until an instance has brought something
    (`predict.TransferFitter`): without a guess nobody would ever try.
    """

    map_s: Floats | float = 2e-3
    map_token_s: Floats | float = 1e-6
    copy_s: Floats | float = 5e-3
    copy_token_s: Floats | float = 1e-4
    tier_s: Floats | float = 2e-3
    tier_token_s: Floats | float = 5e-5
    #: Of the link's own time for each token, however many share it; 0 where that is unknown.
    link_token_s: Floats | float = 0.0


@dataclass(frozen=True, slots=True)
class Speeds:
    """Cost coefficients fit for use: none negative, and those of the fleet where an instance's own
    are not believed. Arrays of length I, seconds. See `predict.speeds`."""

    base_s: Floats
    token_s: Floats
    row_s: Floats
    #: Reading a token of context, once for each row and once for each new token.
    context_s: Floats
    attention_s: Floats
    #: One more sequence that decodes: its row and its token; and each token of its context.
    decode_s: Floats
    read_s: Floats
    ratio: Floats
    believed: Bools


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """The instances that may take work now, as parallel arrays of length I.

    Loads are what this service has placed there plus what the instance's last `Load` says of other
    services. Cost coefficients are those of `protocol.CostModel`.
    """

    names: tuple[str, ...]
    #: Codes of `protocol.instance.Role`, in the order of `ROLES`.
    roles: Ints
    #: Tokens still to be computed (hits taken off) of sequences that have had no token yet, and how
    #: many such sequences.
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
    #: Mean relative error of corrected TTFT predictions of late; None: not known.
    ttft_error: Floats | None = None
    #: The share of late of each instance's time that went to prompts (`predict.PrefillShare`):
    #: what a sequence that decodes there has to expect. None: not known, taken for 0.
    prefill_share: Floats | None = None
    #: Like `queued_tokens` and `queued`, of sequences that wait behind those (`Decision.deferred`).
    #: None: nobody does.
    deferred_tokens: Floats | None = None
    deferred: Floats | None = None
    #: Of `running` and `running_tokens`: sequences that are to decode there once their prompt has
    #: been computed elsewhere. None: not known apart.
    coming: Floats | None = None
    coming_tokens: Floats | None = None
    #: Of the steps that each cost model was fitted to. None: not known, taken for many.
    prompt_tokens: Floats | None = None
    transfer: TransferCosts = field(default_factory=TransferCosts)
    #: `predict.speeds` of this view, where whoever keeps it has them: they change with heartbeats,
    #: not with requests. None: worked out for each decision.
    speeds: Speeds | None = None

    def with_role(self, i: int, role: Role) -> ClusterView:
        """The same with another role of instance `i`."""
        roles = self.roles.copy()
        roles[i] = ROLES.index(role)
        return replace(self, roles=roles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Leading tokens of a sequence on an instance that takes no work but still gives blocks away:
    it drains, is being emptied, or has just refused the sequence."""

    name: str
    tokens: int
    #: Who of the view shares its host, shape (I,).
    near: Bools


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
    #: Steps with prompts are kept this short where sequences like it decode; None: no bound.
    max_step_s: float | None = None
    device_hits: Floats | None = None
    #: Those, and what lies behind them in host or disk (or store) tiers.
    tier_hits: Floats | None = None
    #: Not to be split between two instances (prompt logprobs, a single instance, ...): why; "".
    aggregated_because: str = ""
    #: Decode goes on: its prefill was there (so its KV is).
    prefilled_on: str | None = None
    #: What instances outside the view have of it.
    held: tuple[Held, ...] = ()
    #: It has lost its instance, or leaves it: candidates say what each way of going on would take.
    interrupted: bool = False
    #: How many decisions this service has made before this one; round-robin goes by it.
    number: int = 0


#: How a sequence comes to its KV: computed (again), loaded from the instance's slower tiers, or
#: brought from a peer.
WayKind = Literal["recompute", "restore", "fetch"]


@dataclass(frozen=True, slots=True)
class Way:
    """`predicted_s` to the next token this way, `tokens` of the sequence need no computing."""

    kind: WayKind
    predicted_s: float
    tokens: int = 0
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Why an instance was chosen, or not: predicted time to first token and what it is made of.

    `predicted_ttft_s` is 0 where nothing is known to predict from.
    """

    instance: str
    predicted_ttft_s: float
    queue_s: float = 0.0
    prefill_s: float = 0.0
    #: Getting blocks from a peer or a slower tier; it goes on while the request queues.
    fetch_s: float = 0.0
    hit_tokens: int = 0
    predicted_tpot_s: float = 0.0
    #: Of an interrupted sequence: all ways there are, the fastest first.
    ways: tuple[Way, ...] = ()


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
    #: It comes too late wherever it goes: it is to wait behind those that can still be in time.
    deferred: bool = False

    @property
    def predicted_ttft_s(self) -> float:
        return next(
            (c.predicted_ttft_s for c in self.candidates if c.instance == self.instance), 0.0
        )


Policy = Callable[[ClusterView, RouteRequest], Decision]

#: Candidates that a decision names.
KEPT = 4


def some(marks: Bools | Floats) -> bool:
    """Is any of them set (or not 0)? A tenth of what `any` takes on a thousand instances."""
    return bool(np.count_nonzero(marks))


def every(marks: Bools) -> bool:
    return int(np.count_nonzero(marks)) == marks.size


def best_few(score: Floats, keep: int = KEPT) -> list[int]:
    """Places of the smallest scores, best first. A tie for the best goes to the first place."""
    first = int(score.argmin())
    few = score.argpartition(keep)[:keep] if len(score) > keep else np.arange(len(score))
    ranked = sorted(zip(score[few].tolist(), few.tolist()))
    return [first, *(i for _, i in ranked if i != first)][:keep]
