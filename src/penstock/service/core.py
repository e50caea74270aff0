"""ServiceCore: the service as a state machine without I/O.

It accepts requests, checks what comes back against the journal, and watches the instances;
`placement.py` decides where each sequence runs and moves those whose instance fails. The driver
(`service/driver.py`) or the simulator carries out the effects; `Reply` hands a `TokenDelta` to
whoever made the request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.protocol.codec import PROTOCOL_VERSION, Message
from penstock.protocol.effects import Effect, Reply, Send, SetTimer
from penstock.protocol.errors import (
    ErrorInfo,
    Overloaded,
    PenstockError,
    from_info,
)
from penstock.protocol.instance import (
    Assigned,
    Attach,
    Attached,
    Detach,
    Drain,
    InstanceCard,
    Load,
    Probe,
    Resync,
    Role,
    Snapshot,
)
from penstock.protocol.kv import Fetched, KvEvents, Refused
from penstock.protocol.request import Cancel
from penstock.protocol.tokens import Credit, PromptLogprobs, TokenRow, Tokens
from penstock.service.cluster.finder import Finder, NoFinder
from penstock.service.cluster.fit import ANYTHING, Kind, Wanted, why_not
from penstock.service.cluster.instances import Instance
from penstock.service.cluster.roles import RoleKeeper, RoleKeeperConfig
from penstock.service.explain import Explanation
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.service.journal import Entry, Journal
from penstock.service.placement import Placement, PlacementConfig
from penstock.service.policies.routing import Policy, least_load
from penstock.service.prospects import Prospects


@dataclass(frozen=True, slots=True)
class ServiceCoreConfig:
    name: str = "service-0"
    incarnation: int = 1
    #: Sequences accepted that have had no token yet; more are refused with 429.
    max_queue: int = 1024
    #: Silence after which an instance gets no new work, and after which it is given up.
    suspect_after_s: float = 1.25
    lost_after_s: float = 2.5
    #: Between two tries to attach; they grow to `attach_at_most_s` while nothing answers.
    attach_every_s: float = 0.25
    attach_at_most_s: float = 2.0
    tick_s: float = 0.25
    #: A sequence without news for this long is looked after: is it still where we think?
    resync_after_s: float = 2.0
    #: A word at least this often, so that instances know that we live.
    speak_every_s: float = 1.0
    credit_every: int = 32
    #: Times to the first token and between two that are wanted of online requests that do not say;
    #: None: none. A request that cannot be answered in time is refused with 429.
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    #: An instance that is being emptied is told to drain after this long, whoever still needs it.
    drain_within_s: float = 5.0
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    roles: RoleKeeperConfig = field(default_factory=RoleKeeperConfig)
    #: What instances must be; others are refused.
    wanted: Wanted = ANYTHING


class ServiceCore:
    def __init__(
        self,
        config: ServiceCoreConfig,
        policy: Policy = least_load,
        finder: Finder | None = None,
    ) -> None:
        self.config = config
        self.prospects = Prospects(finder or NoFinder())
        self.roles = RoleKeeper(config.roles)
        self.placement = Placement(
            config.placement, config.name, config.incarnation, policy, self.prospects
        )
        self._next_tick_s: float | None = None

    @property
    def journal(self) -> Journal:
        return self.placement.journal

    @property
    def instances(self) -> dict[str, Instance]:
        return self.placement.instances

    @property
    def ready(self) -> bool:
        """Instances attach only after they have produced a token, so an active one is ready."""
        return any(i.state == "active" for i in self.instances.values())

    def explain(self, request_id: str) -> Explanation | None:
        """Of a live request, or one of the last that have ended; None if it is neither."""
        return self.placement.explain(request_id)

    def check(self) -> None:
        self.placement.check()

    # --- the driver's side: requests and the life of instances ----------------------------------

    def submit(self, spec: GenerationSpec, now: float) -> list[Effect]:
        """Accept a request. Raises `Overloaded` (the queue is full, or the request's SLO cannot be
        met); after this each choice gets one terminal delta."""
        waiting = self.placement.num_queued
        if waiting + spec.n > self.config.max_queue:
            raise Overloaded(
                f"{waiting} sequences wait already (the limit is {self.config.max_queue}): "
                "try again later",
                retry_after_s=1.0,
            )
        spec = spec.with_slos(self.config.ttft_slo_s, self.config.tpot_slo_s)
        entries = [Entry.of(spec, choice, now) for choice in range(spec.n)]
        self.placement.admit(entries[0], now)
        effects = self._begin_to_tick(now) if self._next_tick_s is None else []
        for entry in entries:
            effects += self.placement.accept(entry, now)
            self.roles.arrived(now, len(entry.prompt_ids))
        return effects

    def cancel(self, request_id: str, choice: int | None, now: float) -> list[Effect]:
        """The caller wants no more of it; no further delta follows. Unknown requests are fine."""
        found = [e for e in self.journal.of_request(request_id) if choice in (None, e.choice)]
        return [effect for entry in found for effect in self.placement.withdraw(entry)]

    def add_instance(self, name: str, now: float) -> list[Effect]:
        """A connection to `name` exists: attach to it. If it was known by another address, what ran
        there goes on elsewhere."""
        old = self.instances.get(name)
        effects: list[Effect] = []
        if old is not None:
            effects = self._give_up(old, now)
            old.left()
        instance = self.instances[name] = Instance(name, self.placement.changes, heard_s=now)
        return [*effects, *self._look_after(instance, now), *self._begin_to_tick(now)]

    def expect(self, name: str, coming: bool) -> None:
        """The driver is (re)starting `name`: sequences without an instance may wait longer."""
        self.placement.expect(name, coming)

    def on_instance_lost(self, name: str, now: float) -> list[Effect]:
        """`name` has died or fallen silent: its sequences go on elsewhere, from the journal."""
        return self._give_up(self.instances[name], now)

    def on_instance_refused(self, name: str, reason: str, now: float) -> list[Effect]:
        """`name` is there and may not be used; status says why."""
        return self._give_up(self.instances[name], now, refusal=reason)

    def doubt(self, name: str, reason: str) -> None:
        """What is wrong with the connection to `name`, for status; "" if nothing is any more."""
        self.instances[name].refusal = reason

    def lead(self, term: int | None, now: float, *, elected: bool = False) -> list[Effect]:
        """This service decides on roles from now on, in a term greater than all before; with None
        another one does. `elected`: a registry sees to it that nobody else leads."""
        self.roles.lead(term, now, elected=elected)
        return []

    def assign(self, name: str, role: Role, now: float) -> list[Effect]:
        """Change a role by hand. Raises `NotLeading` where another service leads, and
        `InvalidRequest` where nobody would be left to prefill, or to decode."""
        return self.roles.assign(self.instances, name, role, now)

    def drain_instance(self, name: str, now: float) -> list[Effect]:
        """Empty `name`: nothing new goes there, what runs goes on elsewhere with what has been
        computed, and once nobody needs it any more it is told to drain, which ends its process.
        Where no other instance takes work it finishes what it has."""
        instance = self.instances[name]
        if instance.leaving_since_s is None:
            instance.leaving_since_s = now
        return self._empty(instance, now)

    def take_out(self, name: str, now: float) -> list[Effect]:
        """Empty `name` for good: once it is gone it is "drained" and nobody waits for it."""
        self.instances[name].is_out = True
        self.expect(name, False)
        return self.drain_instance(name, now)

    def bring_back(self, name: str) -> None:
        """The other way: its process starts again."""
        self.instances[name].bring_back()
        self.expect(name, True)

    def on_drained(self, name: str, now: float) -> list[Effect]:
        effects = self.on_instance_lost(name, now)
        self.instances[name].drained()
        return effects

    def remove_instance(self, name: str, now: float) -> list[Effect]:
        """`name` is not a part of this cluster any more."""
        instance = self.instances[name]
        effects = self._give_up(instance, now)
        self.instances.pop(name).left()
        self.placement.view.forget(name)
        self.roles.forget(name)
        self.placement.expect(name, False)
        if instance.card is not None:
            effects.append(Send(name, Detach(self.config.name, self.config.incarnation)))
        return effects

    def close_all(self, error: PenstockError) -> list[Effect]:
        """The service stops: whatever still lives ends with this error, here and there."""
        effects: list[Effect] = []
        for entry in list(self.journal):
            effects += self.placement.end(entry, error.info())
        detach = Detach(self.config.name, self.config.incarnation)
        return effects + [Send(i.name, detach) for i in self.instances.values() if i.card]

    # --- messages ------------------------------------------------------------------------------

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        instance = self.instances.get(peer)
        if instance is None:
            return []
        if isinstance(message, Attached):
            return self._attached(instance, message, now)
        if isinstance(message, Refused):
            return self._refused(instance, message, now)
        if isinstance(message, Assigned):
            instance.is_now(message.role, message.epoch)
            return []
        if getattr(message, "incarnation", None) != instance.incarnation:
            return []  # from before a restart
        instance.heard(now)
        match message:
            case Tokens():
                return self._tokens(instance, message, now)
            case Load():
                return self._load(instance, message, now)
            case KvEvents():
                return self._kv_events(instance, message, now)
            case Snapshot():
                return self._reconcile(instance, message, now)
            case PromptLogprobs():
                return self._prompt_logprobs(instance, message)
            case Fetched():
                self.placement.fetched(instance, message, now)
                return []
            case _:
                return []  # a Probed has been heard

    def _tokens(self, instance: Instance, message: Tokens, now: float) -> list[Effect]:
        """The hot path: every new token of every stream on this instance comes through here."""
        if message.number <= instance.tokens_seen:
            return []  # a duplicate
        effects: list[Effect] = []
        if message.number != instance.tokens_seen + 1:
            effects += self._resync(instance, now)  # a gap: something was lost on the way
        instance.tokens_seen = message.number
        entries = instance.entries
        for row in message.rows:
            entry = entries.get(row.request_id)
            if entry is None or row.attempt != entry.attempt:
                if row.finish is None:  # cancelled or given up, and it does not know that
                    effects.append(Send(instance.name, Cancel(row.request_id, row.attempt)))
            elif row.ids and not entry.is_next(row):
                if row.start >= len(entry.emitted):
                    effects += self.placement.move(entry, now, "tokens were lost")
            elif row.error is not None:
                effects += self._row_failed(entry, row.error, now)
            else:
                effects += self._accept(entry, row, now)
        if instance.tokens_seen - instance.tokens_credited >= self.config.credit_every:
            effects.append(self._credit(instance, now))
        return effects

    def _accept(self, entry: Entry, row: TokenRow, now: float) -> list[Effect]:
        if row.ids:
            self.placement.progress(entry, row, now)
        if entry.cached_tokens is None:
            entry.cached_tokens = row.cached_tokens
        delta = TokenDelta(
            entry.choice,
            row.ids,
            None if row.finish == "handover" else row.finish,
            row.stop_token,
            row.logprobs,
            cached_tokens=entry.cached_tokens,
            queued_s=row.queued_s,
        )
        effects: list[Effect] = [Reply(entry.request_id, delta)]
        if row.finish == "handover":
            effects += self.placement.hand_over(entry, now)
        elif row.finish is not None:
            effects += self.placement.close(entry, row.finish)
        return effects

    def _row_failed(self, entry: Entry, error: ErrorInfo, now: float) -> list[Effect]:
        if error.code == Overloaded.code and self.placement.may_move(entry):
            # What others have sent there was not in our view. Elsewhere there may be room.
            why = f"{entry.instance} has no room in its queue"
            return self.placement.move(entry, now, why, avoid=entry.instance or "")
        if from_info(error).retryable:
            return self.placement.retry(entry, now)
        return self.placement.end(entry, error)

    def _prompt_logprobs(self, instance: Instance, message: PromptLogprobs) -> list[Effect]:
        entry = instance.entries.get(message.request_id)
        if entry is None or message.attempt != entry.attempt:
            return []
        fresh = entry.take_prompt_logprobs(message)
        if not fresh:
            return []
        return [Reply(entry.request_id, TokenDelta(entry.choice, [], prompt_logprobs=fresh))]

    def _attached(self, instance: Instance, message: Attached, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if message.card.incarnation < instance.incarnation and not instance.is_gone:
            return []  # of the past; once the newer one is silent, its host's clock was put back
        if reason := self._why_not(instance, message.card):
            return self._give_up(instance, now, refusal=reason)
        if instance.card is not None and message.card.incarnation != instance.incarnation:
            # A new process under this name: whatever ran on the old one is gone.
            effects += self._give_up(instance, now)
        elif instance.card is not None:
            effects += self._resync(instance, now)  # it was only away: who still runs there?
        # It may have forgotten us meanwhile and count from one again. If it has not, there is a gap
        # now, which a resync mends; what comes twice is known by its start.
        instance.tokens_seen = instance.tokens_credited = 0
        instance.attached(message.card, now, message.epoch)
        instance.is_now(message.role, message.epoch)
        self.prospects.kind = Kind.of(message.card)
        self.placement.expect(instance.name, False)
        if self.prospects.finder.attached(message.card):
            instance.snapshot_wanted = True
            effects += self._resync(instance, now)
        return effects + self.placement.house(now)

    def _why_not(self, instance: Instance, card: InstanceCard) -> str:
        wanted, others = self.config.wanted, self.instances.values()
        return why_not(card, instance, wanted, others, self.journal, self.prospects.kind)

    def _refused(self, instance: Instance, message: Refused, now: float) -> list[Effect]:
        if message.what == "attach":
            return self._give_up(instance, now, refusal=message.reason)
        if message.code == "not_attached":
            # It has forgotten us: nothing of ours runs there any more.
            return self._give_up(instance, now)
        instance.draining = instance.draining or message.code == "draining"
        if message.what == "assign":
            return []  # an older leader's word; the instance says what it is by itself
        instance.epoch_in_doubt = instance.epoch_in_doubt or message.code == "stale_epoch"
        if message.what == "fetch":
            self.placement.reservations.refused(instance, message)
            return []
        entry = instance.entries.get(message.request_id or "")
        if entry is None or entry.attempt != message.attempt:
            return []
        why = f"{instance.name} refused it: {message.code}"
        return self.placement.move(entry, now, why, avoid=instance.name)

    def _load(self, instance: Instance, load: Load, now: float) -> list[Effect]:
        instance.loaded(load, now)
        if load.draining != instance.draining:
            instance.draining = load.draining
        instance.is_now(load.role, load.epoch)
        if instance.is_gone:
            # It was only stopped. It must attach anew, and be rid of what runs elsewhere by now.
            return self._resync(instance, now)
        return self.placement.house(now)

    def _kv_events(self, instance: Instance, events: KvEvents, now: float) -> list[Effect]:
        if self.prospects.finder.events(instance.name, events):
            return []
        instance.snapshot_wanted = True
        return self._resync(instance, now)

    def _reconcile(self, instance: Instance, snapshot: Snapshot, now: float) -> list[Effect]:
        """Both sides agree again: what only it has is cancelled, what only we have is moved."""
        asked_s = instance.resync_sent_s
        if asked_s is None or snapshot.nonce != instance.resync_nonce:
            return []  # the answer to an older question
        instance.resync_sent_s = None
        instance.snapshot_wanted = False
        self.prospects.finder.snapshot(instance.name, snapshot)
        effects: list[Effect] = []
        if snapshot.tokens_sent > instance.tokens_seen:
            # The last ones were lost. If it waits for credit, none will come that would show it.
            instance.tokens_seen = snapshot.tokens_sent
            effects.append(self._credit(instance, now))
        live = {r.request_id: r for r in snapshot.requests}
        for request_id, found in live.items():
            entry = instance.entries.get(request_id)
            if entry is None or entry.attempt != found.attempt:
                effects.append(Send(instance.name, Cancel(request_id, found.attempt)))
        for entry in list(instance.entries.values()):
            there = live.get(entry.key)
            if there is not None and there.attempt == entry.attempt:
                entry.confirmed_s = now
                if there.num_output_tokens > len(entry.emitted):
                    effects += self.placement.move(entry, now, "tokens were lost")
            elif entry.submitted_s <= asked_s:  # asked after it: the snapshot should have had it
                effects += self.placement.move(entry, now, f"{instance.name} did not know it")
        return effects

    # --- time ----------------------------------------------------------------------------------

    def on_timer(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        self._forgive_own_pause(now)
        for instance in (i for i in self.instances.values() if i.state != "drained"):
            effects += self._look_after(instance, now)
            effects += self._empty(instance, now)
        effects += self.placement.house(now)
        effects += self.placement.hurry(now)
        if self.roles.is_due(now):
            p = self.prospects
            mean_tokens = p.lengths.mean_tokens
            effects += self.roles.keep(*self.placement.sight(now), p.attainment, mean_tokens, now)
        effects += self.placement.expire(now)
        self._next_tick_s = now + self.config.tick_s
        return [*effects, SetTimer(self._next_tick_s)]

    def _begin_to_tick(self, now: float) -> list[Effect]:
        """With the first instance, or the first request if that comes earlier: its bounds hold
        though there is nobody. Afterwards the next tick stays as it is, however many come."""
        if self._next_tick_s is None:
            self._next_tick_s = now + self.config.tick_s
        return [SetTimer(self._next_tick_s)]

    def _forgive_own_pause(self, now: float) -> None:
        """A timer that comes late means that this process was stopped (or the machine was):
        instances must not be found silent for that time. Cassandra's failure detector does so."""
        late_s = 0.0 if self._next_tick_s is None else now - self._next_tick_s
        if late_s > 2 * self.config.tick_s:
            for instance in self.instances.values():
                instance.heard_s += late_s
            self.placement.forgive(late_s)

    def _look_after(self, instance: Instance, now: float) -> list[Effect]:
        config = self.config
        if instance.state == "connecting" or instance.is_gone:
            return self._attach(instance, now)
        silent_s = now - instance.heard_s
        if silent_s > config.lost_after_s:
            return self._give_up(instance, now)
        if silent_s > config.suspect_after_s:
            instance.state = "suspect"
            return [Send(instance.name, Probe(int(now * 1000)))]
        effects: list[Effect] = []
        # What has come since is acknowledged with that: a window is many times `credit_every`.
        if now - instance.credit_sent_s >= config.speak_every_s:
            effects.append(self._credit(instance, now))
        if instance.is_unsure(now, config.resync_after_s) or instance.snapshot_wanted:
            effects += self._resync(instance, now)
        return effects

    def _empty(self, instance: Instance, now: float) -> list[Effect]:
        """What should run elsewhere moves; an instance that has been emptied may go."""
        if instance.state != "active" or not instance.is_left:
            return []
        effects = self.placement.relieve(instance, now)
        since_s = instance.leaving_since_s
        if since_s is None or (instance.load is not None and instance.load.draining):
            return effects
        if now - since_s >= self.config.drain_within_s or not self.placement.needs(instance):
            effects.append(Send(instance.name, Drain()))
        return effects

    def _attach(self, instance: Instance, now: float) -> list[Effect]:
        if not instance.may_attach(now, self.config.attach_every_s, self.config.attach_at_most_s):
            return []
        listens = self.prospects.finder.listens
        attach = Attach(self.config.name, self.config.incarnation, PROTOCOL_VERSION, listens)
        return [Send(instance.name, attach)]

    def _give_up(self, instance: Instance, now: float, refusal: str = "") -> list[Effect]:
        instance.state = "refused" if refusal else "lost"
        if refusal:
            instance.refusal = refusal
            self.placement.expect(instance.name, False)  # it is here, and of no use
        self.prospects.finder.gone(instance.name)
        return self.placement.evacuate(instance, now)

    def _resync(self, instance: Instance, now: float) -> list[Effect]:
        """Ask who runs there; an answer that does not come is asked for again after a second."""
        if instance.resync_sent_s is not None and now - instance.resync_sent_s < 1.0:
            return []
        instance.resync_sent_s = now
        instance.resync_nonce += 1
        return [Send(instance.name, Resync(instance.resync_nonce))]

    def _credit(self, instance: Instance, now: float) -> Send:
        instance.tokens_credited = instance.tokens_seen
        instance.credit_sent_s = now
        return Send(instance.name, Credit(instance.tokens_seen))
