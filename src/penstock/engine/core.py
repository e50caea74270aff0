"""InstanceCore: one engine instance as a state machine without I/O.

Messages, finished steps and timers come in; effects go out. The driver (`engine/instance.py`) or
the simulator carries them out. Time is whatever `now` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from penstock.engine.admission import check_ids, check_supported
from penstock.engine.cost import CostFitter
from penstock.engine.scheduler.batch import Batch, StepResult
from penstock.engine.scheduler.scheduler import DuplicateSubmit, Scheduler
from penstock.engine.scheduler.sequence import SequenceUpdate
from penstock.engine.step_counts import StepCounts
from penstock.protocol.codec import PROTOCOL_VERSION, Message
from penstock.protocol.effects import Effect, Launch, Send, SetTimer, Stop
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
from penstock.protocol.kv import KvEvents, Refused
from penstock.protocol.request import Cancel, Submit
from penstock.protocol.tokens import Credit, PromptLogprobs, TokenRow, Tokens


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
    #: A step is prepared this long before its predecessor's predicted end (or right away if steps
    #: are shorter): late enough to take in new arrivals, early enough that the device never waits.
    prepare_ahead_s: float = 0.006
    prepare_ahead_fraction: float = 0.15


@dataclass(slots=True)
class _Link:
    """One attached service."""

    incarnation: int
    kv_events: bool
    heard_s: float
    sent: int = 0
    acknowledged: int = 0
    kv_sent: int = 0
    stalled_since_s: float | None = None
    unreachable_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Flight:
    batch: Batch
    launched_s: float
    predicted_s: float | None
    #: There was work ever since its predecessor ended.
    follows: bool


class InstanceCore:
    def __init__(
        self, card: InstanceCard, scheduler: Scheduler, config: CoreConfig | None = None
    ) -> None:
        self.card = card
        self.scheduler = scheduler
        self.config = config or CoreConfig()
        self.cost = CostFitter()
        self.role: Role = "any"
        self.epoch = 0
        self.draining = False
        self.ready = False
        self._links: dict[str, _Link] = {}
        self._flights: deque[_Flight] = deque()
        self._deadlines: dict[tuple[str, str], tuple[float, int]] = {}
        self._free_at_s = 0.0  # when the device is predicted to have done all it was given
        self._next_beat_s = 0.0
        self._load_number = 0
        self._counts = StepCounts()
        self._last_done_s = 0.0
        self._idle_beats = 0

    # --- what comes in -------------------------------------------------------------------------

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        if (link := self._links.get(peer)) is not None:
            link.heard_s = now
        match message:
            case Submit():
                effects = self._submit(peer, message, now)
            case Cancel():
                effects = self._cancel(peer, message, now)
            case Credit():
                effects = self._credit(peer, message)
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
        flight = self._flights.popleft()
        assert flight.batch.step == result.step, "the runner finished steps out of order"
        self._counts.observe(result, flight.follows)
        self._last_done_s = now
        if result.error is None:
            self.cost.observe(flight.batch, result.compute_s or now - flight.launched_s)
            self.ready = self.ready or any(row.ids for row in result.rows)
        # Predictions err; what is left in flight starts now, whatever was thought before.
        self._free_at_s = now + sum(f.predicted_s or 0.0 for f in self._flights)
        published = self._publish(self.scheduler.apply(result), now)
        return self._settle(published, now, step_done=True)

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
        link = self._links.get(peer)
        if link is None or taken == (link.unreachable_since_s is None):
            return
        link.unreachable_since_s = None if taken else now

    # --- one turn of the loop ------------------------------------------------------------------

    def _settle(self, effects: list[Effect], now: float, step_done: bool = False) -> list[Effect]:
        """What every input ends with: keep the device fed, say when to wake up."""
        wake_s = self._next_beat_s
        launches: list[Effect] = []
        while len(self._flights) < self.config.overlap_steps:
            prepare_s = self._prepare_at_s()
            if prepare_s > now:
                wake_s = min(wake_s, prepare_s)
                break
            batch = self.scheduler.schedule()
            if batch is None:
                break
            for newcomer in self.scheduler.newcomers:
                newcomer.started_s = now
            predicted_s = self.cost.predict(batch)
            follows = step_done or bool(self._flights)
            self._flights.append(_Flight(batch, now, predicted_s, follows))
            self._free_at_s = max(self._free_at_s, now) + (predicted_s or 0.0)
            launches.append(Launch(batch))
            self._idle_beats = 0
        effects = launches + effects  # the device first: frames can wait while it computes
        effects += self._kv_events()
        if self.draining and not self._flights and not self.scheduler.has_work():
            effects.append(Stop())
        effects.append(SetTimer(wake_s))
        return effects

    def _prepare_at_s(self) -> float:
        """When the next batch should be put together: at once if the device idles or nothing is
        known, else shortly before it is predicted to fall idle."""
        if not self._flights or not self.scheduler.has_work():
            return 0.0
        last = self._flights[-1].predicted_s
        if last is None:
            return 0.0
        ahead_s = max(
            self.config.prepare_ahead_s,
            self.config.prepare_ahead_fraction * last,
            2 * self.cost.residual_s,
        )
        return self._free_at_s - ahead_s

    # --- messages ------------------------------------------------------------------------------

    def _submit(self, peer: str, submit: Submit, now: float) -> list[Effect]:
        link = self._links.get(peer)
        refusal = None
        if link is None or link.incarnation != submit.service_incarnation:
            refusal = ("not_attached", "attach first: this incarnation of the service is unknown")
        elif self.draining:
            refusal = ("draining", "the instance is draining and takes nothing new")
        elif any(s.instance == self.card.name and s.epoch < self.epoch for s in submit.plan):
            refusal = ("stale_epoch", f"the plan is older than epoch {self.epoch} of this instance")
        if refusal:
            code, reason = refusal
            return [Send(peer, Refused("submit", reason, submit.request_id, submit.attempt, code))]
        try:
            check_supported(submit)
            check_ids(submit, self.card.vocab_size)
            # The scheduler knows services by the name their transport gave them.
            if submit.service != peer:
                submit = msgspec.structs.replace(submit, service=peer)
            self.scheduler.add(submit).arrived_s = now
        except DuplicateSubmit:
            return []  # the network has delivered it twice
        except PenstockError as exc:
            row = _terminal(submit.request_id, submit.attempt, len(submit.resumed_ids), exc)
            return self._send_rows(peer, [row], now)
        if submit.total_budget_s is not None:
            key = (peer, submit.request_id)
            self._deadlines[key] = (now + submit.total_budget_s, submit.attempt)
        return []

    def _cancel(self, peer: str, cancel: Cancel, now: float) -> list[Effect]:
        key = (peer, cancel.request_id)
        if not self.scheduler.cancel(key, cancel.attempt):
            return []
        self._deadlines.pop(key, None)
        row = TokenRow(cancel.request_id, cancel.attempt, 0, [], "cancelled")
        return self._send_rows(peer, [row], now)

    def _credit(self, peer: str, credit: Credit) -> list[Effect]:
        link = self._links.get(peer)
        if link is None:
            # A service that only listens would not notice for long that it is not known here.
            return [Send(peer, Refused("credit", "attach first", code="not_attached"))]
        if credit.number > link.sent:
            return []
        link.acknowledged = max(link.acknowledged, credit.number)
        if link.stalled_since_s is not None and self._outstanding(link) <= (
            self.config.credit_window // 2
        ):
            link.stalled_since_s = None
            self.scheduler.resume(peer)
        return []

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
            self._links[peer] = _Link(attach.incarnation, attach.kv_events, heard_s=now)
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
        self._links.pop(peer, None)
        self.scheduler.drop_service(peer)
        self._deadlines = {k: v for k, v in self._deadlines.items() if k[0] != peer}

    def _assign(self, peer: str, assign: Assign) -> list[Effect]:
        if assign.epoch <= self.epoch:
            reason = f"epoch {assign.epoch} is not newer than {self.epoch}"
            return [Send(peer, Refused("assign", reason, code="stale_epoch"))]
        self.role, self.epoch = assign.role, assign.epoch
        return [Send(peer, Assigned(self.card.name, self.role, self.epoch))]

    def _snapshot(self, peer: str, nonce: int) -> list[Effect]:
        link = self._links.get(peer)
        if link is None:
            return [Send(peer, Refused("resync", "attach first", code="not_attached"))]
        live = [
            LiveRequest(s.key[1], s.attempt, s.num_output_tokens) for s in self.scheduler.live(peer)
        ]
        keys = b"".join(self.scheduler.kv_keys()) if link.kv_events else b""
        card = self.card
        snapshot = Snapshot(card.name, card.incarnation, live, link.kv_sent, keys, nonce)
        return [Send(peer, snapshot)]

    # --- what goes out -------------------------------------------------------------------------

    def _publish(self, updates: Iterable[SequenceUpdate], now: float) -> list[Effect]:
        effects: list[Effect] = []
        rows: dict[str, list[TokenRow]] = {}
        card = self.card
        for update in updates:
            service, request_id = update.sequence.key
            attempt = update.sequence.attempt
            if update.prompt_logprobs:
                chunk = PromptLogprobs(
                    card.name,
                    card.incarnation,
                    request_id,
                    attempt,
                    update.prompt_logprobs_start,
                    update.prompt_logprobs,
                )
                effects.append(Send(service, chunk))
            if not update.ids and update.finish is None:
                continue
            row = TokenRow(
                request_id,
                attempt,
                update.start,
                update.ids,
                update.finish,
                update.stop_token,
                update.logprobs,
                update.cached_tokens,
                update.error,
                _queued_s(update),
            )
            rows.setdefault(service, []).append(row)
            if update.finish is not None:
                self._deadlines.pop(update.sequence.key, None)
        for service, group in rows.items():
            effects += self._send_rows(service, group, now)
        return effects

    def _send_rows(self, service: str, rows: list[TokenRow], now: float) -> list[Effect]:
        link = self._links.get(service)
        if link is None:
            return []  # it detached while the step ran; its sequences are already freed
        link.sent += 1
        if link.stalled_since_s is None and self._outstanding(link) >= self.config.credit_window:
            link.stalled_since_s = now
            self.scheduler.pause(service)
        card = self.card
        return [Send(service, Tokens(card.name, card.incarnation, link.sent, rows))]

    @staticmethod
    def _outstanding(link: _Link) -> int:
        return link.sent - link.acknowledged

    def _kv_events(self) -> list[Effect]:
        changes = self.scheduler.take_kv_changes()
        if not changes:
            return []
        card = self.card
        effects: list[Effect] = []
        for service, link in self._links.items():
            if link.kv_events:
                link.kv_sent += 1
                events = KvEvents(card.name, card.incarnation, link.kv_sent, changes)
                effects.append(Send(service, events))
        return effects

    def _beat(self, now: float) -> list[Effect]:
        self._load_number += 1
        load = self.load(now)
        return [Send(service, load) for service in self._links]

    def load(self, now: float) -> Load:
        s = self.scheduler.stats
        card = self.card
        return Load(
            instance=card.name,
            incarnation=card.incarnation,
            number=self._load_number,
            step=self._counts.steps,
            step_end_in_s=max(0.0, self._free_at_s - now) if self._flights else 0.0,
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
            **self._counts.for_load(),
            cost=self.cost.model(),
            role=self.role,
            epoch=self.epoch,
            draining=self.draining,
        )

    def _expire(self, now: float) -> list[Effect]:
        """Requests past their time budget end with an error."""
        effects: list[Effect] = []
        due = [(k, attempt) for k, (at_s, attempt) in self._deadlines.items() if at_s <= now]
        for key, attempt in due:
            del self._deadlines[key]
            if self.scheduler.cancel(key, attempt):
                error = EngineUnavailable("the request's time budget ran out before it finished")
                effects += self._send_rows(key[0], [_terminal(key[1], attempt, 0, error)], now)
        return effects

    def _free_the_deaf(self, now: float) -> list[Effect]:
        """Services that are gone, or never read, lose their sequences: others need the room."""
        effects: list[Effect] = []
        for service, link in list(self._links.items()):
            gone_s, stalled_s = link.unreachable_since_s, link.stalled_since_s
            unreachable = gone_s is not None and now - gone_s >= self.config.service_lost_s
            if unreachable or now - link.heard_s >= self.config.service_silent_s:
                self._forget(service)
            elif stalled_s is not None and now - stalled_s >= self.config.stall_limit_s:
                link.stalled_since_s = now
                error = ProtocolError("the service did not take in its tokens: requests freed")
                live = self.scheduler.live(service)
                rows = [_terminal(s.key[1], s.attempt, 0, error) for s in live]
                self.scheduler.drop_service(service)
                self.scheduler.pause(service)  # it is still out of credit
                effects += self._send_rows(service, rows, now) if rows else []
        return effects

    def _give_up_if_stuck(self, now: float) -> list[Effect]:
        """A device that hangs cannot be told so; the process ends and its successor goes on."""
        if not self._flights:
            return []
        first = self._flights[0]
        predicted_s = first.predicted_s if first.predicted_s is not None else 0.0
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
            for link in self._links.values():
                link.heard_s += late_s

    def _check_when_idle(self) -> None:
        """Invariants are recounted once in each pause, and not while somebody might be waiting."""
        if self._flights or self.scheduler.has_work():
            return
        self._idle_beats += 1
        if self._idle_beats == 2:
            self.scheduler.check()


def _queued_s(update: SequenceUpdate) -> float | None:
    """How long the sequence waited for its first step; said once, with its first token."""
    sequence = update.sequence
    if sequence.arrived_s is None or sequence.started_s is None or not update.ids:
        return None
    waited_s = sequence.started_s - sequence.arrived_s
    sequence.arrived_s = None
    return waited_s


def _terminal(request_id: str, attempt: int, start: int, error: PenstockError) -> TokenRow:
    return TokenRow(request_id, attempt, start, [], "error", error=error.info())
