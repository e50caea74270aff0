"""Instances as the service sees them: their life, their load, and who runs where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from penstock.protocol.instance import InstanceCard, Load, Role
from penstock.service.cluster.outcomes import Outcomes
from penstock.service.journal import Entry, Reservation
from penstock.service.policies.correction import PrefillShare, TransferFitter, TtftCorrection

#: connecting: known, not attached yet · active: takes work · suspect: silent, takes no new work ·
#: lost: its sequences have been placed elsewhere or wait for an instance · refused: it is there and
#: may not be used (`refusal` says why) · drained: emptied by an operator's order, and it stays so
#: until he takes it back
InstanceState = Literal["connecting", "active", "suspect", "lost", "refused", "drained"]


@dataclass(frozen=True, slots=True)
class Others:
    """What an instance says it has beyond what this service has placed there."""

    queued: int = 0
    queued_tokens: int = 0
    running: int = 0
    running_tokens: int = 0


NO_OTHERS = Others()


@dataclass(slots=True)
class Experience:
    """What has been seen of an instance, as far as predictions go by it."""

    ttft: TtftCorrection = field(default_factory=TtftCorrection)
    prefill: PrefillShare = field(default_factory=PrefillShare)
    transfer: TransferFitter = field(default_factory=TransferFitter)


T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Changes:
    """What has happened to the instances of a service since somebody looked at it."""

    #: Grows whenever one begins to take work, or takes no more.
    takers: int = 0
    #: Instances of which policies see something new, by name.
    touched: dict[str, Instance] = field(default_factory=dict)


class _Decides(Generic[T]):
    """An attribute that decides whether an instance takes work: who keeps a list of those that do
    hears of its changes (`Changes.takers`). A descriptor, as dataclasses know them; it is read from
    the instance's own dictionary, which costs nothing."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: Instance, value: T) -> None:
        known, default = instance.__dict__, self._default
        if value is self:  # nothing was given
            value = default
        if known.get(self._name, default) != value:
            instance.changes.takers += 1
        known[self._name] = value

    if TYPE_CHECKING:

        def __get__(self, instance: Instance | None, owner: type) -> T: ...


