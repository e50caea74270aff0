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

from dataclasses import dataclass, replace

import numpy as np

from penstock.service.policies import predict
from penstock.service.policies.kv_aware import explain
from penstock.service.policies.outlook import Outlook, look
from penstock.service.policies.pools import (
    DECODE,
    ENCODE,
    FOR_PROMPTS,
    PREFILL,
    TURNING_TO_DECODE,
    TURNING_TO_PREFILL,
    first_pool,
    least,
    why_not_split,
)
from penstock.service.policies.view import (
    ROLES,
    Bools,
    ClusterView,
    Decision,
    Floats,
    RouteRequest,
    best_few,
    some,
)


def slo_aware(view: ClusterView, request: RouteRequest) -> Decision:
    return _in_time_or_deferred(view, request, always_apart=False)


def split(view: ClusterView, request: RouteRequest) -> Decision:
    """The same, but always apart where there are pools for it: what a fixed split of prefill and
    decode means in other systems."""
    return replace(_in_time_or_deferred(view, request, always_apart=True), policy="split")


def _in_time_or_deferred(view: ClusterView, request: RouteRequest, always_apart: bool) -> Decision:
    """Who comes too late wherever it goes is put behind those that can still be in time: otherwise
    it would make them late too, and a burst would spoil all that follows it."""
    decision = _decide(view, request, always_apart)
    slo_s = request.ttft_slo_s
    if slo_s is None or request.prefilled_on is not None:
        return decision
    if decision.predicted_ttft_s <= _IN_TIME * slo_s:
        return decision
    late = _decide(_behind_all(view), request, always_apart)
    return replace(late, deferred=True, reason=f"{late.reason}; too late, so behind the others")


def _behind_all(view: ClusterView) -> ClusterView:
    """As one sees it who waits behind those that were deferred before."""
    if view.deferred_tokens is None or view.deferred is None:
        return view
    return replace(
        view,
        queued_tokens=view.queued_tokens + view.deferred_tokens,
        queued=view.queued + view.deferred,
    )


def _decide(view: ClusterView, request: RouteRequest, always_apart: bool) -> Decision:
    assert view.names, "a decision needs at least one candidate"
    stakes = _Stakes.of(_when_it_decodes(look(view, request), request), request)
    if request.prefilled_on is not None:
        return _after_prefill(stakes, request.prefilled_on, may_stay=not always_apart)
    why = request.aggregated_because or why_not_split(view)
    if why:
        together = _together(stakes)
        return _decision(stakes, together, f"prefill and decode together, since {why}")
    apart = _apart(stakes)
    if always_apart:
        return _decision(stakes, apart, "always apart")
    # Each stage in its pool while that holds: what a pool can do within the SLOs is lost where
    # stages mix, so that mixing is for a light load, where it saves the way, and for want.
    by_cost = request.ttft_slo_s is None or request.tpot_slo_s is None or _has_room(stakes)
    if not by_cost and not apart.broken:
        return _decision(stakes, apart, f"{_words(apart)}, each stage in its pool")
    best, other = sorted(
        (apart, _together(stakes)), key=lambda plan: (plan.broken, plan.cost_s if by_cost else 0.0)
    )
    return _decision(stakes, best, f"{_words(best)} rather than {_words(other)}")


def _has_room(k: _Stakes) -> bool:
    """Whether those who prefill have time to spare."""
    view = k.look.view
    members = PREFILL[view.roles]
    if view.prefill_share is None or not some(members):
        return False
    return float(view.prefill_share[members].mean()) < _LIGHT


def _when_it_decodes(o: Outlook, request: RouteRequest) -> Outlook:
    """Who is still to come is not there all at once, and by then others have gone: who decodes goes
    at a rate of one in the time that an answer takes, and who is to come does so evenly over the
    time that prompts wait. Whoever finds all slots taken waits until enough of them have gone; that
    is too long for the TPOT if it is for a short answer, which has few tokens to share it among."""
    view, s, tpot_s, running = o.view, o.speeds, o.tpot_s, o.view.running
    if view.coming is not None and view.coming_tokens is not None and some(view.coming):
        prefilling = PREFILL[view.roles]
        waits_s = float((o.ttft_s[prefilling] if some(prefilling) else o.ttft_s).min())
        answer_s = max(request.expected_output_tokens, 1) * np.maximum(tpot_s, 1e-9)
        answers = np.maximum(waits_s / answer_s, 1e-9)
        gone = -np.expm1(-answers)
        gone_of_coming = 1.0 - gone / answers
        less = gone * (running - view.coming) + gone_of_coming * view.coming
        less_tokens = gone * (view.running_tokens - view.coming_tokens)
        less_tokens += gone_of_coming * view.coming_tokens
        tpot_s = np.maximum(tpot_s - less * s.decode_s - less_tokens * s.read_s, s.base_s)
        running = running - less
    before = running + 1.0 - view.max_running
    if float(before.max()) > 0.0:
        tpot_s = tpot_s * (1.0 + np.maximum(before, 0.0) / (_SHORT_ANSWER * view.max_running))
    return o if tpot_s is o.tpot_s else replace(o, tpot_s=tpot_s)


