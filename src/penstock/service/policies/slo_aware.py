"""Routing by service level, after the two levels of the xLLM report, and prefill apart from decode
where that is predicted to be better (docs/design/policies.md).

For each request two plans are compared, both in seconds:

* *together*: prefill and decode on one instance;
* *apart*: prefill on an instance of the prefill pool, decode on one of the decode pool, blocks
  moved between them while the prompt is computed.

A plan costs what the request itself waits, plus what it makes others wait: a prompt holds up those
that decode on the same instance for as long as it computes. The plan that breaks fewer SLOs wins,
then the cheaper one. Roles are soft: a pool without an instance is all instances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.protocol.instance import Role
from penstock.service.policies import predict
from penstock.service.policies.kv_aware import explain
from penstock.service.policies.outlook import Outlook, look
from penstock.service.policies.view import (
    ROLES,
    Bools,
    ClusterView,
    Decision,
    Floats,
    RouteRequest,
)


def slo_aware(view: ClusterView, request: RouteRequest) -> Decision:
    assert view.names, "a decision needs at least one candidate"
    o = look(view, request)
    if request.prefilled_on in view.names:
        return _after_prefill(o, request, view.names.index(request.prefilled_on or ""))
    together = _together(o, request)
    why = request.aggregated_because or _why_not_split(view)
    if why:
        return _decision(o, request, together, f"together because {why}")
    apart = _apart(o, request)
    best, other = sorted((together, apart), key=lambda plan: (plan.broken, plan.cost_s))
    return _decision(o, request, best, _compare(best, other), _wanted_switch(o, request, best))


@dataclass(frozen=True, slots=True)
class _Plan:
    prefill: int
    decode: int
    #: SLOs that are predicted to be missed, the request's own and those of the sequences it joins.
    broken: int
    #: What the request waits, and what it makes others wait.
    own_s: float
    others_s: float
    transfer_s: float
    tpot_s: float
    #: By instance, for the list of candidates.
    score: Floats

    @property
    def cost_s(self) -> float:
        return self.own_s + self.others_s

    @property
    def name(self) -> str:
        return "together" if self.prefill == self.decode else "apart"


# --- pools ---------------------------------------------------------------------------------------


def pool(view: ClusterView, *roles: Role) -> Bools:
    """Instances whose role is one of these."""
    found: Bools = np.isin(view.roles, [ROLES.index(role) for role in roles])
    return found


def _first_pool(pools: tuple[Bools, ...]) -> Bools:
    """The first one with an instance in it; any instance, if none has."""
    return next((p for p in pools if p.any()), np.ones_like(pools[0]))


def _why_not_split(view: ClusterView) -> str:
    if len(view.names) < 2:
        return "there is one instance only"
    if not pool(view, "prefill", "decode").any():
        return "no instance has a role"
    return ""


# --- plans ---------------------------------------------------------------------------------------


def _together(o: Outlook, request: RouteRequest) -> _Plan:
    """Prefill and decode on the one instance where that costs least."""
    view = o.view
    output = max(request.expected_output_tokens, 1)
    tpot = predict.tpot_s(view, o.speeds, request.num_tokens)
    own = o.ttft_s + output * tpot
    others = view.running * o.prefill_s + output * _slows(o, request.num_tokens)
    broken = _late(o, request).astype(np.float64)
    if request.tpot_slo_s is not None:
        holds_up = (view.running > 0) & (_mixed_step_s(o) > request.tpot_slo_s)
        broken += (tpot > request.tpot_slo_s) | holds_up
    score = own + others + np.where(pool(view, "encode"), np.inf, 0.0)
    if not np.isfinite(score).any():
        score = own + others
    i = _lexmin(broken, score)
    return _Plan(i, i, int(broken[i]), float(own[i]), float(others[i]), 0.0, float(tpot[i]), score)


def _apart(o: Outlook, request: RouteRequest) -> _Plan:
    """Prefill where the report's first level says, decode where its second level does."""
    view = o.view
    output = max(request.expected_output_tokens, 1)
    p, late = _prefill_place(o, request)
    d, tpot, over = _decode_place(o, request, besides=p)
    transfer_s = _transfer_s(o, request.num_tokens, p, d)
    own = float(o.ttft_s[p]) + transfer_s + output * tpot
    others = float(view.running[p] * o.prefill_s[p] + output * _slows(o, request.num_tokens)[d])
    broken = int(late) + int(over)
    if request.tpot_slo_s is not None and not over:
        holds_up = view.running[p] > 0 and _mixed_step_s(o)[p] > request.tpot_slo_s
        broken += int(holds_up)
    return _Plan(p, d, broken, own, others, transfer_s, tpot, _work_s(o))


