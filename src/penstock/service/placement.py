"""Which sequence runs where: placing, moving, handing over, and ending the entries of the journal.

All counters about queues and placements are kept here, so that each is taken back in one place.
However a sequence comes to be placed (new, after a failure, with its prompt computed elsewhere),
it is one `Submit` of a new attempt, made from the journal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.protocol.effects import Effect, Reply, Send
from penstock.protocol.errors import (
    EngineFailed,
    EngineUnavailable,
    ErrorInfo,
    Overloaded,
    PenstockError,
)
from penstock.protocol.kv import BLOCK_TOKENS, Fetched, KvSource
from penstock.protocol.request import Cancel
from penstock.protocol.tokens import TokenRow
from penstock.service import books, orders
from penstock.service.cluster.instances import Changes, Instance
from penstock.service.cluster.view import LiveView
from penstock.service.explain import Explainer, Explanation, PlacementRecord
from penstock.service.generation import TokenDelta
from penstock.service.journal import Entry, Journal
from penstock.service.policies.routing import ClusterView, Decision, Policy
from penstock.service.prospects import Prospects
from penstock.service.recovery import Recoveries, by_urgency, wait_for_each_other, way_taken
from penstock.service.reservations import Reservations


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """How long and how often a sequence is tried before it ends with an error."""

    #: Without an instance, when nothing is known to be on its way; with the time in which a silent
    #: instance is given up this stays within the 5 s of the design.
    recovery_s: float = 2.0
    #: Without an instance while one is being (re)started.
    restart_recovery_s: float = 120.0
    #: Steps with this sequence that raised, without a token in between: it is taken for the cause.
    max_failed_steps: int = 3
    #: Placements lost for any other reason, without a token in between.
    max_moves: int = 8
    #: Sequences that an instance hands over at once, each quarter of a second.
    migrated_at_once: int = 8
    #: A sequence with no more tokens to come than this finishes where it is.
    not_worth_migrating_tokens: int = 16
    #: A request that will miss its TTFT SLO is refused, or taken and deferred. Who has been
    #: deferred for so long goes before all others.
    refuses_late: bool = True
    overdue_s: float = 30.0
    #: Finished requests that can still be explained.
    explained_requests: int = 1024


class Placement:
    def __init__(
        self,
        config: PlacementConfig,
        service: str,
        incarnation: int,
        policy: Policy,
        prospects: Prospects,
    ) -> None:
        self.journal = Journal()
        self.instances: dict[str, Instance] = {}
        self.reservations = Reservations(self.instances)
        self.changes = Changes()
        self.view = LiveView()
        self.explainer = Explainer(config.explained_requests)
        self.prospects = prospects
        #: Journal entries without any token yet.
        self.num_queued = 0
        self.recoveries = Recoveries()
        #: Sequences that went on after they had lost an instance; that were prefilled in one place
        #: and went on in another; and that left an instance which was still well.
        self.num_resumed = 0
        self.num_handovers = 0
        self.num_migrated = 0
        self._config = config
        self._service = service
        self._incarnation = incarnation
        self._policy = policy
        self._takers: tuple[Instance, ...] = ()
        self._takers_as_of = -1
        self._homeless: deque[Entry] = deque()
        #: Those that have been deferred, in order of arrival; some have started or ended since.
        self._deferred: deque[Entry] = deque()
        self._expected: set[str] = set()  # membership only, never iterated

    def admit(self, entry: Entry, now: float) -> None:
        """Raises `Overloaded` where the time to the first token that is asked for cannot be kept
        anywhere: better a word now than a late answer."""
        able = self._able()
        if entry.ttft_slo_s is None or not able or not self._config.refuses_late:
            return
        cached_tokens, decision = self._decide(entry, able, None, now)
        entry.foreseen = cached_tokens, decision
        predicted_s = min(c.predicted_ttft_s for c in decision.candidates)
        if predicted_s > entry.ttft_slo_s:
            raise Overloaded(
                f"the first token is predicted in {predicted_s:.2f} s, and "
                f"{entry.ttft_slo_s:.2f} s is required: try again later, or with a longer limit",
                retry_after_s=max(1.0, predicted_s - entry.ttft_slo_s),
            )

    def accept(self, entry: Entry, now: float) -> list[Effect]:
        self.journal.add(entry)
        self.num_queued += 1
        return self._place(entry, now)

    def expect(self, name: str, coming: bool) -> None:
        """`name` is being (re)started: who has no instance may wait longer."""
        (self._expected.add if coming else self._expected.discard)(name)

    def explain(self, request_id: str) -> Explanation | None:
        live = self.journal.of_request(request_id)
        choices = [e.record.explain(len(e.emitted), e.progress_s) for e in live]
        for record in self.explainer.of_request(request_id):
            choices.append(record.explain(record.output_tokens, record.last_token_s))
        if not choices:
            return None
        choices.sort(key=lambda c: c.choice)
        return Explanation(request_id, bool(live), tuple(choices))

    # --- moving --------------------------------------------------------------------------------

    def move(self, entry: Entry, now: float, because: str, avoid: str = "") -> list[Effect]:
        """Give up the present attempt and go on elsewhere (or here again), from the journal."""
        entry.moves += 1
        if entry.moves > self._config.max_moves:
            error: PenstockError = EngineUnavailable(
                f"the request lost {entry.moves} placements in a row: see /health",
                retry_after_s=1.0,
            )
            return self.end(entry, error.info())
        freed = self._unplace(entry, because, now)
        self.num_resumed += 1
        entry.interrupt(f"moved: {because}", now)
        return freed + self._place(entry, now, avoid=avoid)

    def may_move(self, entry: Entry) -> bool:
        """There is another instance, and it has not been tried elsewhere too often."""
        elsewhere = self._able(avoid=entry.instance or "")
        return bool(elsewhere) and entry.moves < self._config.max_moves

    def retry(self, entry: Entry, now: float) -> list[Effect]:
        """A step with this sequence raised: try again, a bounded number of times."""
        entry.failed_steps += 1
        if entry.failed_steps > self._config.max_failed_steps:
            error = EngineFailed(
                f"the engine failed {entry.failed_steps} times at this request: see its log"
            )
            return self.end(entry, error.info())
        return self.move(entry, now, "its step failed")

    def evacuate(self, instance: Instance, now: float) -> list[Effect]:
        """`instance` is gone: whatever ran there goes on elsewhere, what was to come stays away."""
        effects: list[Effect] = []
        for entry in list(instance.coming.values()):
            self.reservations.forget(entry)
        leaving = by_urgency(list(instance.entries.values()), now)
        for entry in leaving:
            effects += self.move(entry, now, f"{instance.name} was lost")
        wait_for_each_other(self.view, self.instances, leaving, now)
        return effects

    def relieve(self, instance: Instance, now: float) -> list[Effect]:
        """An instance that drains hands over what it has, and one that turns from decode to prefill
        what it decodes; a few at a time, so that those who take it in keep their pace. One that
        turns from prefill to decode ends its prompts, but those that wait behind all others."""
        if instance.leaving_since_s is not None or instance.draining:
            because, leaving = f"{instance.name} drains", list(instance.entries.values())
        elif instance.role == "decode_to_prefill":
            because = f"{instance.name} is to prefill"
            leaving = [e for e in instance.entries.values() if not e.queued_tokens]
        elif instance.role == "prefill_to_decode":
            if all(i.role in ("decode", "prefill_to_decode") for i in self._able()):
                return []  # nobody would have them
            late = [e for e in instance.entries.values() if e.deferred and e.queued_tokens]
            late = late[: self._config.migrated_at_once]
            because, avoid = f"{instance.name} is to decode", instance.name
            return [effect for e in late for effect in self._place_again(e, now, because, avoid)]
        else:
            return []
        effects: list[Effect] = []
        worth = self._config.not_worth_migrating_tokens
        leaving = [e for e in leaving if e.sampling.max_tokens - len(e.emitted) > worth]
        leaving = by_urgency(leaving, now)[: self._config.migrated_at_once]
        for entry in leaving:
            effects += self.migrate(entry, now, because)
        wait_for_each_other(self.view, self.instances, leaving, now)
        return effects

    def needs(self, instance: Instance) -> bool:
        """Whether somebody runs there who could go on elsewhere, or is to fetch from there."""
        if instance.entries and self._able(avoid=instance.name):
            return True
        return any(e.pulls_from == instance.name for e in self.journal)

    def migrate(self, entry: Entry, now: float, because: str) -> list[Effect]:
        """Leave an instance that is well, with what it has computed: whoever goes on fetches that
        from there. Nothing happens where no other instance could go on."""
        assert entry.instance is not None
        origin = self.instances[entry.instance]
        if not self._able(avoid=origin.name):
            return []
        cancel = Send(origin.name, Cancel(entry.key, entry.attempt))
        computed = not entry.queued_tokens
        freed = self._unplace(entry, because, now)
        self.num_migrated += 1
        entry.interrupt(f"migrated: {because}", now)
        placed = self._place(
            entry, now, avoid=origin.name, prefilled_on=origin.name if computed else None
        )
        return [*freed, *placed, cancel]

    def hurry(self, now: float) -> list[Effect]:
        """Nobody is deferred for ever: who has waited too long is placed before all others."""
        effects: list[Effect] = []
        while self._deferred:
            entry = self._deferred[0]
            waits = entry.deferred and entry.queued_tokens and entry.instance is not None
            if waits and now - entry.accepted_s < self._config.overdue_s:
                break
            self._deferred.popleft()
            if waits and not entry.overdue:
                entry.overdue = True
                effects += self._place_again(entry, now, "overdue")
        return effects

    def _place_again(self, entry: Entry, now: float, because: str, avoid: str = "") -> list[Effect]:
        """Of one that waits for its turn."""
        assert entry.instance is not None
        cancel = Send(entry.instance, Cancel(entry.key, entry.attempt))
        freed = self._unplace(entry, because, now)
        entry.because = because
        return [*freed, *self._place(entry, now, avoid=avoid), cancel]

    def hand_over(self, entry: Entry, now: float) -> list[Effect]:
        """The prompt is computed and the first token is out: the rest is for another instance. It
        goes where the plan said if that place is still what it was, else the policy is asked."""
        assert entry.instance is not None
        origin = entry.instance
        freed = self._unplace(entry, "handover", now, keep_reserved=True)
        self.num_handovers += 1
        entry.because = "handover"
        target = self.reservations.use(entry)
        if target is None:
            freed += self.reservations.cancel(entry)
            return freed + self._place(entry, now, prefilled_on=origin)
        source = orders.held_by(self.instances[origin], entry)
        return freed + self._send(entry, target, now, source=source)

    def house(self, now: float) -> list[Effect]:
        """Place who has no instance; end who has waited for one too long."""
        if not self._homeless:
            return []
        effects: list[Effect] = []
        waiting, self._homeless = by_urgency(self._homeless, now), deque()
        for entry in waiting:
            effects += self._place(entry, now)
        wait_for_each_other(self.view, self.instances, waiting, now)
        bound_s = self._config.recovery_s
        if self._expected:
            bound_s = self._config.restart_recovery_s
        for entry in list(self._homeless):
            assert entry.homeless_since_s is not None
            if now - entry.homeless_since_s > bound_s:
                error = EngineUnavailable(
                    f"no engine instance could take the request within {bound_s:g} s: "
                    "check /health and the engine's log, then try again",
                    retry_after_s=1.0,
                )
                effects += self.end(entry, error.info())
        return effects

    def forgive(self, late_s: float) -> None:
        """This process itself was stopped for so long: nobody has waited for an instance then."""
        for entry in self._homeless:
            assert entry.homeless_since_s is not None
            entry.homeless_since_s += late_s

    def progress(self, entry: Entry, row: TokenRow, now: float) -> None:
        """New tokens of a placed sequence."""
        assert entry.instance is not None
        instance = self.instances[entry.instance]
        if entry.queued_tokens:
            instance.started(entry)
            self.prospects.waiting.remove(entry)
            entry.pulls_from = None
            placement = entry.record.started(row.cached_tokens, row.queued_s, now)
            self.prospects.came_true(instance, placement)
            instance.outcomes.started(placement, now)
            if entry.interrupted_s is not None:
                self.recoveries.went_on(entry, placement, now)
                entry.interrupted_s = None
        if not entry.emitted:
            self.num_queued -= 1
        before = len(entry.emitted)
        entry.emitted += row.ids
        self.prospects.lengths.said(before, len(entry.emitted))
        instance.running_tokens += len(row.ids)
        instance.touched = True
        entry.progress_s = now
        entry.moves = entry.failed_steps = 0

    def fetched(self, instance: Instance, fetched: Fetched, now: float) -> None:
        """What became of blocks that were to come to `instance`: for the record."""
        entry = self.journal.get(fetched.request_id)
        if entry is None:
            return  # it has ended, and its record with it
        # Blocks that are handed over come as the prompt is computed: how long that takes says
        # nothing about the link (`TransferFitter.moved` does).
        if not entry.record.is_handover(fetched):
            instance.experience.transfer.observe(fetched)
        instance.touched = instance.has_news = True
        if instance.name in (
            entry.instance,
            entry.decode_on.instance if entry.decode_on else None,
        ):
            entry.record.fetched(fetched, now)

    # --- ends ----------------------------------------------------------------------------------

    def end(self, entry: Entry, error: ErrorInfo) -> list[Effect]:
        effects = self.close(entry, f"error: {error.code}")
        delta = TokenDelta(entry.choice, [], "error", error=error)
        return [*effects, Reply(entry.request_id, delta)]

    def expire(self, now: float) -> list[Effect]:
        """Those whose time budget has run out."""
        effects: list[Effect] = []
        for entry in [e for e in self.journal if e.deadline_s is not None and now > e.deadline_s]:
            error = EngineUnavailable("the request's time budget ran out before it finished")
            delta = TokenDelta(entry.choice, [], "error", error=error.info())
            effects += self.withdraw(entry, "error: out of time")
            effects.append(Reply(entry.request_id, delta))
        return effects

    def withdraw(self, entry: Entry, finish: str = "cancelled") -> list[Effect]:
        """Close it, and tell its instance."""
        name, attempt = entry.instance, entry.attempt
        effects = self.close(entry, finish)
        return effects if name is None else [*effects, Send(name, Cancel(entry.key, attempt))]

    def close(self, entry: Entry, finish: str) -> list[Effect]:
        if entry.homeless_since_s is not None:
            self._homeless.remove(entry)
        freed = self._unplace(entry, finish, entry.news_s)
        if not entry.emitted:
            self.num_queued -= 1
        self.journal.remove(entry)
        entry.record.ended(finish, len(entry.emitted), entry.progress_s)
        self.prospects.ended(entry)
        self.explainer.keep(entry.record)
        return freed

    # --- inside --------------------------------------------------------------------------------

    def _place(
        self, entry: Entry, now: float, avoid: str = "", prefilled_on: str | None = None
    ) -> list[Effect]:
        able = self._able(avoid)
        if prefilled_on is not None and prefilled_on == avoid:
            able = [i for i in able if i.decodes] or able  # it left for others to decode it
        if not able:
            if entry.homeless_since_s is None:
                entry.homeless_since_s = now
            self._homeless.append(entry)
            return []
        entry.homeless_since_s = None
        foreseen, entry.foreseen = entry.foreseen, None
        cached_tokens, decision = foreseen or self._decide(entry, able, prefilled_on, now)
        target = self.instances[decision.instance]
        decode = self.instances[decision.decode] if decision.decode else None
        source = orders.source(entry, decision, prefilled_on, self.instances)
        return self._send(entry, target, now, decision, decode, source, cached_tokens)

    def sight(self, now: float) -> tuple[Sequence[Instance], ClusterView]:
        """The instances that take work, and the view of them."""
        able = self._able()
        return able, self.view.of(able, now)

    def _able(self, avoid: str = "") -> Sequence[Instance]:
        """Those that take work; the same tuple as long as they are the same ones."""
        if self._takers_as_of != self.changes.takers:
            self._takers_as_of = self.changes.takers
            self._takers = tuple([i for i in self.instances.values() if i.takes_work])
        if not avoid:
            return self._takers
        return [i for i in self._takers if i.name != avoid]

    def _givers(self, able: Sequence[Instance]) -> list[Instance]:
        """Instances that take no work (or not this), and still give blocks away."""
        if len(able) == len(self.instances):
            return []
        names = {i.name for i in able}  # membership only
        return [i for i in self.instances.values() if i.state == "active" and i.name not in names]

    def _decide(
        self, entry: Entry, able: Sequence[Instance], prefilled_on: str | None, now: float
    ) -> tuple[int | None, Decision]:
        """Where to; and how many tokens of it are thought to be there already, if that is known."""
        view = self.view.of(able, now)
        # For what is new they are too few to be looked for each time.
        givers = [] if entry.interrupted_s is None else self._givers(able)
        request = self.prospects.request(entry, able, prefilled_on, now, givers)
        decision = self._policy(view, request)
        if request.tier_hits is None:
            return None, decision
        hits = int(request.tier_hits[self.view.place_of(decision.instance, view)])
        # The last token is always computed, and with it its block.
        return min(hits, (entry.num_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS), decision

    def _send(
        self,
        entry: Entry,
        target: Instance,
        now: float,
        decision: Decision | None = None,
        decode: Instance | None = None,
        source: KvSource | None = None,
        cached_tokens: int | None = None,
    ) -> list[Effect]:
        """The one place where an attempt begins."""
        if source is not None:
            cached_tokens = max(cached_tokens or 0, source.num_blocks * BLOCK_TOKENS)
        entry.deferred = decision is not None and decision.deferred and not entry.overdue
        target.place(entry, cached_tokens or 0)
        if entry.deferred:
            self._deferred.append(entry)
        entry.attempt += 1
        entry.submitted_s = now
        entry.pulls_from = source.instance if source is not None else None
        self._record(entry, target, decision, cached_tokens, source, now)
        submit = orders.submit(
            entry,
            target,
            service=self._service,
            service_incarnation=self._incarnation,
            decode=decode,
            source=source,
            now=now,
        )
        self.prospects.finder.submitted(target.name, submit.block_keys)
        self.prospects.waiting.add(entry, submit.block_keys)
        effects: list[Effect] = [Send(target.name, submit)]
        # For who waits long no room is kept: where it decodes is decided when the time has come.
        if decode is None or entry.deferred:
            return effects
        return effects + self.reservations.make(entry, target, decode)

    def _record(
        self,
        entry: Entry,
        target: Instance,
        decision: Decision | None,
        cached_tokens: int | None,
        source: KvSource | None,
        now: float,
    ) -> None:
        record = PlacementRecord(
            attempt=entry.attempt,
            instance=target.name,
            at_s=now,
            because=entry.because,
            decision=decision,
            num_tokens=entry.num_tokens,
            predicted_ttft_s=(decision.predicted_ttft_s or None) if decision else None,
            predicted_cached_tokens=cached_tokens,
            way=None if entry.interrupted_s is None else way_taken(decision, source),
            source=source.instance if source else None,
        )
        entry.record.placed(record, now)
        self.prospects.placed(target, record, now)

    def _unplace(
        self, entry: Entry, end: str, now: float, keep_reserved: bool = False
    ) -> list[Effect]:
        if entry.instance is not None:
            instance = self.instances[entry.instance]
            instance.unplace(entry)
            self.prospects.waiting.remove(entry)
            instance.outcomes.left(entry.record, len(entry.emitted), entry.progress_s)
            entry.pulls_from = None
            entry.record.left(end, len(entry.emitted), entry.progress_s, now)
        return [] if keep_reserved else self.reservations.cancel(entry)

    def check(self) -> None:
        """Invariants, recounted: counters equal what the journal says."""
        books.check(self.journal, self.instances, self._homeless, self.num_queued)
