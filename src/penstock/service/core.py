"""ServiceCore: the service as a state machine without I/O.

It keeps the journal, decides where each sequence runs, checks what comes back against the journal,
and moves sequences when an instance fails. The driver (`service/app.py`) or the simulator carries
out the effects; `Reply` hands a `TokenDelta` to whoever made the request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from penstock.protocol.codec import PROTOCOL_VERSION, Message
from penstock.protocol.effects import Effect, Reply, Send, SetTimer
from penstock.protocol.errors import (
    EngineFailed,
    EngineUnavailable,
    ErrorInfo,
    Overloaded,
    PenstockError,
    from_info,
)
from penstock.protocol.instance import Attach, Attached, Load, Probe, Probed, Resync, Snapshot
from penstock.protocol.kv import KvEvents, Refused
from penstock.protocol.request import Cancel, Submit
from penstock.protocol.tokens import Credit, PromptLogprobs, TokenRow, Tokens
from penstock.service.cluster.instances import Instance, view_of
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.service.journal import Entry, Journal
from penstock.service.policies.routing import Decision, Policy, RouteRequest, least_load


@dataclass(frozen=True, slots=True)
class ServiceCoreConfig:
    name: str = "service-0"
    incarnation: int = 1
    #: Sequences accepted that have had no token yet; more are refused with 429.
    max_queue: int = 1024
    suspect_after_s: float = 1.5
    lost_after_s: float = 4.0
    attach_every_s: float = 0.25
    tick_s: float = 0.25
    #: A sequence without progress for this long is looked after: is it still where we think?
    resync_after_s: float = 2.0
    #: How long a sequence may be without an instance before it ends with an error, when nothing is
    #: known to be on its way. `expect` says that an instance is being (re)started: then this long:
    recovery_s: float = 4.0
    restart_recovery_s: float = 120.0
    #: Placements in a row that yield no token before the request is taken to be the cause.
    max_fruitless_attempts: int = 3
    credit_every: int = 32


class ServiceCore:
    def __init__(self, config: ServiceCoreConfig, policy: Policy = least_load) -> None:
        self.config = config
        self.policy = policy
        self.journal = Journal()
        self.instances: dict[str, Instance] = {}
        self._homeless: deque[Entry] = deque()
        self._num_queued = 0  # journal entries without any token yet
        self._expected: set[str] = set()  # membership only, never iterated
        self.num_resumed = 0

    # --- the driver's side: requests and the life of instances ----------------------------------

    def submit(self, spec: GenerationSpec, now: float) -> list[Effect]:
        """Accept a request. Raises `Overloaded`; after this each choice gets one terminal delta."""
        if self._num_queued + spec.n > self.config.max_queue:
            raise Overloaded(
                f"{self._num_queued} sequences wait already (the limit is "
                f"{self.config.max_queue}): try again later",
                retry_after_s=1.0,
            )
        deadline_s = None if spec.total_budget_s is None else now + spec.total_budget_s
        effects: list[Effect] = []
        for choice in range(spec.n):
            entry = Entry(
                key=f"{spec.request_id}/{choice}",
                request_id=spec.request_id,
                choice=choice,
                prompt_ids=spec.prompt_ids,
                sampling=spec.sampling,
                constraint=spec.constraint,
                request_class=spec.request_class,
                priority=spec.priority,
                cache_salt=spec.cache_salt,
                accepted_s=now,
                deadline_s=deadline_s,
                progress_s=now,
            )
            self.journal.add(entry)
            self._num_queued += 1
            effects += self._place(entry, now)
        return effects

    def cancel(self, request_id: str, choice: int | None, now: float) -> list[Effect]:
        """The caller wants no more of it; no further delta follows. Unknown requests are fine."""
        effects: list[Effect] = []
        for entry in self.journal.of_request(request_id):
            if choice is None or entry.choice == choice:
                if entry.instance is not None:
                    effects.append(Send(entry.instance, Cancel(entry.key, entry.attempt)))
                self._close(entry)
        return effects

    def add_instance(self, name: str, now: float) -> list[Effect]:
        """A connection to `name` exists: attach to it."""
        self.instances[name] = Instance(name, heard_s=now)
        return self.on_timer(now)

    def expect(self, name: str, coming: bool) -> None:
        """The driver is (re)starting `name`: sequences without an instance may wait longer."""
        (self._expected.add if coming else self._expected.discard)(name)

    def on_instance_lost(self, name: str, now: float) -> list[Effect]:
        """`name` has died or fallen silent: its sequences go on elsewhere, from the journal."""
        instance = self.instances[name]
        instance.state = "lost"
        effects: list[Effect] = []
        for entry in list(instance.entries.values()):
            effects += self._replace(entry, now)
        return effects

    @property
    def ready(self) -> bool:
        """Instances attach only after they have produced a token, so an active one is ready."""
        return any(i.state == "active" for i in self.instances.values())

    @property
    def num_queued(self) -> int:
        return self._num_queued

    def explain(self, request_id: str) -> list[Decision | None]:
        return [entry.decision for entry in self.journal.of_request(request_id)]

    # --- messages ------------------------------------------------------------------------------

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        instance = self.instances.get(peer)
        if instance is None:
            return []
        match message:
            case Tokens():
                return self._tokens(instance, message, now)
            case Attached():
                return self._attached(instance, message, now)
            case Refused():
                return self._refused(instance, message, now)
        incarnation = getattr(message, "incarnation", None)
        if instance.card is None or incarnation != instance.incarnation:
            return []  # from before a restart
        self._heard(instance, now)
        match message:
            case Load():
                instance.load = message
                return self._revive(instance, now)
            case Snapshot():
                return self._reconcile(instance, message, now)
            case PromptLogprobs():
                return self._prompt_logprobs(instance, message)
            case Probed() | KvEvents():
                return []
            case _:
                return []

    def _tokens(self, instance: Instance, message: Tokens, now: float) -> list[Effect]:
        """The hot path: every new token of every stream on this instance comes through here."""
        if message.incarnation != instance.incarnation or message.number <= instance.tokens_seen:
            return []  # from before a restart, or a duplicate
        effects: list[Effect] = []
        if message.number != instance.tokens_seen + 1:
            effects += self._resync(instance, now)  # a gap: something was lost on the way
        instance.tokens_seen = message.number
        self._heard(instance, now)
        entries = instance.entries
        for row in message.rows:
            entry = entries.get(row.request_id)
            if entry is None or row.attempt != entry.attempt:
                continue  # cancelled, or an attempt that has been given up
            if row.ids and row.start != len(entry.emitted):
                if row.start > len(entry.emitted):
                    effects += self._replace(entry, now)  # tokens are missing: draw them again
                continue
            if row.finish == "error" and row.error is not None:
                effects += self._row_failed(entry, row.error, now)
                continue
            effects.append(self._accept(instance, entry, row, now))
        if instance.tokens_seen - instance.tokens_credited >= self.config.credit_every:
            effects.append(self._credit(instance))
        return effects

    def _accept(self, instance: Instance, entry: Entry, row: TokenRow, now: float) -> Reply:
        if row.ids:
            if entry.queued_tokens:
                instance.started(entry)
            if not entry.emitted:
                self._num_queued -= 1
            entry.emitted += row.ids
            entry.progress_s = now
            entry.attempts_without_progress = 0
        if entry.cached_tokens is None:
            entry.cached_tokens = row.cached_tokens
        delta = TokenDelta(
            entry.choice,
            row.ids,
            row.finish,
            row.stop_token,
            row.logprobs,
            cached_tokens=entry.cached_tokens,
            queued_s=row.queued_s,
        )
        if row.finish is not None:
            self._close(entry)
        return Reply(entry.request_id, delta)

    def _row_failed(self, entry: Entry, error: ErrorInfo, now: float) -> list[Effect]:
        if from_info(error).retryable:
            return self._replace(entry, now)
        return [self._end_with(entry, error)]

    def _prompt_logprobs(self, instance: Instance, message: PromptLogprobs) -> list[Effect]:
        entry = instance.entries.get(message.request_id)
        if entry is None or message.attempt != entry.attempt:
            return []
        known = entry.prompt_logprobs_done - message.start
        fresh = message.entries[max(0, known) :]
        if known < 0 or not fresh:
            return []  # a gap is repaired with the tokens'; what is known already is not repeated
        entry.prompt_logprobs_done += len(fresh)
        return [Reply(entry.request_id, TokenDelta(entry.choice, [], prompt_logprobs=fresh))]

    def _attached(self, instance: Instance, message: Attached, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if instance.card is not None and message.card.incarnation < instance.incarnation:
            return []
        if instance.card is None or message.card.incarnation > instance.incarnation:
            # A new process under this name: whatever ran on the old one is gone.
            effects += self.on_instance_lost(instance.name, now) if instance.card else []
        else:
            effects += self._resync(instance, now)  # it was only away: who still runs there?
        # It may have forgotten us meanwhile and count from one again. If it has not, there is a gap
        # now, which a resync mends; what comes twice is known by its start.
        instance.tokens_seen = instance.tokens_credited = 0
        instance.card = message.card
        instance.state = "active"
        self._expected.discard(instance.name)
        self._heard(instance, now)
        return effects + self._place_homeless(now)

    def _refused(self, instance: Instance, message: Refused, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if message.what == "attach":
            instance.state = "lost"
            return effects
        if message.code == "not_attached":
            # It has forgotten us (a lost Attach, or it dropped us for not reading): start over.
            instance.state = "connecting"
        entry = instance.entries.get(message.request_id or "")
        if entry is not None and entry.attempt == message.attempt:
            effects += self._replace(entry, now, avoid=instance.name)
        return effects

    def _reconcile(self, instance: Instance, snapshot: Snapshot, now: float) -> list[Effect]:
        """Both sides agree again: what only it has is cancelled, what only we have is replaced."""
        sent_s, instance.resync_sent_s = instance.resync_sent_s, None
        effects: list[Effect] = []
        live = {r.request_id: r for r in snapshot.requests}
        for request_id, request in live.items():
            entry = instance.entries.get(request_id)
            if entry is None or entry.attempt != request.attempt:
                effects.append(Send(instance.name, Cancel(request_id, request.attempt)))
        for entry in list(instance.entries.values()):
            found = live.get(entry.key)
            missing = found is None or found.attempt != entry.attempt
            if missing and sent_s is not None and entry.submitted_s < sent_s:
                effects += self._replace(entry, now)
        return effects

    # --- time ----------------------------------------------------------------------------------

    def on_timer(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        config = self.config
        for instance in self.instances.values():
            effects += self._look_after(instance, now)
        for entry in list(self._homeless):
            since_s = entry.homeless_since_s
            bound_s = config.restart_recovery_s if self._expected else config.recovery_s
            if since_s is not None and now - since_s > bound_s:
                error = EngineUnavailable(
                    f"no engine instance could take the request within {bound_s:g} s: "
                    "check /health and the engine's log, then try again",
                    retry_after_s=1.0,
                )
                effects.append(self._end_with(entry, error.info()))
        late = [e for e in self.journal if e.deadline_s is not None and now > e.deadline_s]
        for entry in late:
            if entry.instance is not None:
                effects.append(Send(entry.instance, Cancel(entry.key, entry.attempt)))
            error = EngineUnavailable("the request's time budget ran out before it finished")
            effects.append(self._end_with(entry, error.info()))
        effects.append(SetTimer(now + config.tick_s))
        return effects

    def _look_after(self, instance: Instance, now: float) -> list[Effect]:
        config = self.config
        effects: list[Effect] = []
        if instance.state in ("connecting", "lost"):
            if now - instance.attach_sent_s >= config.attach_every_s:
                instance.attach_sent_s = now
                attach = Attach(config.name, config.incarnation, PROTOCOL_VERSION)
                effects.append(Send(instance.name, attach))
            return effects
        silent_s = now - instance.heard_s
        if silent_s > config.lost_after_s:
            return self.on_instance_lost(instance.name, now)
        if silent_s > config.suspect_after_s:
            instance.state = "suspect"
            effects.append(Send(instance.name, Probe(int(now * 1000))))
            return effects
        if instance.tokens_seen > instance.tokens_credited:
            effects.append(self._credit(instance))
        stale = any(
            now - max(e.progress_s, e.submitted_s) > config.resync_after_s
            for e in instance.entries.values()
        )
        if stale:
            effects += self._resync(instance, now)
        return effects

    def _heard(self, instance: Instance, now: float) -> None:
        instance.heard_s = now
        if instance.state == "suspect":
            instance.state = "active"

    def _revive(self, instance: Instance, now: float) -> list[Effect]:
        """A lost instance that speaks again (it was only stopped) must attach anew, and be rid of
        what has been placed elsewhere meanwhile."""
        if instance.state != "lost":
            return self._place_homeless(now) if self._homeless else []
        instance.state = "connecting"
        return self._resync(instance, now)

    def _resync(self, instance: Instance, now: float) -> list[Effect]:
        if instance.resync_sent_s is not None and now - instance.resync_sent_s < 1.0:
            return []
        instance.resync_sent_s = now
        return [Send(instance.name, Resync())]

    def _credit(self, instance: Instance) -> Send:
        instance.tokens_credited = instance.tokens_seen
        return Send(instance.name, Credit(instance.tokens_seen))

    # --- placement -----------------------------------------------------------------------------

    def _place(self, entry: Entry, now: float, avoid: str | None = None) -> list[Effect]:
        view = view_of(i for i in self.instances.values() if i.name != avoid)
        if not view.names:
            if entry.homeless_since_s is None:
                entry.homeless_since_s = now
            self._homeless.append(entry)
            return []
        entry.homeless_since_s = None
        entry.decision = self.policy(view, RouteRequest(entry.num_tokens))
        instance = self.instances[entry.decision.instance]
        instance.place(entry)
        entry.attempt += 1
        entry.submitted_s = now
        return [Send(instance.name, self._message_for(entry, instance, now))]

    def _message_for(self, entry: Entry, instance: Instance, now: float) -> Submit:
        assert instance.card is not None
        sampling = entry.sampling
        if sampling.prompt_logprobs is not None and entry.prompt_logprobs_done >= len(
            entry.prompt_ids
        ):
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return Submit(
            request_id=entry.key,
            attempt=entry.attempt,
            service=self.config.name,
            service_incarnation=self.config.incarnation,
            prompt_ids=entry.prompt_ids,
            resumed_ids=list(entry.emitted),
            sampling=sampling,
            choice=entry.choice,
            group=entry.request_id,
            block_keys=entry.block_keys(instance.card.model_digest),
            cache_salt=entry.cache_salt,
            constraint=entry.constraint,
            request_class=entry.request_class,
            priority=entry.priority,
            total_budget_s=None if entry.deadline_s is None else entry.deadline_s - now,
        )

    def _replace(self, entry: Entry, now: float, avoid: str | None = None) -> list[Effect]:
        """Give up the present attempt and go on elsewhere (or here again), from the journal."""
        if entry.instance is not None:
            self.instances[entry.instance].unplace(entry)
        entry.attempts_without_progress += 1
        if entry.attempts_without_progress > self.config.max_fruitless_attempts:
            error = EngineFailed(
                f"the request was given up after {entry.attempts_without_progress} attempts "
                "without a new token: see the engine's log"
            )
            return [self._end_with(entry, error.info())]
        self.num_resumed += 1
        return self._place(entry, now, avoid)

    def _place_homeless(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        waiting, self._homeless = self._homeless, deque()
        for entry in waiting:
            effects += self._place(entry, now)
        return effects

    # --- ends ----------------------------------------------------------------------------------

    def _end_with(self, entry: Entry, error: ErrorInfo) -> Reply:
        self._close(entry)
        return Reply(entry.request_id, TokenDelta(entry.choice, [], "error", error=error))

    def _close(self, entry: Entry) -> None:
        if entry.instance is not None:
            self.instances[entry.instance].unplace(entry)
        elif entry.homeless_since_s is not None:
            self._homeless.remove(entry)
        if not entry.emitted:
            self._num_queued -= 1
        self.journal.remove(entry)

    def close_all(self, error: PenstockError) -> list[Effect]:
        """The service stops: whatever still lives ends with this error."""
        return [self._end_with(entry, error.info()) for entry in list(self.journal)]

    def check(self) -> None:
        """Invariants, recounted: counters equal what the journal says."""
        entries: Iterable[Entry] = list(self.journal)
        assert self._num_queued == sum(1 for e in entries if not e.emitted)
        for entry in entries:
            placed = entry.instance is not None
            assert placed != (entry.homeless_since_s is not None), entry.key
            assert (entry in self._homeless) != placed
        for instance in self.instances.values():
            mine = [e for e in entries if e.instance == instance.name]
            assert len(mine) == len(instance.entries)
            assert instance.queued_tokens == sum(e.queued_tokens for e in mine)
            assert instance.running == sum(1 for e in mine if not e.queued_tokens)