# --- numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stakes:
    """What placing the request on each instance would mean. Arrays of length I."""

    look: Outlook
    request: RouteRequest
    #: Output tokens to count with, at least one.
    output: int
    #: TTFT not in time; TPOT too long, by the mean or because steps with prompts are and prompts
    #: are what comes there; and the request's own prompt makes steps too long for who decodes.
    late: Bools
    over: Bools
    holds_up: Bools
    #: How much longer all that decode there wait, together: for the prompt; for each output token.
    prompt_delays_s: Floats
    token_delays_s: Floats
    #: What prompts there lose by shorter steps, for as long as the request decodes.
    paced_s: Floats

    @classmethod
    def of(cls, o: Outlook, request: RouteRequest) -> _Stakes:
        view, s, q, n = o.view, o.speeds, o.queues, request.num_tokens
        ttft_slo_s = np.inf if request.ttft_slo_s is None else request.ttft_slo_s
        over = holds_up = np.zeros(len(view.names), dtype=np.bool_)
        mixed_s = q.prompt_step_s + q.room * s.token_s
        if request.tpot_slo_s is not None:
            over = o.tpot_s > request.tpot_slo_s
            holds_up = q.prompt_step_s + np.minimum(q.room, n) * s.token_s > request.tpot_slo_s
            holds_up &= view.running > 0.0
        # After the queue comes the prompt. (Some of that may be waiting for blocks, which holds
        # nobody up, but is never more than computing them.) Its steps would have been there for
        # the others without it; how much longer they are is what it costs them.
        prompt_s = o.ttft_s / s.ratio - q.queue_s
        longer_s = np.maximum(
            prompt_s - np.ceil(prompt_s / np.maximum(mixed_s, 1e-9)) * q.step_s, 0.0
        )
        return cls(
            o,
            request,
            max(request.expected_output_tokens, 1),
            o.ttft_s > ttft_slo_s,
            over,
            holds_up,
            view.running * longer_s,
            view.running * (s.decode_s + n * s.read_s),
            _paced_s(o, request),
        )

    def transfer_s(self, p: int, d: int) -> float:
        """From the first token on p to the next step on d, as far as it shows: blocks go as chunks
        finish, so what shows is the last chunk, or what the link is slower than the prefill; then
        the sequence waits for the step under way."""
        o, n = self.look, self.request.num_tokens
        view, t = o.view, o.view.transfer
        if p == d:
            return 0.0
        near = view.hosts[p] == view.hosts[d]
        once, token = (t.map_s, t.map_token_s) if near else (t.copy_s, t.copy_token_s)
        once_s = float(once[d] if isinstance(once, np.ndarray) else once)
        token_s = float(token[d] if isinstance(token, np.ndarray) else token)
        last = min(float(n), float(o.queues.room[p]))
        prefill_s = float(o.prefill_WI[o.way(p), p])
        shows_s = max(last * token_s, n * token_s - prefill_s)
        return once_s + shows_s + 0.5 * float(o.queues.step_s[d])

    def decode_cost_s(self, i: int) -> float:
        """All output tokens on instance `i`: for the request and for those it joins."""
        ahead_s = self.output * float(self.look.tpot_s[i] + self.token_delays_s[i])
        return ahead_s + float(self.paced_s[i])