def _prefill_place(o: Outlook, request: RouteRequest) -> tuple[int, bool]:
    """First level: the least queue whose TTFT holds, in P, then in D→P; without one, the least
    TTFT of both, and True for late."""
    view = o.view
    mine = pool(view, "prefill", "any")
    turning = pool(view, "decode_to_prefill")
    late = _late(o, request)
    for members in (mine, turning):
        holding = members & ~late
        if holding.any():
            return int(np.where(holding, _work_s(o), np.inf).argmin()), False
    members = _first_pool((mine | turning,))
    return int(np.where(members, o.ttft_s, np.inf).argmin()), True


def _decode_place(
    o: Outlook, request: RouteRequest, *, besides: int | None = None
) -> tuple[int, float, bool]:
    """Second level: in D, then in P→D, the fewest running tokens under the fitted limit; without
    one, the least TPOT, and True for over. Returns (instance, its TPOT, over)."""
    view, n = o.view, request.num_tokens
    tpot = predict.tpot_s(view, o.speeds, n)
    over = _over_limit(o, request)
    free = np.ones_like(over)
    if besides is not None and len(view.names) > 1:
        free[besides] = False
    mine = pool(view, "decode", "any") & free
    turning = pool(view, "prefill_to_decode") & free
    for members in (mine, turning):
        holding = members & ~over
        if holding.any():
            i = int(np.where(holding, view.running_tokens, np.inf).argmin())
            return i, float(tpot[i]), False
    members = _first_pool((mine | turning, free))
    i = int(np.where(members, tpot, np.inf).argmin())
    return i, float(tpot[i]), bool(over[i])


def _after_prefill(o: Outlook, request: RouteRequest, p: int) -> Decision:
    """Where to go on: there, if it is to decode at all and holds the SLO; else by second level."""
    view, n = o.view, request.num_tokens
    output = max(request.expected_output_tokens, 1)
    d, tpot, over = _decode_place(o, request, besides=p)
    tpots = predict.tpot_s(view, o.speeds, n)
    transfer_s = _transfer_s(o, n, p, d)
    slows = _slows(o, n)
    stay_s = output * float(tpots[p] + slows[p])
    go_s = transfer_s + output * float(tpot + slows[d])
    stays = bool(~_over_limit(o, request)[p]) and (over or stay_s <= go_s)
    chosen = p if stays or d == p else d
    if chosen == p:
        reason = f"{view.names[p]} goes on decoding what it prefilled"
    else:
        reason = f"{view.names[d]} decodes what {view.names[p]} prefilled"
    reason += (
        f": {1e3 * stay_s:.1f} ms to the end there, {1e3 * go_s:.1f} ms on {view.names[d]} "
        f"({int(view.running_tokens[d])} tokens running) with {1e3 * transfer_s:.1f} ms of transfer"
    )
    return Decision(
        policy="slo-aware",
        instance=view.names[chosen],
        candidates=tuple(o.candidate(i, n) for i in dict.fromkeys((chosen, p, d))),
        reason=reason + o.doubt(chosen),
        source=None if chosen == p else view.names[p],
        source_tokens=0 if chosen == p else n,
        wants_switch=_switch_to_decode(o) if over and not stays else None,
    )


# --- numbers -------------------------------------------------------------------------------------


def _late(o: Outlook, request: RouteRequest) -> Bools:
    slo_s = np.inf if request.ttft_slo_s is None else request.ttft_slo_s
    late: Bools = o.ttft_s > slo_s
    return late


def _over_limit(o: Outlook, request: RouteRequest) -> Bools:
    """Would this sequence be one too many for the TPOT wanted?"""
    view, n = o.view, request.num_tokens
    if request.tpot_slo_s is None:
        over: Bools = np.zeros(len(view.names), dtype=np.bool_)
        return over
    total = view.running_tokens + n
    mean = total / (view.running + 1.0)
    over = total > predict.tpot_limit_tokens(view, o.speeds, request.tpot_slo_s, mean)
    return over


