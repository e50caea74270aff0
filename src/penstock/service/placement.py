"""Which sequence runs where: placing, moving, and ending the entries of the journal.

All counters about queues and placements are kept here, so that each is taken back in one place.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec

from penstock.protocol.effects import Effect, Reply, Send
from penstock.protocol.errors import EngineFailed, EngineUnavailable, ErrorInfo, PenstockError
from penstock.protocol.request import Cancel, Submit
from penstock.service.cluster.instances import Instance, view_of
from penstock.service.generation import TokenDelta
from penstock.service.journal import Entry, Journal
from penstock.service.policies.routing import Policy, RouteRequest


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


class Placement:
    def __init__(
        self, config: PlacementConfig, service: str, incarnation: int, policy: Policy
    ) -> None:
        self.journal = Journal()
        self.instances: dict[str, Instance] = {}
        #: Journal entries without any token yet.
        self.num_queued = 0
        #: Sequences that went on after they had lost an instance.
        self.num_resumed = 0
        self._config = config
        self._service = service
        self._incarnation = incarnation
        self._policy = policy
        self._homeless: deque[Entry] = deque()
        self._expected: set[str] = set()  # membership only, never iterated

    def accept(self, entry: Entry, now: float) -> list[Effect]:
        self.journal.add(entry)
        self.num_queued += 1
        return self._place(entry, now)

    def expect(self, name: str, coming: bool) -> None:
        """`name` is being (re)started: who has no instance may wait longer."""
        (self._expected.add if coming else self._expected.discard)(name)

    # --- moving --------------------------------------------------------------------------------

    def move(self, entry: Entry, now: float, avoid: str | None = None) -> list[Effect]:
        """Give up the present attempt and go on elsewhere (or here again), from the journal."""
        entry.moves += 1
        if entry.moves > self._config.max_moves:
            error: PenstockError = EngineUnavailable(
                f"the request lost {entry.moves} placements in a row: see /health",
                retry_after_s=1.0,
            )
            return [self.end(entry, error.info())]
        self._unplace(entry)
        self.num_resumed += 1
        return self._place(entry, now, avoid)

    def retry(self, entry: Entry, now: float) -> list[Effect]:
        """A step with this sequence raised: try again, a bounded number of times."""
        entry.failed_steps += 1
        if entry.failed_steps > self._config.max_failed_steps:
            error = EngineFailed(
                f"the engine failed {entry.failed_steps} times at this request: see its log"
            )
            return [self.end(entry, error.info())]
        return self.move(entry, now)

    def evacuate(self, instance: Instance, now: float) -> list[Effect]:
        """Whatever runs on `instance` goes on elsewhere."""
        effects: list[Effect] = []
        for entry in list(instance.entries.values()):
            effects += self.move(entry, now)
        return effects

    def house(self, now: float) -> list[Effect]:
        """Place who has no instance; end who has waited for one too long."""
        effects: list[Effect] = []
        waiting, self._homeless = self._homeless, deque()
        for entry in waiting:
            effects += self._place(entry, now)
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
                effects.append(self.end(entry, error.info()))
        return effects

    def forgive(self, late_s: float) -> None:
        """This process itself was stopped for so long: nobody has waited for an instance then."""
        for entry in self._homeless:
            assert entry.homeless_since_s is not None
            entry.homeless_since_s += late_s

    def progress(self, entry: Entry, ids: list[int], now: float) -> None:
        """New tokens of a placed sequence."""
        assert entry.instance is not None
        if entry.queued_tokens:
            self.instances[entry.instance].started(entry)
        if not entry.emitted:
            self.num_queued -= 1
        entry.emitted += ids
        entry.progress_s = now
        entry.moves = entry.failed_steps = 0

    # --- ends ----------------------------------------------------------------------------------

    def end(self, entry: Entry, error: ErrorInfo) -> Reply:
        self.close(entry)
        return Reply(entry.request_id, TokenDelta(entry.choice, [], "error", error=error))

    def withdraw(self, entry: Entry) -> list[Effect]:
        """Close it, and tell its instance."""
        name, attempt = entry.instance, entry.attempt
        self.close(entry)
        return [] if name is None else [Send(name, Cancel(entry.key, attempt))]

    def close(self, entry: Entry) -> None:
        if entry.homeless_since_s is not None:
            self._homeless.remove(entry)
        self._unplace(entry)
        if not entry.emitted:
            self.num_queued -= 1
        self.journal.remove(entry)

    # --- inside --------------------------------------------------------------------------------

    def _place(self, entry: Entry, now: float, avoid: str | None = None) -> list[Effect]:
        view = view_of(i for i in self.instances.values() if i.name != avoid)
        if not view.names:
            if entry.homeless_since_s is None:
                entry.homeless_since_s = now
            self._homeless.append(entry)
            return []
        entry.homeless_since_s = None
        entry.decision = self._policy(view, RouteRequest(num_tokens=entry.num_tokens))
        instance = self.instances[entry.decision.instance]
        instance.place(entry)
        entry.attempt += 1
        entry.submitted_s = now
        return [Send(instance.name, self._submit(entry, instance, now))]

    def _unplace(self, entry: Entry) -> None:
        if entry.instance is not None:
            self.instances[entry.instance].unplace(entry)

    def _submit(self, entry: Entry, instance: Instance, now: float) -> Submit:
        assert instance.card is not None
        sampling = entry.sampling
        if not entry.lacks_prompt_logprobs:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return Submit(
            request_id=entry.key,
            attempt=entry.attempt,
            service=self._service,
            service_incarnation=self._incarnation,
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

    def check(self) -> None:
        """Invariants, recounted: counters equal what the journal says."""
        entries = list(self.journal)
        assert self.num_queued == sum(1 for e in entries if not e.emitted)
        for entry in entries:
            placed = entry.instance is not None
            assert placed != (entry.homeless_since_s is not None), entry.key
            assert (entry in self._homeless) != placed
        for instance in self.instances.values():
            mine = [e for e in entries if e.instance == instance.name]
            assert len(mine) == len(instance.entries)
            assert not mine or instance.state in ("active", "suspect")
            assert instance.queued_tokens == sum(e.queued_tokens for e in mine)
            assert instance.running == sum(1 for e in mine if not e.queued_tokens)