def _paced_s(o: Outlook, request: RouteRequest) -> Floats:
    """While somebody decodes, steps are paced for the TPOT and take fewer prompt tokens than they
    could: that time is lost to all prompts that queue there or will. Shared by all who decode."""
    view, s, q = o.view, o.speeds, o.queues
    step_s, share = request.max_step_s, view.prefill_share
    if step_s is None or share is None:
        return np.zeros(len(view.names))
    share = np.minimum(share, predict.MAX_SHARE)
    token_s = s.base_s / view.step_tokens + s.token_s
    paced = predict.paced_tokens(view, s, q.step_s, step_s)
    useful = np.minimum(np.minimum(paced, view.step_tokens) * token_s / step_s, 1.0)
    decoding_s = max(request.expected_output_tokens, 1) * o.tpot_s / (view.running + 1.0)
    lost: Floats = decoding_s * share * (1.0 - useful)
    return lost * (view.queued + 1.0 / (1.0 - share))


#: Worse than any cost: a million seconds for each SLO that is missed.
_BROKEN_S = 1e6
#: Of the TTFT wanted: predictions err, and who is placed to be just in time is late half the time.
_IN_TIME = 0.85
#: Of the usual answer: nine of ten are longer, where lengths are exponential.
_SHORT_ANSWER = 0.1
#: The share of their time that prompts take at those who prefill, below which the load is light.
_LIGHT = 0.05


# --- plans ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    prefill: int
    decode: int
    #: SLOs predicted to be missed, the request's own and those of the sequences it joins.
    broken: int
    #: What the request waits, and what it makes others wait.
    own_s: float
    others_s: float
    transfer_s: float
    #: By instance, for the list of candidates.
    score: Floats

    @property
    def cost_s(self) -> float:
        return self.own_s + self.others_s


def _together(k: _Stakes) -> _Plan:
    """Prefill and decode on the one instance where that costs least."""
    o = k.look
    own = o.ttft_s + k.output * o.tpot_s
    others = k.prompt_delays_s + k.output * k.token_delays_s + k.paced_s
    cost = own + others
    broken = k.late.astype(np.float64) + k.over + k.holds_up
    # Broken SLOs go before any cost, and an instance that encodes is the last resort.
    score = cost + _BROKEN_S * (broken + 4.0 * ENCODE[o.view.roles])
    i = int(score.argmin())
    return _Plan(i, i, int(broken[i]), float(own[i]), float(others[i]), 0.0, score)


def _apart(k: _Stakes) -> _Plan:
    """Prefill where the report's first level says, decode where its second level does."""
    o = k.look
    p = _prefill_place(k)
    d = _decode_place(k, besides=p)
    transfer_s = k.transfer_s(p, d)
    own_s = float(o.ttft_s[p]) + transfer_s + k.output * float(o.tpot_s[d])
    others_s = float(k.prompt_delays_s[p] + k.paced_s[d]) + k.output * float(k.token_delays_s[d])
    over = bool(k.over[d])
    if k.request.tpot_slo_s is not None:
        over |= transfer_s > k.output * (k.request.tpot_slo_s - float(o.tpot_s[d]))
    broken = int(k.late[p]) + int(over) + int(k.holds_up[p])
    return _Plan(p, d, broken, own_s, others_s, transfer_s, o.ttft_s)


def _prefill_place(k: _Stakes) -> int:
    """First level: in P, then in D→P, the least queue whose TTFT holds; if nobody holds it, the
    least of both. The request's own work counts as queued with the rest, or a cached prefix would
    be worth nothing: so the least queue is the least TTFT."""
    roles, ttft_s = k.look.view.roles, k.look.ttft_s
    mine, turning = PREFILL[roles], TURNING_TO_PREFILL[roles]
    p = least(ttft_s, mine)
    if k.late[p] or not mine[p]:
        p = least(ttft_s, mine | turning)
    return p


def _decode_place(k: _Stakes, *, besides: int | None) -> int:
    """Second level: in D, then in P→D, the fewest running tokens within the TPOT; if nobody holds
    it, the least TPOT of both."""
    view = k.look.view
    others = first_pool(view, besides=besides)
    pool = (DECODE | TURNING_TO_DECODE)[view.roles] & others
    for members in (DECODE, TURNING_TO_DECODE):
        holding = members[view.roles] & others & ~k.over
        if some(holding):
            return least(view.running_tokens, holding)
    return least(k.look.tpot_s, pool if some(pool) else others)


