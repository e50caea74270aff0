"""Which instances prefill and which decode: a pure function from what is seen and expected to the
next change of role, at most one at a time.

Each split of the instances is judged by its *pressure*: how much of what its pools can do within
the SLOs the expected work asks for, in the pool that is asked for more. 1 is as much as holds. The
target is the split of least pressure; an instance is turned only once the target has looked better
by `margin` for `patience_s`. docs/design/policies.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from penstock.protocol.instance import Role
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.policies import predict
from penstock.service.policies.forecast import Work
from penstock.service.policies.view import ROLES, Bools, ClusterView, Floats, Speeds

ANY, PREFILL, DECODE = ROLES.index("any"), ROLES.index("prefill"), ROLES.index("decode")
ENCODE = ROLES.index("encode")
#: Of the TPOT: what pools are planned for.
_PACED = 0.9
P_TO_D, D_TO_P = ROLES.index("prefill_to_decode"), ROLES.index("decode_to_prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolesConfig:
    """`static` fixes the number of prefill instances and of decode instances (the rest stay any);
    without it the split follows the work."""

    static: tuple[int, int] | None = None
    #: Never fewer than these, once instances have roles and while there are that many.
    min_prefill: int = 1
    min_decode: int = 1
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    #: How long, and by what share, another split must look better before an instance is turned;
    #: and how long after a turn no other one begins.
    patience_s: float = 2.0
    margin: float = 0.1
    pause_s: float = 5.0
    #: Below this pressure nobody needs roles: instances without any stay so.
    light_load: float = 0.3
    #: An instance that has not taken its role after this long is given the old one back; so is one
    #: that has not emptied itself while it turned.
    take_s: float = 2.0
    turning_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What an instance was told to become, when, and what it was before."""

    name: str
    at_s: float
    before: Role
    to: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleState:
    """What one decision leaves for the next one; begin with `RoleState()`."""

    #: Since when a split with `better_prefill` prefill instances has looked better.
    better_since_s: float | None = None
    better_prefill: int = -1
    #: When the last turn began or ended, and those that have not come to their end.
    turned_s: float = -np.inf
    turns: tuple[Turn, ...] = ()

    def turned(self, turn: Turn) -> RoleState:
        """What was watched for a better split begins anew."""
        turns = (*(t for t in self.turns if t.name != turn.name), turn)
        return RoleState(turned_s=turn.at_s, turns=turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolePlan:
    """The next change (`instance` to `role`; None: all stay), and the target behind it."""

    num_prefill: int
    num_decode: int
    reason: str
    instance: str | None = None
    role: Role | None = None
    #: The change takes back one that did not take.
    rollback: bool = False
    #: Pressure of the present split and of the target.
    pressure: float = 0.0
    target_pressure: float = 0.0
    state: RoleState = field(default_factory=RoleState)


def decide_roles(
    view: ClusterView, work: Work, state: RoleState, config: RolesConfig, now: float
) -> RolePlan:
    """`work` is `Forecast.work(now)`; `now` is only compared with times in `state`."""
    state = replace(state, turns=tuple(t for t in state.turns if not _is_over(view, t)))
    if (plan := _rolled_back(view, state, config, now)) is not None:
        return plan
    if (plan := _turned(view, state, now)) is not None:
        return plan
    pools = _Pools.of(view)
    total = int((~pools.encode).sum())
    if total < 2:
        return _stay(pools, state, "one instance prefills and decodes")
    load = Loads.of(view, work, config)
    if config.static is not None:
        target = _within(config.static[0], total, config)
        decode = min(config.static[1], total - target)
        return _towards(view, pools, target, decode, state, now, "the split is fixed", load)
    return _adaptive(view, pools, load, state, config, now, total)


# --- pressure -------------------------------------------------------------------------------------


#: So many sequences that decode tell how long such are.
_MANY = 32.0
#: A link that is busy for more than this share of the time makes what comes over it late.
_LINK_USABLE = 0.85


@dataclass(frozen=True, slots=True)
class Loads:
    """What the work asks of each instance if it got all of it, as a share of what it can do within
    the SLOs: arrays of length I. Half the load on each of two instances is half the pressure."""

    prefill: Floats
    decode: Floats
    #: The share of its time that prompts take, if all do both; decoding in what is left of it; and
    #: how a step with a prompt in it compares with the TPOT that is wanted.
    share: float
    decode_beside: Floats
    held_up: Floats
    #: Whether how long answers are is known, and with that what decoding asks for.
    answers_known: bool

    @classmethod
    def of(cls, view: ClusterView, work: Work, config: RolesConfig) -> Loads:
        s = predict.speeds(view)
        prompt = max(round(work.mean_prompt_tokens), 1)
        q = predict.queues(_emptied(view), s, 1, 1)
        service_s = predict.prefill_s(s, q, prompt, 0.0) * s.ratio
        # In full steps, which is what it comes to where it matters, and what the fit knows best.
        token_s = s.base_s / view.step_tokens + s.token_s + 0.5 * prompt * s.attention_s
        busy = work.prompt_tokens_per_s * token_s + work.requests_per_s * s.row_s
        share = min(_pooled(busy, view.roles != ENCODE), predict.MAX_SHARE)
        context, output = _mean_context(view, work), work.output_tokens_per_s
        slo_s = config.tpot_slo_s
        left_s = None if slo_s is None else slo_s * (1.0 - share)
        # Those that decode take in prompts when the others cannot, in steps of so much of the TPOT.
        paced_s = None if slo_s is None else _PACED * slo_s
        held_up = np.zeros_like(busy)
        if slo_s is not None:
            held_up = (s.base_s + np.minimum(view.step_tokens, prompt) * s.token_s) / slo_s
        # The KV of all prompts comes to those that decode. What one link does, others will.
        link_token_s = float(np.max(view.transfer.link_token_s))
        link = work.prompt_tokens_per_s * link_token_s / _LINK_USABLE
        return cls(
            prefill=busy / _usable(service_s, config.ttft_slo_s),
            decode=np.maximum(output / _decode_rate(view, s, context, paced_s), link),
            share=share,
            decode_beside=output / _decode_rate(view, s, context, left_s),
            held_up=held_up,
            answers_known=work.output_tokens_per_s > 0.0,
        )

    def split(self, prefilling: Bools, decoding: Bools) -> float:
        """Pressure of the busier pool."""
        return max(_pooled(self.prefill, prefilling), _pooled(self.decode, decoding))

    def together(self, members: Bools) -> float:
        """Everybody does both: what is asked adds up, and prompts hold up those that decode."""
        pressure = _pooled(self.prefill, members) + _pooled(self.decode_beside, members)
        # A hundredth of the time is what a p99 sees.
        if self.share > 0.01:
            pressure = max(pressure, float(self.held_up[members].mean()))
        return pressure


def _mean_context(view: ClusterView, work: Work) -> float:
    """Of those that decode: what is seen, where there are many (long prompts have short answers, or
    the other way round); else a prompt and half an answer."""
    running = float(view.running.sum())
    if running >= _MANY:
        return float(view.running_tokens.sum()) / running
    return work.mean_prompt_tokens + 0.5 * work.mean_output_tokens


def _emptied(view: ClusterView) -> ClusterView:
    """The same instances with nothing to do."""
    zero = np.zeros_like(view.running)
    return replace(
        view, queued_tokens=zero, queued=zero, running=zero, running_tokens=zero, step_left_s=zero
    )


def _pooled(load: Floats, members: Bools) -> float:
    """Instances share the work in proportion to their speed, so speeds add up."""
    speed = float((1.0 / np.maximum(load[members], 1e-12)).sum())
    return 1.0 / speed if speed else np.inf


def _usable(service_s: Floats, slo_s: float | None) -> Floats:
    """The utilisation up to which the mean TTFT of an M/M/1 queue holds the SLO:
    service + service rho / (1 - rho) <= slo, solved for rho. 1 without an SLO; a hundredth where
    the prompt alone takes longer, so that more instances still look better than fewer."""
    if slo_s is None:
        return np.ones_like(service_s)
    usable: Floats = np.clip(1.0 - service_s / slo_s, 0.01, 1.0)
    return usable


def _decode_rate(view: ClusterView, s: Speeds, context: float, slo_s: float | None) -> Floats:
    """Output tokens a second with as many sequences as slots, blocks and the TPOT allow."""
    mean = max(context, 1.0)
    rows = np.minimum(view.max_running, view.total_blocks * BLOCK_TOKENS / mean)
    if slo_s is not None:
        alone = replace(view, prefill_share=None)
        rows = np.minimum(rows, predict.tpot_limit_tokens(alone, s, slo_s, mean) / mean)
    rows = np.maximum(rows, 0.01)
    step_s = s.base_s + rows * (s.row_s + s.token_s + mean * (s.context_s + s.attention_s))
    rate: Floats = rows / np.maximum(step_s, 1e-9)
    return rate


# --- the target -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pools:
    roles: tuple[int, ...]
    prefill: Bools
    decode: Bools
    neutral: Bools
    encode: Bools

    @classmethod
    def of(cls, view: ClusterView) -> _Pools:
        """By where they are going: one that turns to decode counts as decode."""
        r = view.roles
        return cls(
            tuple(int(x) for x in r),
            (r == PREFILL) | (r == D_TO_P),
            (r == DECODE) | (r == P_TO_D),
            r == ANY,
            r == ENCODE,
        )

    @property
    def counts(self) -> tuple[int, int]:
        return int(self.prefill.sum()), int(self.decode.sum())


def _within(num_prefill: int, total: int, config: RolesConfig) -> int:
    """Floors; with too few instances for both, one of each goes before the rest."""
    low = min(max(config.min_prefill, 1), total - 1)
    high = max(low, total - max(config.min_decode, 1))
    return min(max(num_prefill, low), high)


def _adaptive(
    view: ClusterView,
    pools: _Pools,
    load: Loads,
    state: RoleState,
    config: RolesConfig,
    now: float,
    total: int,
) -> RolePlan:
    members = ~pools.encode
    neutral = not any(pools.counts)
    present = (
        load.together(members)
        if neutral
        else load.split(pools.prefill | pools.neutral, pools.decode | pools.neutral)
    )
    pressures = _pressures(load, _prefill_first(view, pools, load))
    fewest, most = _within(0, total, config), _within(total, total, config)
    splits = dict(enumerate(pressures[fewest : most + 1].tolist(), fewest))
    target = min(splits, key=lambda k: (splits[k], abs(k - pools.counts[0])))
    better = splits[target] * (1.0 + config.margin) < present
    settled = pools.counts == (target, total - target)
    numbers = f"pressure {present:.2f} now, {splits[target]:.2f} with {target} P"
    kept = replace(state, better_since_s=None, better_prefill=-1)
    if neutral and present < config.light_load:
        return _stay(pools, kept, f"the load is light: {numbers}", present, splits[target])
    if neutral and not load.answers_known:
        return _stay(pools, kept, "too few answers have ended to know how long they are")
    unsettled = not neutral and bool(pools.neutral.any())
    if settled or not (better or unsettled):
        return _stay(pools, kept, f"the split stays: {numbers}", present, splits[target])
    since = state.better_since_s
    wished, have = state.better_prefill, pools.counts[0]
    # Another target than before is the same wish if it lies on the same side; but a first split is
    # made all at once, and waits until what it is to be holds still.
    same = abs(wished - target) < 2 if neutral else (wished > have) == (target > have)
    if since is None or not same:
        since, wished = now, target
    waiting = replace(state, better_since_s=since, better_prefill=wished)
    # Who has no role gives none up: it need not be waited for.
    pause_s = 0.0 if pools.neutral.any() else config.pause_s
    if now - since < config.patience_s or now - state.turned_s < pause_s:
        why = f"a better split is watched since {now - since:.1f} s: {numbers}"
        return _stay(pools, waiting, why, present, splits[target])
    plan = _towards(view, pools, target, total - target, state, now, numbers, load)
    if int(pools.neutral.sum()) > 1:  # and go on with the others
        plan = replace(plan, state=replace(plan.state, better_since_s=since, better_prefill=target))
    return replace(plan, pressure=present, target_pressure=splits[target])


def _pressures(load: Loads, order: list[int]) -> Floats:
    """Of the splits in which the first k of `order` prefill and the others decode, for each k from
    0 to all of them: as `Loads.split`, for all at once."""
    prefill_speed = 1.0 / np.maximum(load.prefill[order], 1e-12)
    decode_speed = 1.0 / np.maximum(load.decode[order], 1e-12)
    together = np.zeros((2, len(order) + 1))
    together[0, 1:] = np.cumsum(prefill_speed)
    together[1, :-1] = np.cumsum(decode_speed[::-1])[::-1]
    with np.errstate(divide="ignore"):
        pressures: Floats = (1.0 / together).max(axis=0)
    return pressures


def _prefill_first(view: ClusterView, pools: _Pools, load: Loads) -> list[int]:
    """Who prefills already, then who would be turned to it first."""
    members = [i for i in range(len(view.names)) if not pools.encode[i]]
    return sorted(
        members,
        key=lambda i: (not pools.prefill[i], *_cost_to_turn(view, pools, load, i, PREFILL), i),
    )


def _cost_to_turn(
    view: ClusterView, pools: _Pools, load: Loads, i: int, to: int
) -> tuple[float, float]:
    """Tokens that must be handed over or finished (one without a role has none to give up); of
    those that cost the same, whoever is better at it than at the other, by comparison, goes
    first."""
    burden = float(load.prefill[i] / max(load.decode[i], 1e-12))
    if to != PREFILL:
        burden = -burden
    if pools.neutral[i]:
        return -1.0, burden
    return float(view.running_tokens[i] if to == PREFILL else view.queued_tokens[i]), burden


# --- the change -----------------------------------------------------------------------------------


def _towards(
    view: ClusterView,
    pools: _Pools,
    num_prefill: int,
    num_decode: int,
    state: RoleState,
    now: float,
    why: str,
    load: Loads,
) -> RolePlan:
    """Turn the one instance that is cheapest to turn, or none if the split is as it should be."""
    have_p, have_d = pools.counts
    if have_p < num_prefill:
        candidates = pools.neutral if pools.neutral.any() else pools.decode
        i = _cheapest(view, pools, load, candidates, PREFILL)
        final, turning, busy = PREFILL, D_TO_P, bool(view.running[i] > 0)
    elif have_d < num_decode:
        candidates = pools.neutral if pools.neutral.any() else pools.prefill
        i = _cheapest(view, pools, load, candidates, DECODE)
        # Prompts that wait where nobody had a role go on there, among what is decoded.
        final, turning, busy = DECODE, P_TO_D, bool(view.queued[i] > 0 and not pools.neutral[i])
    else:
        return RolePlan(
            num_prefill=num_prefill, num_decode=num_decode, reason=f"as wanted: {why}", state=state
        )
    # Who has nothing of its old role's to do changes at once.
    role = ROLES[turning if busy else final]
    before = ROLES[pools.roles[i]]
    name = view.names[i]
    reason = (
        f"{name} turns from {before} to {role} towards {num_prefill} P and {num_decode} D: {why}; "
        f"it is the cheapest with {int(view.running_tokens[i])} tokens running and "
        f"{int(view.queued_tokens[i])} queued"
    )
    turned = state.turned(Turn(name, now, before, role))
    return RolePlan(
        num_prefill=num_prefill,
        num_decode=num_decode,
        instance=name,
        role=role,
        reason=reason,
        state=turned,
    )


def _cheapest(view: ClusterView, pools: _Pools, load: Loads, candidates: Bools, to: int) -> int:
    places = [int(i) for i in np.flatnonzero(candidates)]
    assert places, "a pool that is too large has an instance to give"
    return min(places, key=lambda i: (*_cost_to_turn(view, pools, load, i, to), i))


def _turned(view: ClusterView, state: RoleState, now: float) -> RolePlan | None:
    """One that was turning and has nothing left of its old role's takes the new one."""
    pools = _Pools.of(view)
    waits_behind = np.zeros(len(view.names)) if view.deferred is None else view.deferred
    for i, name in enumerate(view.names):
        role = view.roles[i]
        if role == P_TO_D and view.queued[i] + waits_behind[i] == 0:
            final = DECODE
        elif role == D_TO_P and view.running[i] == 0:
            final = PREFILL
        else:
            continue
        before = next((t.before for t in state.turns if t.name == name), ROLES[role])
        kept = state.turned(Turn(name, now, before, ROLES[final]))
        return RolePlan(
            num_prefill=pools.counts[0],
            num_decode=pools.counts[1],
            instance=name,
            role=ROLES[final],
            reason=f"{name} has nothing left of its old role's and is {ROLES[final]} now",
            state=kept,
        )
    return None


def _rolled_back(
    view: ClusterView, state: RoleState, config: RolesConfig, now: float
) -> RolePlan | None:
    """Give the old role back to one that has not taken its new one, or does not come to it."""
    pools = _Pools.of(view)
    for turn in state.turns:
        role, since = ROLES[int(view.roles[view.names.index(turn.name)])], now - turn.at_s
        if role != turn.to and since >= config.take_s:
            why = f"it is still {role} {since:.1f} s after it was told to be {turn.to}"
        elif role == turn.to and since >= config.turning_s:
            why = f"it has not emptied itself in {since:.0f} s"
        else:
            continue
        return RolePlan(
            num_prefill=pools.counts[0],
            num_decode=pools.counts[1],
            instance=turn.name,
            role=turn.before,
            reason=f"{turn.name} goes back to {turn.before}: {why}",
            rollback=True,
            state=RoleState(
                turned_s=now, turns=tuple(t for t in state.turns if t.name != turn.name)
            ),
        )
    return None


def _is_over(view: ClusterView, turn: Turn) -> bool:
    """It has come to a role that stays, or its instance has gone."""
    if turn.name not in view.names:
        return True
    role = int(view.roles[view.names.index(turn.name)])
    return ROLES[role] == turn.to and role not in (P_TO_D, D_TO_P)


def _stay(
    pools: _Pools, state: RoleState, reason: str, pressure: float = 0.0, target: float = 0.0
) -> RolePlan:
    return RolePlan(
        num_prefill=pools.counts[0],
        num_decode=pools.counts[1],
        reason=reason,
        pressure=pressure,
        target_pressure=target,
        state=state,
    )