@dataclass(eq=False)
class Instance:
    name: str
    #: Those of all instances of its service.
    changes: Changes = field(default_factory=Changes)
    state: _Decides[InstanceState] = _Decides("connecting")
    card: InstanceCard | None = None
    load: Load | None = None
    heard_s: float = 0.0
    next_attach_s: float = 0.0
    attach_tries: int = 0
    #: Why it may not be used ("" if it may): another protocol version, another model.
    refusal: str = ""
    #: It finishes what it has and takes nothing new.
    draining: _Decides[bool] = _Decides(False)
    #: This service has been asked to empty it (`ServiceCore.drain_instance`); it will be told to
    #: drain once nobody needs the blocks it has. When that began.
    leaving_since_s: _Decides[float | None] = _Decides(None)
    #: And it is to stay away after that.
    is_out: bool = False
    #: As it says itself. In doubt: it has refused a plan for being older than its role.
    role: Role = "any"
    epoch: int = 0
    #: What its epoch was when this service met it.
    found_epoch: int = 0
    epoch_in_doubt: bool = False
    #: Number of the last `Tokens` message taken in, and the last one acknowledged by a Credit.
    tokens_seen: int = 0
    tokens_credited: int = 0
    credit_sent_s: float = 0.0
    resync_sent_s: float | None = None
    resync_nonce: int = 0
    #: What it says of its cache makes no sense before a snapshot has come.
    snapshot_wanted: bool = False
    #: Tokens to compute (what it has cached left out) of sequences that have had no token yet; and
    #: sequences that have, with their context.
    queued_tokens: int = 0
    running: int = 0
    running_tokens: int = 0
    #: Of those that are queued: who waits behind the others, and their tokens.
    deferred: int = 0
    deferred_tokens: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    #: Those of the entries that have had no token here yet.
    waiting: dict[str, Entry] = field(default_factory=dict)
    #: Sequences that are to decode here when their prompt has been computed elsewhere.
    coming: dict[str, Entry] = field(default_factory=dict)
    #: Work of other services, as of the last `Load`.
    others: Others = NO_OTHERS
    experience: Experience = field(default_factory=Experience)
    #: Predicted end of the step under way, by our clock.
    step_ends_s: float = 0.0
    _touched: bool = field(default=False, init=False)
    #: What it says of itself has changed, too: its card, its load, its role, what it has fetched.
    has_news: bool = True
    #: Until then none of its sequences can have been without news for too long.
    sure_until_s: float = 0.0
    #: What became of the work placed here, and how often the role has changed.
    outcomes: Outcomes = field(default_factory=Outcomes)
    role_changes: int = 0

    @property
    def touched(self) -> bool:
        """Something has changed that policies see (`LiveView`)."""
        return self._touched

    @touched.setter
    def touched(self, touched: bool) -> None:
        if touched and not self._touched:
            self.changes.touched[self.name] = self
        self._touched = touched

    @property
    def incarnation(self) -> int:
        return self.card.incarnation if self.card else 0

    @property
    def is_gone(self) -> bool:
        """Nothing of ours runs there, but it may attach."""
        return self.state in ("lost", "refused")

    @property
    def takes_work(self) -> bool:
        return self.state == "active" and not self.draining and self.leaving_since_s is None

    @property
    def is_left(self) -> bool:
        """Something that runs there is to go on elsewhere."""
        leaves = self.draining or self.leaving_since_s is not None
        return leaves or self.role in ("decode_to_prefill", "prefill_to_decode")

    @property
    def decodes(self) -> bool:
        """A label: it keeps no work away."""
        return self.role not in ("prefill", "decode_to_prefill", "encode")

    def keeps(self, reserved: Reservation) -> bool:
        """Whether what was planned for it can still be done here."""
        assert self.card is not None
        return (
            self.takes_work
            and (self.incarnation, self.epoch) == (reserved.incarnation, reserved.epoch)
            and len(self.entries) + self.others.running < self.card.max_num_seqs
        )

    @property
    def coming_tokens(self) -> int:
        return sum([entry.num_tokens for entry in self.coming.values()]) if self.coming else 0

    def heard(self, now: float) -> None:
        self.heard_s = now
        if self.state == "suspect":
            self.state = "active"

    def attached(self, card: InstanceCard, now: float, epoch: int = 0) -> None:
        if card.incarnation != self.incarnation:
            self.load, self.others, self.leaving_since_s = None, NO_OTHERS, None
            self.experience.transfer.restarted()
            self.role, self.epoch, self.epoch_in_doubt = "any", 0, False
            self.found_epoch = epoch
            self.resync_sent_s = None
        self.card = card
        self.state = "active"
        self.refusal = ""
        self.draining = False
        self.attach_tries = 0
        self.touched = self.has_news = True
        self.heard(now)

    def may_attach(self, now: float, every_s: float, at_most_s: float) -> bool:
        """Is it time for another try? Then the next one has to wait."""
        if now < self.next_attach_s:
            return False
        self.next_attach_s = now + min(every_s * 2**self.attach_tries, at_most_s)
        # A refusal stands until somebody changes something; until then there is no hurry.
        self.attach_tries = min(self.attach_tries + 1, 8) if self.refusal else 0
        return True

    def is_unsure(self, now: float, after_s: float) -> bool:
        """Whether a sequence here has been without news for too long. News only become newer, so
        that nobody needs to be looked at before the oldest of the last look are old enough."""
        if now <= self.sure_until_s:
            return False
        oldest_s = min((entry.news_s for entry in self.entries.values()), default=now)
        self.sure_until_s = min(oldest_s, now) + after_s
        return now > self.sure_until_s

    def left(self) -> None:
        """It is no part of the cluster any more. Another one may come under its name, and
        what still happens to this one is not to be taken for that one's."""
        self.changes.touched.pop(self.name, None)
        self.changes = Changes()

    def drained(self) -> None:
        """Its process has ended: what it said of itself holds no more."""
        self.state, self.load, self.others = "drained", None, NO_OTHERS
        self.touched = self.has_news = True

    def bring_back(self) -> None:
        self.is_out, self.leaving_since_s = False, None
        if self.state == "drained":
            self.state, self.refusal = "connecting", ""

    def is_now(self, role: Role, epoch: int) -> bool:
        """It has said what it is. True if that is another role than before."""
        if epoch < self.epoch:
            return False  # overtaken on the way
        changed = role != self.role
        if changed:
            self.touched = self.has_news = True
            self.role_changes += 1
        self.role, self.epoch, self.epoch_in_doubt = role, epoch, False
        return changed

    def loaded(self, load: Load, now: float) -> None:
        before, self.load = self.load, load
        self.step_ends_s = now + load.step_end_in_s
        if load.moves or before is None or before.moves:
            self.experience.transfer.moved(load.moves)
        self.touched = self.has_news = True
        waiting, running = sum(load.waiting.values()), sum(load.running.values())
        beyond = max(0, waiting + running - len(self.entries))
        if not beyond:
            self.others = NO_OTHERS
            return
        queued = min(beyond, max(0, waiting - len(self.waiting)))
        self.others = Others(
            queued=queued,
            queued_tokens=max(0, load.waiting_tokens - self.queued_tokens) if queued else 0,
            running=beyond - queued,
            running_tokens=max(0, load.running_tokens - self.running_tokens)
            if beyond > queued
            else 0,
        )

    def place(self, entry: Entry, cached_tokens: int) -> None:
        entry.instance = self.name
        entry.queued_tokens = max(1, entry.num_tokens - cached_tokens)
        self.entries[entry.key] = self.waiting[entry.key] = entry
        self.touched = True
        self.queued_tokens += entry.queued_tokens
        self._defer(entry, 1)

    def started(self, entry: Entry) -> None:
        """The first token of this placement has come."""
        del self.waiting[entry.key]
        self.queued_tokens -= entry.queued_tokens
        self._defer(entry, -1)
        self.running += 1
        self.running_tokens += entry.num_tokens
        entry.queued_tokens = 0

    def _defer(self, entry: Entry, sign: int) -> None:
        if entry.deferred:
            self.deferred += sign
            self.deferred_tokens += sign * entry.queued_tokens

    def expects(self, entry: Entry) -> None:
        self.coming[entry.key] = entry
        self.touched = True

    def expects_no_more(self, entry: Entry) -> None:
        del self.coming[entry.key]
        self.touched = True

    def unplace(self, entry: Entry) -> None:
        del self.entries[entry.key]
        self.touched = True
        if entry.queued_tokens:
            del self.waiting[entry.key]
            self.queued_tokens -= entry.queued_tokens
            self._defer(entry, -1)
        else:
            self.running -= 1
            self.running_tokens -= entry.num_tokens
        entry.instance = None
        entry.queued_tokens = 0
