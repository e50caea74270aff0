"""InstanceCore: one engine instance as a state machine without I/O.

Messages, finished steps and timers come in; effects go out. The driver (`engine/instance.py`) or
the simulator carries them out. Time is whatever `now` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from penstock.engine.admission import check_ids, check_supported
from penstock.engine.cost import CostFitter, Features
from penstock.engine.flights import Flight, Flights, PrepareAhead
from penstock.engine.links import Link, Links, terminal_row
from penstock.engine.memory.tiers.index import NO_TIERS, TierIndex
from penstock.engine.pace import CostPace
from penstock.engine.scheduler.batch import StepResult
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.validation import DuplicateSubmit
from penstock.engine.step_counts import StepCounts
from penstock.engine.transfer.exchange import Exchange
from penstock.engine.transfer.jobs import Moved
from penstock.engine.transfer.transfers import ExchangeConfig
from penstock.protocol.codec import PROTOCOL_VERSION, Message
from penstock.protocol.effects import Effect, Launch, Send, SetTimer, Shorten, Stop
from penstock.protocol.errors import (
    EngineUnavailable,
    PenstockError,
    ProtocolError,
)
from penstock.protocol.instance import (
    Assign,
    Assigned,
    Attach,
    Attached,
    Detach,
    Drain,
    InstanceCard,
    LiveRequest,
    Load,
    Probe,
    Probed,
    Resync,
    Role,
    Snapshot,
)
from penstock.protocol.kv import Ack, BlocksReady, Fetch, Pull, Refused, Release, Tier
from penstock.protocol.request import Cancel, Submit
from penstock.protocol.tokens import Credit, TokenRow


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """`overlap_steps` is how many batches may be with the runner: 2 keeps the device busy."""

    overlap_steps: int = 2
    heartbeat_s: float = 0.5
    #: Tokens messages a service may leave unacknowledged before its sequences are paused.
    credit_window: int = 512
    #: How long a service may stay out of credit before its sequences are freed.
    stall_limit_s: float = 30.0
    #: How long a service may be out of reach before it is taken for dead and its sequences freed,
    #: and how long it may say nothing though it can be reached. Services speak every second.
    service_lost_s: float = 3.0
    service_silent_s: float = 5.0
    #: A step that is overdue by this much, and by ten times its prediction, will never end.
    stuck_after_s: float = 30.0
    prepare_ahead: PrepareAhead = field(default_factory=PrepareAhead)
    #: How many steps that are alike may be one batch, and for how long, by what such steps took of
    #: late. A run's tokens come when it ends, so production takes single steps: with batches in
    #: overlap the device would gain nothing.
    max_run_steps: int = 1
    max_run_s: float = 1.0
    #: Invariants are recounted in each pause; where many instances share a processor that is left
    #: to whoever runs them.
    recounts_when_idle: bool = True
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)


class InstanceCore:
    def __init__(
        self,
        card: InstanceCard,
        scheduler: Scheduler,
        config: CoreConfig | None = None,
        *,
        means: Mapping[str, str] | None = None,
        endpoints: Mapping[str, str] | None = None,
        tiers: TierIndex = NO_TIERS,
    ) -> None:
        """`means` and `endpoints` are those of the data plane (`jobs.Mover`), best first; without
        them this instance moves no blocks. `tiers`: the books of its slower tiers."""
        self.card = card
        self.scheduler = scheduler
        self.config = config or CoreConfig()
        self.cost = CostFitter()
        scheduler.pace = CostPace(self.cost)
        self.role: Role = "any"
        self.epoch = 0
        self.draining = False
        self.ready = False
        self.exchange = Exchange(
            card, scheduler, self.config.exchange, means=means, endpoints=endpoints, tiers=tiers
        )
        self._links = Links(card, scheduler, self.config.credit_window)
        self._flights = Flights(self.config.prepare_ahead)
        self._deadlines: dict[tuple[str, str], tuple[float, int]] = {}
        self._next_beat_s = 0.0
        self._load_number = 0
        self._counts = StepCounts()
        self._last_done_s = 0.0
        self._idle_beats = 0
        self._decode_s: float | None = None  # what a step that only decodes took last, predicted

    # --- what comes in -------------------------------------------------------------------------

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        self._links.heard(peer, message, now)
        match message:
            case Submit():
                effects = self._submit(peer, message, now)
            case Cancel():
                effects = self._cancel(peer, message, now)
            case Credit():
                effects = self._links.credit(peer, message)
            case Fetch():
                effects = self._fetch(peer, message, now)
            case Pull() | BlocksReady() | Ack() | Release() | Refused():
                effects = self.exchange.on_message(peer, message, now)
                self.scheduler.reconsider()
            case Attach():
                effects = self._attach(peer, message, now)
            case Detach():
                effects = self._detach(peer, message)
            case Resync(nonce=nonce):
                effects = self._snapshot(peer, nonce)
            case Probe(nonce=nonce):
                card = self.card
                effects = [Send(peer, Probed(card.name, card.incarnation, nonce, self.ready))]
            case Assign():
                effects = self._assign(peer, message)
            case Drain():
                self.draining = True
                effects = []
            case _:
                what = str(message.__struct_config__.tag)
                reason = f"{what} is not supported by this release of the engine"
                effects = [Send(peer, Refused(what, reason, code="unsupported_feature"))]
        return self._settle(effects, now)

    def on_step_done(self, result: StepResult, now: float) -> list[Effect]:
        flight = self._flights.ended(now)
        assert flight.batch.step == result.step, "the runner finished steps out of order"
        self._counts.observe(result, flight.batch.steps, flight.follows)
        self._last_done_s = now
        if result.error is None:
            self.cost.observe(flight.features, result.compute_s or now - flight.launched_s)
            self.ready = self.ready or any(row.ids for row in result.rows)
        updates = self.scheduler.apply(result)
        for update in updates:
            if update.finish is not None:
                self._deadlines.pop(update.sequence.key, None)
        return self._settle(self._links.publish(updates, now), now, step_done=True)

    def on_shortened(self, step: int, steps: int, now: float) -> list[Effect]:
        """The runner will end the run `step` after so many of its steps."""
        assert self._flights.last.batch.step == step, "only the last batch can be shortened"
        self.scheduler.shorten(step, steps)
        self._flights.shortened(steps, now)
        return self._settle([], now)

    def on_moved(self, moved: Moved, now: float) -> list[Effect]:
        """A job of the data plane has ended."""
        self.scheduler.reconsider()
        return self._settle(self.exchange.on_moved(moved, now), now)

    def on_timer(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if now >= self._next_beat_s:
            self._forgive_own_pause(now - self._next_beat_s)
            self._next_beat_s = now + self.config.heartbeat_s
            effects += self._beat(now)
            effects += self._expire(now)
            effects += self._free_the_deaf(now)
            effects += self._give_up_if_stuck(now)
            self._check_when_idle()
        return self._settle(effects, now)

    def on_sent(self, peer: str, taken: bool, now: float) -> None:
        """Whether the transport took a message for `peer`; if not, its process may be gone.
        Heartbeats make sure that this is noticed even if nothing else is sent."""
        self._links.on_sent(peer, taken, now)

    # --- one turn of the loop ------------------------------------------------------------------

    def _settle(self, effects: list[Effect], now: float, step_done: bool = False) -> list[Effect]:
        """What every input ends with: keep the device fed, say when to wake up."""
        moves, wake_s = self.exchange.poll(now)
        if moves:
            self.scheduler.reconsider()
        wake_s = min(self._next_beat_s, wake_s)
        ends_run = self._shorten(now)
        launches: list[Effect] = []
        while len(self._flights) < self.config.overlap_steps:
            prepare_s = self._prepare_at_s()
            if prepare_s > now:
                wake_s = min(wake_s, prepare_s)
                break
            if self._flights.hold_back(self.scheduler):
                break
            batch = self.scheduler.schedule(self._max_steps())
            if batch is None:
                break
            for newcomer in self.scheduler.newcomers:
                newcomer.started_s = now
            self.exchange.touch(self.scheduler.newcomers)
            features = Features.of(batch)
            times = self.cost.predict(features)
            if times is not None and not features.prompt_tokens:
                self._decode_s = times.first_s
            follows = step_done or bool(self._flights)
            changes = self.scheduler.num_changes
            self._flights.launched(Flight(batch, features, now, times, follows, changes), now)
            launches.append(Launch(batch))
            self._idle_beats = 0
        # The device first: frames can wait while it computes.
        effects = launches + effects + moves + self._kv_events()
        if self.draining and not self._is_busy():
            effects.append(Stop())
        effects.append(SetTimer(wake_s))
        return effects + ends_run  # last: its answer comes at once

    def _is_busy(self) -> bool:
        return bool(self._flights) or self.scheduler.has_work() or self.exchange.serves_peers

    def _prepare_at_s(self) -> float:
        if not self.scheduler.has_work():
            return 0.0
        return self._flights.prepare_at_s(self.cost.residual_s)

    def _max_steps(self) -> int:
        """How long a run may be."""
        limit = self.config.max_run_steps
        if limit == 1 or not self._decode_s:
            return 1
        return max(1, min(limit, int(self.config.max_run_s / self._decode_s)))

    def _shorten(self, now: float) -> list[Effect]:
        """End the run under way (or the one behind it) where it would not have been gone on with,
        had it been single steps, because something has come in meanwhile."""
        if not self._flights:
            return []
        last = self._flights.last
        if last.batch.steps == 1 or last.is_being_shortened:
            return []
        if last.changes == self.scheduler.num_changes:
            return []
        last.changes = self.scheduler.num_changes
        last.is_being_shortened = True
        return [Shorten(last.batch.step, self._flights.ahead_s(now, self.cost.residual_s))]

    # --- messages ------------------------------------------------------------------------------

    def _submit(self, peer: str, submit: Submit, now: float) -> list[Effect]:
        link, here = self._links.get(peer), self.card.name
        stale = any(s.instance == here and s.epoch < self.epoch for s in submit.plan)
        refusal = None
        if link is None or link.incarnation != submit.service_incarnation:
            refusal = ("not_attached", "attach first: this incarnation of the service is unknown")
        else:
            refusal = self._refusal(stale)
        if refusal:
            code, reason = refusal
            return [Send(peer, Refused("submit", reason, submit.request_id, submit.attempt, code))]
        try:
            check_supported(submit)
            check_ids(submit, self.card.vocab_size)
            # The scheduler knows services by the name their transport gave them.
            if submit.service != peer:
                submit = msgspec.structs.replace(submit, service=peer)
            stages = {(s.stage, s.instance == here) for s in submit.plan}
            hands_over = stages >= {("prefill", True), ("decode", False)}
            seq = self.scheduler.add(submit, hands_over)
            seq.arrived_s = now
        except DuplicateSubmit:
            return []  # the network has delivered it twice
        except PenstockError as exc:
            row = terminal_row(submit.request_id, submit.attempt, len(submit.resumed_ids), exc)
            return self._links.send_rows(peer, [row], now)
        if submit.total_budget_s is not None:
            key = (peer, submit.request_id)
            self._deadlines[key] = (now + submit.total_budget_s, submit.attempt)
        return self.exchange.on_submit(seq, now)

    def _refusal(self, stale: bool) -> tuple[str, str] | None:
        """Why nothing new is taken (or not with this plan): code and reason."""
        if self.draining:
            return "draining", "the instance is draining and takes nothing new"
        if stale:
            return "stale_epoch", f"the plan is older than epoch {self.epoch} of this instance"
        return None

    def _fetch(self, peer: str, fetch: Fetch, now: float) -> list[Effect]:
        refusal = self._refusal(stale=fetch.epoch < self.epoch)
        if self._links.get(peer) is None:
            refusal = "not_attached", "attach first"
        if refusal:
            code, reason = refusal
            return [Send(peer, Refused("fetch", reason, fetch.request_id, fetch.attempt, code))]
        self.scheduler.reconsider()
        return self.exchange.on_fetch(peer, fetch, now)

    def _cancel(self, peer: str, cancel: Cancel, now: float) -> list[Effect]:
        key = (peer, cancel.request_id)
        self.exchange.on_cancel(key, cancel.attempt)
        self.scheduler.reconsider()
        if not self.scheduler.cancel(key, cancel.attempt):
            return []
        self._deadlines.pop(key, None)
        row = TokenRow(cancel.request_id, cancel.attempt, 0, [], "cancelled")
        return self._links.send_rows(peer, [row], now)

    def _attach(self, peer: str, attach: Attach, now: float) -> list[Effect]:
        if attach.protocol_version != PROTOCOL_VERSION:
            reason = (
                f"service speaks protocol {attach.protocol_version}, "
                f"this instance {PROTOCOL_VERSION}: run the same release on both"
            )
            return [Send(peer, Refused("attach", reason, code="version_mismatch"))]
        link = self._links.get(peer)
        if link is not None and attach.incarnation < link.incarnation:
            reason = f"incarnation {link.incarnation} of this service has already attached"
            return [Send(peer, Refused("attach", reason, code="stale_incarnation"))]
        if link is None or attach.incarnation > link.incarnation:
            self._forget(peer)
            self._links.add(peer, Link(attach.incarnation, attach.kv_events, heard_s=now))
        card = msgspec.structs.replace(self.card, cost=self.cost.model())
        attached = Attached(card, PROTOCOL_VERSION, self.role, self.epoch)
        self._next_beat_s = now  # a first heartbeat follows at once
        return [Send(peer, attached)]

    def _detach(self, peer: str, detach: Detach) -> list[Effect]:
        link = self._links.get(peer)
        if link is not None and link.incarnation == detach.incarnation:
            self._forget(peer)
        return []

    def _forget(self, peer: str) -> None:
        self._links.remove(peer)
        self.scheduler.drop_service(peer)
        self.exchange.on_service_gone(peer)
        self._deadlines = {k: v for k, v in self._deadlines.items() if k[0] != peer}

    def _assign(self, peer: str, assign: Assign) -> list[Effect]:
        if assign.epoch <= self.epoch:
            reason = f"epoch {assign.epoch} is not newer than {self.epoch}"
            return [Send(peer, Refused("assign", reason, code="stale_epoch"))]
        self.role, self.epoch = assign.role, assign.epoch
        assigned = Assigned(self.card.name, self.role, self.epoch)
        told = dict.fromkeys([peer, *self._links])  # everybody, and whoever said it
        return [Send(service, assigned) for service in told]

    def _snapshot(self, peer: str, nonce: int) -> list[Effect]:
        link = self._links.get(peer)
        if link is None:
            return [Send(peer, Refused("resync", "attach first", code="not_attached"))]
        live = [
            LiveRequest(s.key[1], s.attempt, s.num_output_tokens) for s in self.scheduler.live(peer)
        ]
        keys, tier_keys, tiers = b"", dict[Tier, bytes](), self.exchange.tiers
        if link.kv_events:
            keys = b"".join(self.scheduler.pool.keys())
            tier_keys = {tier: b"".join(tiers.keys(tier)) for tier in tiers.tiers}
        card = self.card
        snapshot = Snapshot(
            card.name, card.incarnation, live, link.kv_sent, keys, nonce, tier_keys, link.sent
        )
        return [Send(peer, snapshot)]

    # --- what goes out -------------------------------------------------------------------------

    def _kv_events(self) -> list[Effect]:
        """What has changed in the cache, here and in slower tiers."""
        changes = self.scheduler.take_kv_changes()
        tiers = self.exchange.tiers
        if tiers.enabled:
            tiers.follow(changes)
            changes += tiers.take_changes()
        return self._links.kv_events(changes) if changes else []

    def _beat(self, now: float) -> list[Effect]:
        self._load_number += 1
        load = self.load(now)
        return [Send(service, load) for service in self._links]

    def load(self, now: float) -> Load:
        # What a run is to compute later has not happened yet.
        not_begun = self._flights.not_begun(now, self.cost.residual_s)
        steps, steps_s = self._flights.done(now)
        s = self.scheduler.stats_without(not_begun)
        card = self.card
        return Load(
            instance=card.name,
            incarnation=card.incarnation,
            number=self._load_number,
            step=self._counts.steps + steps,
            step_end_in_s=self._flights.end_in_s(now, not_begun),
            waiting=dict(s.waiting),
            running=dict(s.running),
            waiting_tokens=s.waiting_tokens,
            running_tokens=s.running_tokens,
            kv_blocks_used=s.kv_blocks_used,
            kv_blocks_cached=s.kv_blocks_cached,
            kv_blocks_total=s.kv_blocks_total,
            preemptions=s.preemptions,
            prefix_hit_tokens=s.prefix_hit_tokens,
            prefix_query_tokens=s.prefix_query_tokens,
            **self._counts.for_load(steps, steps_s),
            cost=self.cost.model(),
            role=self.role,
            epoch=self.epoch,
            draining=self.draining,
            tiers=self.exchange.tier_loads(),
            moves=self.exchange.move_counts(),
            prefills=s.prefills,
            prefill_tokens_left=s.prefill_tokens_left,
            decode_context_tokens=s.decode_context_tokens,
        )

    def _expire(self, now: float) -> list[Effect]:
        """Requests past their time budget end with an error."""
        effects: list[Effect] = []
        due = [(k, attempt) for k, (at_s, attempt) in self._deadlines.items() if at_s <= now]
        for key, attempt in due:
            del self._deadlines[key]
            if self.scheduler.cancel(key, attempt):
                error = EngineUnavailable("the request's time budget ran out before it finished")
                effects += self._links.send_rows(
                    key[0], [terminal_row(key[1], attempt, 0, error)], now
                )
        return effects

    def _free_the_deaf(self, now: float) -> list[Effect]:
        """Services that are gone, or never read, lose their sequences: others need the room."""
        effects: list[Effect] = []
        for service, link in self._links.items():
            gone_s, stalled_s = link.unreachable_since_s, link.stalled_since_s
            unreachable = gone_s is not None and now - gone_s >= self.config.service_lost_s
            if unreachable or now - link.heard_s >= self.config.service_silent_s:
                self._forget(service)
            elif stalled_s is not None and now - stalled_s >= self.config.stall_limit_s:
                link.stalled_since_s = now
                error = ProtocolError("the service did not take in its tokens: requests freed")
                live = self.scheduler.live(service)
                rows = [terminal_row(s.key[1], s.attempt, 0, error) for s in live]
                self.scheduler.drop_service(service)
                self.scheduler.pause(service)  # it is still out of credit
                effects += self._links.send_rows(service, rows, now) if rows else []
        return effects

    def _give_up_if_stuck(self, now: float) -> list[Effect]:
        """A device that hangs cannot be told so; the process ends and its successor goes on."""
        if not self._flights:
            return []
        first = self._flights.first
        predicted_s = first.predicted_s
        bound_s = predicted_s + max(self.config.stuck_after_s, 10 * predicted_s)
        started_s = max(first.launched_s, self._last_done_s)
        if now - started_s < bound_s:
            return []
        return [Stop(f"step {first.batch.step} has not ended after {now - started_s:.0f} s")]

    def _forgive_own_pause(self, late_s: float) -> None:
        """A timer that comes late means that this process was stopped (or the machine was): others
        must not be found silent for that time."""
        if late_s > self.config.heartbeat_s:
            self._last_done_s += late_s
            self._links.forgive(late_s)
            self.exchange.forgive(late_s)

    def _check_when_idle(self) -> None:
        """Invariants are recounted once in each pause, and not while somebody might be waiting."""
        if self._flights or self.scheduler.has_work() or not self.config.recounts_when_idle:
            return
        self._idle_beats += 1
        if self._idle_beats == 2:
            self.scheduler.check()
            self.exchange.check()
