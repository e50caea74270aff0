"""Who prefills and who decodes: the leader's part, as a state machine without I/O.

`policies/roles.py` says which change of role comes next; here it is carried through. Every service
has a `RoleKeeper`, but only that of the leader acts: the driver tells it the term of its
leadership, and epochs are `term << 32 | counter`, so that the word of an older leader is refused.
What an instance is, it says itself; this side only remembers what it has asked for.

Terms come from a clock where a registry has forgotten the last one, and a clock may be put back. So
a leader's term rises above whatever epochs instances have already.

Without a registry nobody elects: each of several services begins as a leader. An epoch that an
instance had when it was met is of the past. But whoever hears one rise above all that he has given
yields for as long as he lives. Whoever has given the greatest one never hears a greater, so
somebody goes on leading, and of two who disagree only one. Who was elected never yields: his
registry tells him when he leads no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from penstock.protocol.effects import Effect, Send
from penstock.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.protocol.instance import Assign, Role
from penstock.service.cluster.instances import Instance
from penstock.service.policies.forecast import Forecast, Work
from penstock.service.policies.roles import RolePlan, RolesConfig, RoleState, decide_roles
from penstock.service.policies.view import ClusterView


class NotLeading(UnsupportedFeature):
    """Another service decides on roles."""

    code = "not_leading"
    http_status = 409


_FINAL: dict[Role, Role] = {"prefill_to_decode": "decode", "decode_to_prefill": "prefill"}
_CANNOT_PREFILL: tuple[Role, ...] = ("decode", "prefill_to_decode", "encode")
_CANNOT_DECODE: tuple[Role, ...] = ("prefill", "decode_to_prefill", "encode")
#: Weight of the newest look in this service's share of the cluster's work.
_SHARE_GAIN = 0.1
#: A change is not blamed for what became of this much more work.
_MORE_WORK = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleKeeperConfig:
    #: None: roles are left as they are, and changed by hand alone.
    policy: RolesConfig | None = None
    every_s: float = 0.5
    #: An Assign that has shown no effect is said again after this long.
    repeat_s: float = 1.0
    #: A change is taken back where of the requests that came `settled_s` after it or later fewer
    #: are within their SLOs than before, by `worse_by`, as soon as `judged_after` have ended and
    #: within `judged_within_s`; nothing else is changed for `hold_s` then. (Who comes sooner waits
    #: for those that were there before.)
    settled_s: float = 3.0
    worse_by: float = 0.15
    judged_after: int = 20
    judged_within_s: float = 15.0
    hold_s: float = 30.0


@dataclass(slots=True)
class Attainment:
    """Requests that had an SLO, and those of them that kept it, since the start; and apart those
    that came after a change: what was there before says nothing about it when it ends."""

    num_asked: int = 0
    num_kept: int = 0
    _changed_s: float = inf
    num_new: int = 0
    num_new_kept: int = 0

    def ended(self, accepted_s: float, kept: bool) -> None:
        self.num_asked += 1
        self.num_kept += kept
        if accepted_s >= self._changed_s:
            self.num_new += 1
            self.num_new_kept += kept

    def changed(self, at_s: float) -> None:
        self._changed_s, self.num_new, self.num_new_kept = at_s, 0, 0

    def share_since(self, earlier: Attainment) -> float | None:
        asked = self.num_asked - earlier.num_asked
        return (self.num_kept - earlier.num_kept) / asked if asked else None

    def copy(self) -> Attainment:
        return Attainment(self.num_asked, self.num_kept)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an instance has been told to be."""

    role: Role
    at_s: float
    incarnation: int


@dataclass(slots=True)
class _Trial:
    """Changes that must prove themselves: the first one, and those that followed before it could be
    judged. By instance, the role before."""

    roles_before: dict[str, Role]
    began_s: float
    share_before: float
    attainment: Attainment
    requests_per_s: float
    #: When they had come to their new roles.
    took_s: float


