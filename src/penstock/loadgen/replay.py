"""A trace replayed on instances that are cost models, under the production policies.

Made for planning: an hour of requests on eight instances takes seconds. A step is planned as the
engine's scheduler plans it (decodes first, then prompts in order of arrival within one budget), but
only counts are kept; while an instance only decodes, all steps up to the next event are one jump.
Where requests go, what is split, and which roles instances have is decided by
`penstock.service.policies`. Prefix caches and preemption are left out. `penstock.simulator` has the
real cores, at the price of time.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.loadgen.costs import InstanceModel
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.instance import Role
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.policies.correction import PrefillShare
from penstock.service.policies.forecast import Forecast
from penstock.service.policies.roles import RolesConfig, RoleState, decide_roles
from penstock.service.policies.simple import least_load
from penstock.service.policies.slo_aware import slo_aware
from penstock.service.policies.view import ROLES, ClusterView, RouteRequest, TransferCosts

_ROLES_EVERY_S = 0.5
#: Weight of the newest answer in the mean length that the policies expect.
_OUTPUT_WEIGHT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """`roles`: one for each instance; `adaptive`: they start without and follow the work."""

    name: str
    roles: tuple[Role, ...]
    adaptive: bool = False
    ttft_slo_s: float
    tpot_slo_s: float
    transfer: TransferCosts

    @property
    def splits(self) -> bool:
        return self.adaptive or any(role != "any" for role in self.roles)


@dataclass(slots=True, eq=False)
class _Live:
    """A request on its way."""

    request: TraceRequest
    left: int = 0
    decode_on: int | None = None
    first_s: float = 0.0
    end_s: float = 0.0


@dataclass(slots=True)
class Replayed:
    """What came of one setup."""

    setup: Setup
    ttft_s: np.ndarray
    #: Seconds a token after the first, of each request that has more than one.
    tpot_s: np.ndarray
    #: 99th percentile of single gaps between two tokens.
    gap_p99_s: float
    #: Share of requests with both TTFT and TPOT within the SLOs.
    attained: float
    num_split: int
    role_changes: int
    #: From the first arrival to the last token, and the seconds that instances computed in it.
    seconds: float
    busy_s: float


@dataclass(slots=True, eq=False)
class _Engine:
    model: InstanceModel
    role: Role = "any"
    #: The end of the last step that was begun.
    at_s: float = 0.0
    steps: int = 0
    prompts: deque[_Live] = field(default_factory=deque)
    queued_tokens: int = 0
    #: (step with its last token, number, who), by step.
    running: list[tuple[int, int, _Live]] = field(default_factory=list)
    context: int = 0
    prompt_context: int = 0
    joined: list[_Live] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    busy_s: float = 0.0
    share: PrefillShare = field(default_factory=PrefillShare)
    _number: int = 0

    def queue(self, live: _Live, now: float) -> None:
        self.at_s = max(self.at_s, now)
        live.left = live.request.input_tokens
        self.prompts.append(live)
        self.queued_tokens += live.left
        self.share.observe(now, self.model.prefill_s(live.left))

    def join(self, live: _Live, now: float) -> None:
        """Its prompt was computed elsewhere."""
        self.at_s = max(self.at_s, now)
        self.joined.append(live)
        self._start(live)

    def _start(self, live: _Live) -> None:
        self._number += 1
        last = self.steps + live.request.output_tokens - 1
        heapq.heappush(self.running, (last, self._number, live))
        self.context += live.request.input_tokens + 1

    def advance(self, until_s: float) -> list[_Live]:
        """All steps that begin before `until_s`; returns prompts that came to an end in them."""
        done: list[_Live] = []
        while self.at_s < until_s and (self.running or self.prompts):
            chunks = self._chunks()
            if chunks:
                done += self._mixed_step(chunks)
            else:
                self._decode_steps(until_s)
            self._finish()
        return done

    def _chunks(self) -> list[tuple[_Live, int]]:
        """Prompt tokens of the next step. A prompt begins once its KV and its row have room."""
        model, rows = self.model, len(self.running)
        room = model.step_tokens - rows
        chunks: list[tuple[_Live, int]] = []
        held = self.context + self.prompt_context
        for live in self.prompts:
            whole = live.request.input_tokens
            begins = live.left == whole
            full = rows + len(chunks) >= model.max_running or held + whole > model.kv_tokens
            if room <= 0 or (begins and full and (rows or chunks)):
                break
            tokens = min(live.left, room)
            chunks.append((live, tokens))
            room -= tokens
            held += whole if begins else 0
        return chunks

    def _mixed_step(self, chunks: list[tuple[_Live, int]]) -> list[_Live]:
        new = reads = products = 0
        done = []
        for live, tokens in chunks:
            if live.left == live.request.input_tokens:
                self.prompt_context += live.left
            live.left -= tokens
            read = live.request.input_tokens - live.left
            new, reads, products = new + tokens, reads + read, products + tokens * read
        rows = len(self.running)
        step_s = self.model.step_s(
            new + rows, rows + len(chunks), reads + self.context, products + self.context
        )
        self.queued_tokens -= new
        self._took(step_s, 1, rows)
        for live, _ in chunks:
            if not live.left:
                live.first_s = live.end_s = self.at_s
                self.prompt_context -= live.request.input_tokens
                done.append(live)
        for live in done:
            self.prompts.popleft()
            if live.decode_on is None and live.request.output_tokens > 1:
                self._start(live)
        return done

    def _decode_steps(self, until_s: float) -> None:
        """As many steps as begin before `until_s`, up to the next end of a sequence."""
        rows = len(self.running)
        first_s = self.model.step_s(rows, rows, self.context, self.context)
        cost = self.model.cost
        growth_s = rows * (cost.per_context_token_s + cost.per_attention_s)
        count = max(self.running[0][0] - self.steps, 1)
        if self.joined:
            count = 1
        elif math.isfinite(until_s):
            # count * first + growth * count² / 2 = until - at
            half, span_s = 0.5 * growth_s, until_s - self.at_s
            root = (math.sqrt(first_s**2 + 4 * half * span_s) - first_s) / (2 * half) if half else 0
            count = max(1, min(count, math.ceil(root if half else span_s / first_s)))
        self._took(first_s + 0.5 * growth_s * (count - 1), count, rows)

    def _took(self, step_s: float, count: int, rows: int) -> None:
        self.at_s += step_s * count
        self.busy_s += step_s * count
        self.steps += count
        self.context += rows * count
        if rows > len(self.joined):
            self.gaps.append((step_s, (rows - len(self.joined)) * count))
        self.gaps += [(self.at_s - live.first_s, 1) for live in self.joined]
        self.joined = []

    def _finish(self) -> None:
        while self.running and self.running[0][0] <= self.steps:
            _, _, live = heapq.heappop(self.running)
            live.end_s = self.at_s
            self.context -= live.request.input_tokens + live.request.output_tokens


class Replay:
    """One run of one setup."""

    def __init__(self, model: InstanceModel, setup: Setup) -> None:
        self._model = model
        self._setup = setup
        self._engines = [_Engine(model, role) for role in setup.roles]
        self._events: list[tuple[float, int, int, _Live | None]] = []
        self._number = 0
        self._forecast = Forecast()
        self._state = RoleState()
        self._next_roles_s = 0.0
        self._changes = self._splits = 0
        self._mean_output = 0.0

    def run(self, requests: Sequence[TraceRequest]) -> Replayed:
        lives = [_Live(r) for r in requests]
        for live in lives:
            self._until(live.request.arrival_s)
            self._arrive(live, live.request.arrival_s)
        self._until(math.inf)
        for engine in self._engines:
            engine.advance(math.inf)
        return self._result(lives)

    def _until(self, now: float) -> None:
        """Everything that happens before `now`: steps with prompts in them, and joins."""
        while self._events and self._events[0][0] < now:
            at_s, _, place, live = heapq.heappop(self._events)
            engine = self._engines[place]
            if live is None:
                self._stepped(place, engine.advance(math.nextafter(at_s, math.inf)))
            else:
                self._stepped(place, engine.advance(at_s))
                engine.join(live, at_s)
            self._wake(place)

    def _wake(self, place: int) -> None:
        engine = self._engines[place]
        if engine.prompts:
            self._push(engine.at_s, place, None)

    def _push(self, at_s: float, place: int, live: _Live | None) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, place, live))

    def _stepped(self, place: int, done: list[_Live]) -> None:
        for live in done:
            if live.decode_on is not None and live.request.output_tokens > 1:
                self._push(live.first_s + self._transfer_s(live), live.decode_on, live)

    def _transfer_s(self, live: _Live) -> float:
        """Blocks go as chunks finish: the last chunk is what is waited for."""
        t = self._setup.transfer
        tokens = min(live.request.input_tokens, self._model.step_tokens)
        return float(t.copy_s + tokens * t.copy_token_s)

    def _arrive(self, live: _Live, now: float) -> None:
        for place, engine in enumerate(self._engines):
            self._stepped(place, engine.advance(now))
        setup, request = self._setup, live.request
        view = self._view(now)
        self._mean_output += (_OUTPUT_WEIGHT if self._mean_output else 1.0) * (
            request.output_tokens - self._mean_output
        )
        expected = max(1, round(self._mean_output))
        if setup.adaptive:
            self._forecast.observe(now, request.input_tokens, expected)
            view = self._adapt(view, now)
        wanted = RouteRequest(
            num_tokens=request.input_tokens,
            expected_output_tokens=expected,
            ttft_slo_s=setup.ttft_slo_s,
            tpot_slo_s=setup.tpot_slo_s,
        )
        decision = (slo_aware if setup.splits else least_load)(view, wanted)
        if decision.decode is not None:
            live.decode_on = view.names.index(decision.decode)
            self._splits += 1
        place = view.names.index(decision.instance)
        idle = not self._engines[place].prompts
        self._engines[place].queue(live, now)
        if idle:
            self._wake(place)

    def _adapt(self, view: ClusterView, now: float) -> ClusterView:
        if now < self._next_roles_s:
            return view
        self._next_roles_s = now + _ROLES_EVERY_S
        config = RolesConfig(ttft_slo_s=self._setup.ttft_slo_s, tpot_slo_s=self._setup.tpot_slo_s)
        plan = decide_roles(view, self._forecast.work(now), self._state, config, now)
        self._state = plan.state
        if plan.instance is None or plan.role is None:
            return view
        self._changes += 1
        self._engines[view.names.index(plan.instance)].role = plan.role
        return self._view(now)

    def _view(self, now: float) -> ClusterView:
        engines, model = self._engines, self._model
        count = len(engines)

        def all_of(value: float) -> np.ndarray:
            return np.full(count, value)

        seen = np.array(
            [
                (
                    e.queued_tokens,
                    len(e.prompts),
                    len(e.running),
                    e.context,
                    max(e.at_s - now, 0.0),
                    max(model.kv_tokens - e.context - e.prompt_context, 0) / BLOCK_TOKENS,
                    e.share.share(now),
                )
                for e in engines
            ],
            dtype=np.float64,
        ).T
        c = model.cost
        return ClusterView(
            names=tuple(f"i{n}" for n in range(count)),
            roles=np.array([ROLES.index(e.role) for e in engines]),
            queued_tokens=seen[0],
            queued=seen[1],
            running=seen[2],
            running_tokens=seen[3],
            step_left_s=seen[4],
            base_s=all_of(c.base_s),
            per_token_s=all_of(c.per_token_s),
            per_row_s=all_of(c.per_row_s),
            per_context_token_s=all_of(c.per_context_token_s),
            per_attention_s=all_of(c.per_attention_s),
            residual_s=all_of(0.0),
            num_steps=all_of(1000.0),
            ttft_ratio=all_of(1.0),
            step_tokens=all_of(model.step_tokens),
            max_running=all_of(model.max_running),
            free_blocks=seen[5],
            total_blocks=all_of(model.kv_tokens / BLOCK_TOKENS),
            hosts=np.arange(count),
            prefill_share=seen[6],
            transfer=self._setup.transfer,
        )

    def _result(self, lives: list[_Live]) -> Replayed:
        setup = self._setup
        ttft = np.array([live.first_s - live.request.arrival_s for live in lives])
        gaps = np.array([max(live.request.output_tokens - 1, 1) for live in lives])
        tpot = np.array([live.end_s - live.first_s for live in lives]) / gaps
        several = np.array([live.request.output_tokens > 1 for live in lives])
        attained = (ttft <= setup.ttft_slo_s) & (~several | (tpot <= setup.tpot_slo_s))
        return Replayed(
            setup=setup,
            ttft_s=ttft,
            tpot_s=tpot[several],
            gap_p99_s=_weighted_p99([gap for e in self._engines for gap in e.gaps]),
            attained=float(attained.mean()),
            num_split=self._splits,
            role_changes=self._changes,
            seconds=max(live.end_s for live in lives),
            busy_s=sum(e.busy_s for e in self._engines),
        )


def _weighted_p99(gaps: list[tuple[float, int]]) -> float:
    if not gaps:
        return 0.0
    seconds, weights = np.array(gaps).T
    order = seconds.argsort()
    reached = weights[order].cumsum()
    return float(seconds[order][np.searchsorted(reached, 0.99 * reached[-1])])