def _after_prefill(k: _Stakes, prefilled_on: str, may_stay: bool) -> Decision:
    """The second level with the KV at hand: stay where the prefill was if the TPOT holds there (or
    nowhere) and going costs more; else go."""
    o, n = k.look, k.request.num_tokens
    names = o.view.names
    p = names.index(prefilled_on) if prefilled_on in names else None
    d = _decode_place(k, besides=p)
    where = f"{names[d]} ({int(o.view.running_tokens[d])} tokens running)"
    chosen, switch = d, None
    if p is None:
        reason = f"{names[d]} goes on: {prefilled_on}, where it was, takes no work; {where} has the"
        reason += f" fewest, {1e3 * float(o.tpot_s[d]):.2f} ms a token"
    else:
        transfer_s = k.transfer_s(p, d)
        stay_s, go_s = k.decode_cost_s(p), transfer_s + k.decode_cost_s(d)
        over_p, over_d = bool(k.over[p]), bool(k.over[d])
        stays = may_stay and (over_p, stay_s) <= (over_d, go_s)
        # Whoever decodes among prompts slows all of them down.
        if k.request.tpot_slo_s is not None and FOR_PROMPTS[o.view.roles[p]] and not _has_room(k):
            stays = stays and over_d
        chosen = p if stays or d == p else d
        reason = (
            f"{names[chosen]} goes on with what {names[p]} prefilled: {1e3 * stay_s:.1f} ms to the "
            f"end on {names[p]} ({1e3 * float(o.tpot_s[p]):.2f} ms a token), {1e3 * go_s:.1f} ms "
            f"on {where} with {1e3 * transfer_s:.1f} ms of transfer"
        )
    if k.over[chosen]:
        switch = _to_decode(k)
        reason += _limit_words(k, chosen)
    source, source_tokens = (None, 0) if chosen == p else (prefilled_on, n)
    if p is None and k.request.held:  # whether fetching is worth it is a matter of time as well
        source, source_tokens = o.source_of(chosen)
    return Decision(
        policy="slo-aware",
        instance=names[chosen],
        candidates=o.candidates(dict.fromkeys(i for i in (chosen, p, d) if i is not None)),
        reason=reason + o.doubt(chosen),
        source=source,
        source_tokens=source_tokens,
        wants_switch=switch,
    )


# --- switches -------------------------------------------------------------------------------------


def _wanted_switch(k: _Stakes, plan: _Plan) -> str | None:
    """Nobody holds the TTFT: one that decodes should turn to prefill. Nobody holds the TPOT: the
    other way round."""
    if k.late[plan.prefill]:
        return _to_prefill(k)
    return _to_decode(k) if k.over[plan.decode] else None


def _to_prefill(k: _Stakes) -> str | None:
    view = k.look.view
    decoding = view.roles == ROLES.index("decode")
    if decoding.sum() < 2:
        return None
    return view.names[least(view.running_tokens, decoding)]


def _to_decode(k: _Stakes) -> str | None:
    view = k.look.view
    prefilling = view.roles == ROLES.index("prefill")
    if prefilling.sum() < 2:
        return None
    return view.names[least(k.look.queues.queue_s, prefilling)]


# --- words ----------------------------------------------------------------------------------------


def _decision(k: _Stakes, plan: _Plan, because: str) -> Decision:
    o, p = k.look, plan.prefill
    source, source_tokens = o.source_of(p)
    places = [p, *(i for i in best_few(plan.score) if i != p)][:4]
    return Decision(
        policy="slo-aware",
        instance=o.view.names[p],
        candidates=o.candidates(places),
        reason=f"{explain(o, p, k.request)}; {because}{o.doubt(p)}",
        decode=None if plan.decode == p else o.view.names[plan.decode],
        source=source,
        source_tokens=source_tokens,
        wants_switch=_wanted_switch(k, plan) if plan.broken else None,
    )


def _words(plan: _Plan) -> str:
    name = "together" if plan.prefill == plan.decode else "apart"
    moved = f", {1e3 * plan.transfer_s:.1f} ms of it transfer" if plan.transfer_s else ""
    return (
        f"{name} ({1e3 * plan.own_s:.1f} ms for itself{moved}, {1e3 * plan.others_s:.1f} ms "
        f"for others, {plan.broken} SLOs missed)"
    )


def _limit_words(k: _Stakes, i: int) -> str:
    view, slo_s = k.look.view, k.request.tpot_slo_s
    assert slo_s is not None
    mean = float((view.running_tokens[i] + k.request.num_tokens) / (view.running[i] + 1.0))
    limit = predict.tpot_limit_tokens(view, k.look.speeds, slo_s, mean)[i]
    return f"; nobody holds {1e3 * slo_s:g} ms a token, for which {limit:.0f} may run there"