@dataclass(slots=True)
class RoleKeeper:
    config: RoleKeeperConfig = field(default_factory=RoleKeeperConfig)
    #: Of the present leadership; None: another service leads.
    term: int | None = None
    #: It led, without having been elected, and so does another one.
    has_yielded: bool = False
    _elected: bool = False
    forecast: Forecast = field(default_factory=Forecast)
    #: What was decided last, and why.
    plan: RolePlan | None = None
    #: Of the changes made at the last look, by instance.
    reasons: dict[str, str] = field(default_factory=dict)
    num_changes: int = 0
    num_rollbacks: int = 0
    _state: RoleState = field(default_factory=RoleState)
    _counter: int = 0
    _asked: dict[str, _Asked] = field(default_factory=dict)
    _trial: _Trial | None = None
    _checkpoint: Attainment = field(default_factory=Attainment)
    _next_s: float = 0.0
    _own_share: float = 1.0

    def lead(self, term: int | None, now: float, *, elected: bool = False) -> None:
        """This service leads from now on, in a term that is greater than all before, as far as is
        known; or no more. `elected`: nobody else does."""
        self._elected = elected
        if term == self.term:
            return
        self.term, self.has_yielded = term, False
        self._counter = 0
        self._state = RoleState(turned_s=now)
        self._asked.clear()
        self._trial = None

    def forget(self, name: str) -> None:
        """An instance is not a part of this cluster any more."""
        self._asked.pop(name, None)

    def arrived(self, now: float, prompt_tokens: int) -> None:
        if self.config.policy is not None:
            self.forecast.observe(now, prompt_tokens)

    # --- by hand -------------------------------------------------------------------------------

    def assign(
        self, instances: Mapping[str, Instance], name: str, role: Role, now: float
    ) -> list[Effect]:
        """Raises `NotLeading` where another service leads, and `InvalidRequest` where
        nobody would be left to prefill, or to decode."""
        self._meet_epochs(instances.values())
        if self.term is None:
            raise NotLeading(
                "this service does not lead the cluster: ask the one that does (/admin/cluster)"
            )
        others = [self._will_be(i) for i in instances.values() if i.takes_work and i.name != name]
        for word, cannot in (("prefill", _CANNOT_PREFILL), ("decode", _CANNOT_DECODE)):
            if all(r in cannot for r in [*others, role]):
                raise InvalidRequest(f"no instance would be left to {word}", param="role")
        self._state = RoleState(turned_s=now)
        self._trial = None
        self.num_changes += 1
        return [self._assign(instances[name], role, now)]

    # --- by the work ---------------------------------------------------------------------------

    def is_due(self, now: float) -> bool:
        return self.term is not None and now >= self._next_s

    def keep(
        self,
        instances: Sequence[Instance],
        view: ClusterView,
        attainment: Attainment,
        mean_output_tokens: float,
        now: float,
    ) -> list[Effect]:
        """`instances` take work; `view` is of them. `mean_output_tokens`: of answers."""
        if not instances:
            return []
        self._next_s = now + self.config.every_s
        self._meet_epochs(instances)
        if self.has_yielded:
            return []
        effects = self._remind(instances, now)
        policy = self.config.policy
        if policy is None:
            return effects
        self._look_at_others(instances)
        work = self.forecast.work(now, mean_output_tokens)
        if back := self._taken_back(instances, attainment, work, now):
            return effects + back
        self.reasons.clear()
        for _ in instances:
            plan = self.plan = decide_roles(view, self._of_all(work), self._state, policy, now)
            self._state = plan.state
            if plan.instance is None or plan.role is None:
                break
            place = view.names.index(plan.instance)
            instance = instances[place]
            # Half a first split is not taken back alone.
            if self._trial or instance.role != "any" or all(i.role == "any" for i in instances):
                self._try(instance, attainment, work, now)
            self.num_changes += 1
            self.num_rollbacks += plan.rollback
            effects.append(self._assign(instance, plan.role, now))
            self.reasons[plan.instance] = plan.reason
            if instance.role != "any" and instance.role not in _FINAL:
                break
            # Those without a role have none to give up and get theirs all at once; so do those that
            # have come to the end of a turn.
            view = view.with_role(place, plan.role)
        return effects

    def _meet_epochs(self, instances: Iterable[Instance]) -> None:
        """Those above ours: begin above them if they are of the past, else yield."""
        if self.term is None:
            return
        above = [i for i in instances if i.epoch > self._last_epoch]
        if not above:
            return
        if self._elected or all(i.epoch == i.found_epoch for i in above):
            self.term, self._counter = (max(i.epoch for i in above) >> 32) + 1, 0
        else:
            self.term, self.has_yielded = None, True

    @property
    def _last_epoch(self) -> int:
        assert self.term is not None
        return self.term << 32 | self._counter

    def _assign(self, instance: Instance, role: Role, now: float) -> Send:
        self._counter += 1
        self._asked[instance.name] = _Asked(role, now, instance.incarnation)
        return Send(instance.name, Assign(role, self._last_epoch))

    def _will_be(self, instance: Instance) -> Role:
        asked = self._asked.get(instance.name)
        return instance.role if asked is None else asked.role

    def _remind(self, instances: Sequence[Instance], now: float) -> list[Effect]:
        """Words get lost, and a new process under an old name has forgotten what it was."""
        effects: list[Effect] = []
        for instance in instances:
            asked = self._asked.get(instance.name)
            if asked is None or instance.role == asked.role:
                continue
            if instance.incarnation != asked.incarnation:
                # Nothing of its old role's is left there to be finished first.
                effects.append(self._assign(instance, _FINAL.get(asked.role, asked.role), now))
            elif now - asked.at_s >= self.config.repeat_s:
                effects.append(self._assign(instance, asked.role, now))
        return effects

    def _of_all(self, mine: Work) -> Work:
        """Of all services: what comes here, and as much more as others have running."""
        share = max(self._own_share, 0.01)
        return Work(
            mine.requests_per_s / share,
            mine.prompt_tokens_per_s / share,
            mine.output_tokens_per_s / share,
        )

    def _look_at_others(self, instances: Sequence[Instance]) -> None:
        mine = sum(len(i.entries) for i in instances)
        others = sum(i.others.queued + i.others.running for i in instances)
        if mine + others:
            self._own_share += _SHARE_GAIN * (mine / (mine + others) - self._own_share)

    # --- proof ---------------------------------------------------------------------------------

    def _try(self, instance: Instance, attainment: Attainment, work: Work, now: float) -> None:
        """A turn begins: it is judged by the share that was kept since the last trial began."""
        if instance.role in _FINAL:
            return  # it comes to its end, which was part of the turn
        if self._trial is not None:
            self._trial.roles_before.setdefault(instance.name, instance.role)
            return
        if attainment.num_asked - self._checkpoint.num_asked < self.config.judged_after:
            return  # too little is known of how it was
        share = attainment.share_since(self._checkpoint)
        assert share is not None
        rate = work.requests_per_s
        attainment.changed(now + self.config.settled_s)
        before = {instance.name: instance.role}
        self._trial = _Trial(before, now, share, attainment.copy(), rate, now)

    def _taken_back(
        self, instances: Sequence[Instance], attainment: Attainment, work: Work, now: float
    ) -> list[Effect]:
        """Undo the changes on trial if fewer requests keep their SLOs than before."""
        trial, config = self._trial, self.config
        if trial is None:
            return []
        turning = any(i.role in _FINAL and i.name in trial.roles_before for i in instances)
        if turning and now - trial.began_s <= config.judged_within_s:
            # Until it has come to its new role it is no better than before.
            trial.took_s = now
            attainment.changed(now + config.settled_s)
            return []
        ended = attainment.num_new
        late = now - trial.took_s > config.judged_within_s
        if ended < config.judged_after and not late:
            return []
        self._trial, self._checkpoint = None, trial.attainment
        if ended < config.judged_after:
            return []
        if attainment.num_new_kept / ended >= trial.share_before - config.worse_by:
            return []
        # More work keeps fewer SLOs, whoever does it.
        if work.requests_per_s > _MORE_WORK * trial.requests_per_s:
            return []
        self._state = RoleState(turned_s=now + config.hold_s)
        effects: list[Effect] = []
        for instance in instances:
            role = trial.roles_before.get(instance.name)
            if role is not None and role != instance.role:
                self.num_changes += 1
                self.num_rollbacks += 1
                effects.append(self._assign(instance, role, now))
        return effects
