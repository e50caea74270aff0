"""What operators may ask of a service and tell it: the service's side of /admin."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Protocol

import msgspec

from penstock.protocol.effects import Effect
from penstock.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature
from penstock.protocol.instance import Role
from penstock.service.cluster.instances import Instance
from penstock.service.cluster.roster import Roster
from penstock.service.core import ServiceCore
from penstock.service.explain import Explanation
from penstock.service.journal import Entry


class NotHere(PenstockError):
    """An instance or a request that this service does not know."""

    code = "not_found"
    type = "not_found_error"
    http_status = 404


class Conflict(PenstockError):
    """An order that does not fit what is."""

    code = "conflict"
    type = "invalid_request_error"
    http_status = 409


class LiveSequence(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a request that has not ended."""

    id: str
    choice: int
    #: Where it is; None while it waits for an instance.
    instance: str | None
    #: "queued" until its first token, then "decoding".
    phase: str
    age_s: float
    prompt_tokens: int
    output_tokens: int
    attempt: int
    request_class: str


class Scaled(msgspec.Struct, frozen=True, kw_only=True):
    """What an order to scale has set off, by name."""

    instances: int
    drained: list[str]
    started: list[str]


class Operations(Protocol):
    def explain(self, request_id: str) -> Explanation | None:
        """Of a live request, or of one that ended not long ago."""

    @property
    def records_kept(self) -> int:
        """How many requests that have ended can be explained."""

    def live(self, limit: int) -> tuple[list[LiveSequence], int]:
        """The oldest `limit` sequences, and how many there are."""

    def drain(self, name: str) -> None:
        """No new work for the instance; what it has goes on elsewhere or is finished, and its
        process ends. One that was started here stays away until `start`. Raises `NotHere`, and
        `Conflict` where no other would be left."""

    def start(self, name: str) -> None:
        """Take back a drained instance that was started here. Raises `NotHere`, `Conflict`, and
        `UnsupportedFeature` for one that was started elsewhere."""

    def scale(self, instances: int) -> Scaled:
        """Have so many of the engines that were started here in service: drains those with the
        least to hand over, or starts drained ones. Raises `InvalidRequest` for more than there are
        or none, `Conflict` where one that is needed still drains, and `UnsupportedFeature`."""

    def assign(self, name: str, role: Role) -> None:
        """Give the instance a role by hand. Raises `NotHere`, or says why it cannot be done."""


class NoOperations:
    """Of a service that keeps no records and whose instances take no orders."""

    records_kept = 0

    def explain(self, request_id: str) -> Explanation | None:
        return None

    def live(self, limit: int) -> tuple[list[LiveSequence], int]:
        return [], 0

    def drain(self, name: str) -> None:
        raise UnsupportedFeature("this service cannot drain its instances")

    def start(self, name: str) -> None:
        raise UnsupportedFeature("this service cannot start instances")

    def scale(self, instances: int) -> Scaled:
        raise UnsupportedFeature("this service cannot start or drain instances")

    def assign(self, name: str, role: Role) -> None:
        raise UnsupportedFeature("this service cannot give its instances roles")


NO_OPERATIONS = NoOperations()


class CoreOperations:
    def __init__(
        self,
        core: ServiceCore,
        carry_out: Callable[[list[Effect]], None],
        clock: Callable[[], float],
        roster: Roster,
        reconnect: Callable[[str], None],
    ) -> None:
        """`reconnect(name)`: a new process listens where the old one did."""
        self._roster = roster
        self._reconnect = reconnect
        self._core = core
        self._carry_out = carry_out
        self._clock = clock

    @property
    def records_kept(self) -> int:
        return self._core.config.placement.explained_requests

    def explain(self, request_id: str) -> Explanation | None:
        return self._core.explain(request_id)

    def live(self, limit: int) -> tuple[list[LiveSequence], int]:
        journal, now = self._core.journal, self._clock()
        return [_live(entry, now) for entry in islice(journal, limit)], len(journal)

    def drain(self, name: str) -> None:
        self._require(name)
        if not self._roster.owns(name):
            self._carry_out(self._core.drain_instance(name, self._clock()))
            return
        with self._roster.one_at_a_time():
            if self._roster.is_out(name):
                return
            left = [i.name for i in self._core.instances.values() if i.takes_work]
            if all(other == name or self._roster.is_out(other) for other in left):
                raise Conflict(
                    f"no other instance takes work: without {name} nothing would be served; start "
                    "another one first, or stop the server"
                )
            self._roster.take_out(name)
        self.follow_roster()

    def start(self, name: str) -> None:
        instance = self._require(name)
        if not self._roster.owns(name):
            raise UnsupportedFeature(
                f"{name} was started elsewhere: start it there again (`penstock worker`), and it "
                "will be used"
            )
        if not self._roster.is_out(name):
            raise Conflict(f"{name} is {instance.state}: only what has been drained can be started")
        if not self._roster.has_gone(name):
            raise Conflict(f"{name} still drains: start it when it is drained")
        self._roster.bring_back(name)
        self.follow_roster()

    def scale(self, instances: int) -> Scaled:
        roster, all_ = self._roster, self._core.instances
        owned = [name for name in all_ if roster.owns(name)]
        if not owned:
            raise UnsupportedFeature(
                "no engine was started here: scale where they were started, or start and stop "
                "workers (`penstock worker`)"
            )
        if not 1 <= instances <= len(owned):
            raise InvalidRequest(
                f"instances must be from 1 to {len(owned)}, the --instances of this server, not "
                f"{instances}"
            )
        serving = [name for name in owned if not roster.is_out(name)]
        # The fewest sequences to hand over go first, and of equal ones the last.
        serving.sort(key=lambda name: (len(all_[name].entries), -owned.index(name)))
        drained = serving[: max(0, len(serving) - instances)]
        for name in drained:
            self.drain(name)
        missing = max(0, instances - len(serving))
        started = [name for name in owned if roster.has_gone(name)][:missing]
        if len(started) < missing:
            raise Conflict("some of the engines still drain: scale up when they are drained")
        for name in started:
            self.start(name)
        return Scaled(instances=instances, drained=drained, started=started)

    def follow_roster(self) -> None:
        """Do what has been ordered here or elsewhere; called a few times a second."""
        for name, instance in self._core.instances.items():
            if not self._roster.owns(name):
                continue
            if not self._roster.is_out(name):
                if instance.is_out:
                    self._reconnect(name)
                    self._core.bring_back(name)
            elif not instance.is_out or instance.leaving_since_s is None:
                self._carry_out(self._core.take_out(name, self._clock()))
            elif self._roster.has_gone(name) and instance.state != "drained":
                self._carry_out(self._core.on_drained(name, self._clock()))

    def assign(self, name: str, role: Role) -> None:
        self._require(name)
        self._carry_out(self._core.assign(name, role, self._clock()))

    def _require(self, name: str) -> Instance:
        if name not in self._core.instances:
            known = ", ".join(self._core.instances) or "none"
            raise NotHere(f"there is no instance {name[:200]!r}: there is {known}")
        return self._core.instances[name]


def _live(entry: Entry, now: float) -> LiveSequence:
    return LiveSequence(
        id=entry.request_id,
        choice=entry.choice,
        instance=entry.instance,
        phase="decoding" if entry.emitted else "queued",
        age_s=now - entry.accepted_s,
        prompt_tokens=len(entry.prompt_ids),
        output_tokens=len(entry.emitted),
        attempt=entry.attempt,
        request_class=entry.request_class,
    )