def _work_s(o: Outlook) -> Floats:
    """The queue that the request would leave behind: what is there and what it brings. Its own work
    is counted, or a cached prefix would be worth nothing."""
    work: Floats = o.speeds.ratio * (o.queues.queue_s + o.prefill_s)
    return work


def _mixed_step_s(o: Outlook) -> Floats:
    """A step that is filled up with prompt tokens."""
    step: Floats = o.queues.step_s + o.queues.room * o.speeds.token_s + o.speeds.row_s
    return step


def _slows(o: Outlook, num_tokens: int) -> Floats:
    """By how much one more sequence delays all others together, for each token it decodes."""
    s = o.speeds
    slows: Floats = s.row_s + s.token_s + num_tokens * (s.context_s + s.attention_s)
    return slows * o.view.running


def _transfer_s(o: Outlook, num_tokens: int, p: int, d: int) -> float:
    """From the first token on p to the next step on d, as far as it shows: blocks go as chunks
    finish, so what shows is the last chunk, or what the link is slower than the prefill; then the
    sequence waits for the step under way."""
    view, t = o.view, o.view.transfer
    if p == d:
        return 0.0
    near = view.hosts[p] == view.hosts[d]
    once, token = (t.map_s, t.map_token_s) if near else (t.copy_s, t.copy_token_s)
    once_s, token_s = (float(np.broadcast_to(x, view.hosts.shape)[d]) for x in (once, token))
    last = min(num_tokens, float(o.queues.room[p]))
    shows_s = max(last * token_s, num_tokens * token_s - float(o.prefill_s[p]))
    return once_s + shows_s + 0.5 * float(o.queues.step_s[d])


def _lexmin(first: Floats, then: Floats) -> int:
    """The place of the least `then` among those of the least `first`."""
    return int(np.where(first == first.min(), then, np.inf).argmin())


# --- words ---------------------------------------------------------------------------------------


def _decision(
    o: Outlook, request: RouteRequest, plan: _Plan, because: str, switch: str | None = None
) -> Decision:
    view, p, n = o.view, plan.prefill, request.num_tokens
    source, source_tokens = o.source_of(p)
    kept = tuple(o.candidates(plan.score, n))
    if view.names[p] != kept[0].instance:
        kept = (o.candidate(p, n), *(c for c in kept if c.instance != view.names[p]))[:4]
    decode = None if plan.decode == p else view.names[plan.decode]
    return Decision(
        policy="slo-aware",
        instance=view.names[p],
        candidates=kept,
        reason=f"{explain(o, p, request)}; {because}{o.doubt(p)}",
        decode=decode,
        source=source,
        source_tokens=source_tokens,
        wants_switch=switch,
    )


def _compare(best: _Plan, other: _Plan) -> str:
    def words(plan: _Plan) -> str:
        moved = f", {1e3 * plan.transfer_s:.1f} ms of transfer" if plan.transfer_s else ""
        return (
            f"{1e3 * plan.own_s:.1f} ms for itself and {1e3 * plan.others_s:.1f} ms for others"
            f"{moved}, {1e3 * plan.tpot_s:.2f} ms a token, {plan.broken} SLOs broken"
        )

    return f"{best.name} ({words(best)}) rather than {other.name} ({words(other)})"


def _wanted_switch(o: Outlook, request: RouteRequest, plan: _Plan) -> str | None:
    """Nobody holds the TTFT: one that decodes should turn to prefill. Nobody holds the TPOT: the
    other way round."""
    if not plan.broken:
        return None
    if _late(o, request)[plan.prefill]:
        return _switch_to_prefill(o)
    if _over_limit(o, request)[plan.decode]:
        return _switch_to_decode(o)
    return None


def _switch_to_prefill(o: Outlook) -> str | None:
    decoding = pool(o.view, "decode")
    if decoding.sum() < 2:
        return None
    return o.view.names[int(np.where(decoding, o.view.running_tokens, np.inf).argmin())]


def _switch_to_decode(o: Outlook) -> str | None:
    prefilling = pool(o.view, "prefill")
    if prefilling.sum() < 2:
        return None
    return o.view.names[int(np.where(prefilling, o.queues.queue_s, np.inf).argmin())]
