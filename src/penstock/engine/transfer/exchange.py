"""The books of blocks that come from elsewhere and go elsewhere. No I/O, no clock.

`Exchange` is the part of InstanceCore that turns "this sequence's prefix is over there" into
imports (`receiving.py`, over `scheduler/imports.py`), answers peers that ask for blocks of ours
(`offers.py`), and has copies made in slower tiers (`spill.py`).

**A want** is what a `Fetch` or a `Submit` sets off: leading keys to be found in the cache. It goes
round by round (`_advance`): what is cached is held; if an import brings the next key, it waits for
that one (so several wants share it); if a running sequence will store it, it is left to that one;
if a slower tier has it, it is loaded; else, once, its source is asked. When nothing is left to try
it is done: the service is told (`Fetched`), and what came is held until the sequence has its blocks
or the lease ends. The sequence itself knows nothing of this: it waits for the claims, as it would
for a sibling's prompt, and then finds a longer or shorter prefix in the cache.

**Why nobody waits for ever.** Each round ends: jobs end by themselves (the data plane's promise),
owners are given up when they are silent for `stall_s` or not done `stall_s` after the time they
were given, and giving up settles the claims at once. Each round but the last either brings blocks
or uses up a possibility (the source is asked once, a tier that failed is not asked again). Holds
are given up when somebody who runs is short of blocks (see `imports.py`).

**Windows** live longer than their import: the transfer stays, renewing its lease, until nobody here
uses any of its windows; then the owner is told (`Release`). If the owner does not hear us, it takes
its pages back when the lease ends, the generations move on, and the rows that read them are
computed again.

Whatever a peer, a service or this instance loses on the way ends in one of these ways; nothing is
held without an end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice

from penstock.engine.memory.tiers.index import NO_TIERS, TierIndex
from penstock.engine.scheduler.imports import Hold
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.sequence import Sequence
from penstock.engine.transfer.jobs import Moved
from penstock.engine.transfer.offers import Offers
from penstock.engine.transfer.receiving import Receiving
from penstock.engine.transfer.spill import Spill
from penstock.engine.transfer.transfers import ExchangeConfig, Want
from penstock.protocol.effects import Effect, Send
from penstock.protocol.instance import InstanceCard, MoveCounts, TierLoad
from penstock.protocol.kv import (
    Ack,
    BlocksReady,
    Fetch,
    Fetched,
    Pull,
    Refused,
    Release,
    split_keys,
)

_NEVER = float("inf")


class Exchange:
    """`means`: what the data plane can do as a receiver; `endpoints`: where peers find ours; both
    by means, best first (`jobs.Mover`)."""

    def __init__(
        self,
        card: InstanceCard,
        scheduler: Scheduler,
        config: ExchangeConfig | None = None,
        *,
        means: Mapping[str, str] | None = None,
        endpoints: Mapping[str, str] | None = None,
        tiers: TierIndex = NO_TIERS,
    ) -> None:
        self.config = config or ExchangeConfig()
        self.tiers = tiers
        self.offers = Offers(
            card,
            scheduler,
            dict(endpoints or {}),
            speak_s=self.config.speak_s,
            max_offers=self.config.max_offers,
        )
        self._card = card
        self._scheduler = scheduler
        self._holds = scheduler.holds
        scheduler.left_behind = []
        self._receiving = Receiving(card, scheduler, self.config, means or {}, tiers, self)
        self._spill = Spill(
            scheduler,
            tiers,
            ahead_blocks=self.config.store_ahead_blocks,
            max_stores=self.config.max_stores,
        )
        self._ways = (self._receiving.load, self._receiving.ask)  # in the order of trying
        self._wants: dict[int, Want] = {}
        #: With the time until which they are kept.
        self._left: deque[tuple[float, Hold]] = deque()
        self._effects: list[Effect] = []
        #: Whatever may need time to pass for it; none of them is ever replaced.
        self._under_way = (
            self._wants, self._left, self._receiving.transfers, self.offers.live,
        )  # fmt: skip

    # --- what comes in -------------------------------------------------------------------------

    def on_submit(self, seq: Sequence, now: float) -> list[Effect]:
        """A sequence has been queued: bring what others have of its prefix. What tiers have comes
        when its turn is near (`poll`)."""
        earlier = self._of(seq.key)
        if not seq.public or not (seq.submit.kv_source or earlier):
            return []
        self._add(self._want_of(seq, now), now)
        for older in earlier:  # what it was announced with; it has the blocks now
            older.lease_until_s = 0.0
            self._holds.withdraw(older.key)
            if older.done:
                self._drop(older)
        return self._take_effects()

    def on_fetch(self, peer: str, fetch: Fetch, now: float) -> list[Effect]:
        key = (peer, fetch.request_id)
        earlier = self._of(key)
        if any(w.attempt >= fetch.attempt for w in earlier):
            return []  # delivered twice, or overtaken
        for older in earlier:
            self._cancel(older)
        if not fetch.lease_s >= 0:  # NaN, too
            reason = "a lease is not negative"
            return [
                Send(peer, Refused("fetch", reason, key[1], fetch.attempt, code="protocol_error"))
            ]
        keys = self._scheduler.keys_of(key, split_keys(fetch.keys))
        num_blocks = -(-fetch.num_tokens // self._card.layout.block_tokens)
        num_missing = max(0, num_blocks - len(self._scheduler.pool.match(keys)))
        room = self._scheduler.room.spare() - self._holds.promised(key)
        if (
            len(self._wants) >= self.config.max_wants
            or num_missing > room
            or not self._holds.promise(key, num_missing)
        ):
            reason = f"no room for {num_missing} blocks ({max(0, room)} can be had)"
            return [Send(peer, Refused("fetch", reason, key[1], fetch.attempt, code="no_room"))]
        lease_s = min(fetch.lease_s, self.config.max_fetch_lease_s)
        want = Want(
            key,
            fetch.attempt,
            keys,
            fetch.source,
            lease_s,
            now,
            lease_until_s=now + lease_s,
            num_tokens=fetch.num_tokens,
            tell=True,
        )
        self._add(want, now)
        return self._take_effects()

    def on_cancel(self, key: tuple[str, str], attempt: int) -> None:
        """A sequence that was announced (or is here) is not wanted any more."""
        for want in self._of(key):
            if want.attempt <= attempt:
                self._cancel(want)

    def on_service_gone(self, service: str) -> None:
        """What it has announced is freed; what is under way ends by itself."""
        for want in list(self._wants.values()):
            if want.key[0] == service:
                want.tell = False
                self._cancel(want)

    def on_message(
        self, peer: str, message: Pull | BlocksReady | Ack | Release | Refused, now: float
    ) -> list[Effect]:
        """Of a peer."""
        match message:
            case Pull():
                return self.offers.on_pull(peer, message, now)
            case Ack():
                self.offers.on_ack(peer, message, now)
            case Release():
                self.offers.on_release(peer, message)
            case BlocksReady():
                self._receiving.on_ready(peer, message, now)
            case Refused():
                self._receiving.on_refused(message.request_id or "", message.reason, now)
        return self._take_effects()

    def on_moved(self, moved: Moved, now: float) -> list[Effect]:
        """The end of a job."""
        if not self._spill.on_moved(moved):
            self._receiving.on_moved(moved, now)
        return self._take_effects()

    # --- as time passes ------------------------------------------------------------------------

    def poll(self, now: float) -> tuple[list[Effect], float]:
        """To be called in every turn, after results and messages and before scheduling; and when
        it says, at the latest."""
        if self._has_nothing_to_do():
            return self._take_effects(), _NEVER
        for number, want in list(self._wants.items()):
            if want.over or (want.done and want.sequence is None and now >= want.lease_until_s):
                self._drop(want, number)
        self._let_go_of_what_is_left(now)
        self._receiving.poll(now)
        if self.tiers.enabled:
            self._load_for_next(now)
        if len(self.offers):
            self._effects += self.offers.poll(now)
        self._effects += self._spill.poll(self._receiving.next_number)
        return self._take_effects(), self._next_s()

    def _next_s(self) -> float:
        leases_s = [w.lease_until_s for w in self._wants.values() if w.done and w.sequence is None]
        leases_s += [at_s for at_s, _ in islice(self._left, 1)]
        return min(self.offers.next_s(), self._receiving.next_s(), *leases_s)

    def _has_nothing_to_do(self) -> bool:
        """Most turns of an instance whose prompts come from nowhere else."""
        return not (
            any(self._under_way)
            or self._scheduler.left_behind
            or self.tiers.enabled
            or self._scheduler.pool.num_windows
        )

    def _let_go_of_what_is_left(self, now: float) -> None:
        """Blocks behind windows outlive their sequence for a moment, for who goes on with it."""
        for hold in self._scheduler.left_behind or ():
            self._left.append((now + self.config.linger_s, hold))
        self._scheduler.left_behind = []
        while self._left and (self._left[0][1].released or now >= self._left[0][0]):
            self._holds.release(self._left.popleft()[1])

    @property
    def serves_peers(self) -> bool:
        """Do peers still wait for bytes from here? Then a drain is not over."""
        return self.offers.unfinished

    def forgive(self, late_s: float) -> None:
        """This process itself stood still for so long: nobody else was silent then."""
        self._receiving.forgive(late_s)

    # --- looking in ----------------------------------------------------------------------------

    def tier_loads(self) -> list[TierLoad]:
        return [TierLoad(t, s.used, s.capacity) for t, s in self.tiers.stats.items()]

    def move_counts(self) -> list[MoveCounts]:
        return self._receiving.move_counts()

    @property
    def idle(self) -> bool:
        """Nothing is wanted, under way, borrowed, lent or being stored."""
        return not (any(self._under_way) or len(self._spill))

    def check(self) -> None:
        """Assert that what the books hold is what the scheduler's holds say, each once."""
        wanted = [w.hold for w in self._wants.values() if w.hold and not w.hold.released]
        left = [*(self._scheduler.left_behind or ()), *(hold for _, hold in self._left)]
        num_holds = len(wanted) + self._receiving.num_holds() + len(self.offers)
        num_holds += sum(not hold.released for hold in left)
        assert len(self._holds) == num_holds, "a hold is lost"
        self._receiving.check()
        self.tiers.check()

    # --- wants ---------------------------------------------------------------------------------

    def _want_of(self, seq: Sequence, now: float) -> Want:
        source = seq.submit.kv_source
        return Want(
            seq.key,
            seq.attempt,
            seq.keys[: seq.max_reusable_blocks(self._card.layout.block_tokens)],
            source,
            self.config.submit_wait_s,
            now,
            sequence=seq,
            tell=source is not None,
        )

    def _load_for_next(self, now: float) -> None:
        """Load from tiers what those lack that come next, newcomers and preempted ones, up to the
        first that would find no room: what is loaded for one of them takes it from nobody before.
        """
        wanting = {want.key for want in self._wants.values() if not want.done}
        room = self._scheduler.room.spare()
        for seq in self._scheduler.next_waiting(self.config.load_ahead_seqs):
            room -= self._scheduler.room.num_lacking(seq)
            if room < 0:
                break
            if not seq.public or seq.key in wanting:
                continue
            want = self._want_of(seq, now)
            missing = want.keys[len(self._scheduler.pool.match(want.keys)) :]
            if self.tiers.match(missing[:1]) and not self._scheduler.claims.owner(missing[0]):
                want.tell = False
                want.asked_source = True
                self._add(want, now)

    def _of(self, key: tuple[str, str]) -> list[Want]:
        return [want for want in self._wants.values() if want.key == key]

    def _add(self, want: Want, now: float) -> None:
        if len(self._wants) >= self.config.max_wants:
            return  # then it is computed
        self._wants[self._receiving.next_number()] = want
        self.advance(want, now)

    def advance(self, want: Want, now: float) -> None:
        """The next round of a want that waits for nothing."""
        if want.done:
            return
        num_here = self.hold(want)
        if num_here < len(want.keys):
            owner = self._scheduler.claims.owner(want.keys[num_here])
            if self._receiving.join(want, owner):
                return
            if owner is not None:
                want.reason = want.reason or "it is being computed here"
            elif any(bring(want, num_here, now) for bring in self._ways):
                return
        self._finish(want, now)

    def hold(self, want: Want) -> int:
        """Hold what is here by now; how many blocks that is. Windows have no other holder."""
        older, want.hold = want.hold, self._holds.hold(want.keys, soft=True)
        if older is not None:
            self._holds.release(older)
        if want.num_here_first is None:
            want.num_here_first = len(want.hold.blocks)
        return len(want.hold.blocks)

    def _finish(self, want: Want, now: float) -> None:
        """Nothing is left to try."""
        want.done = True
        num_first = want.num_here_first or 0
        num_held = len(want.hold.blocks) if want.hold is not None else 0
        if want.tell:
            self._effects.append(
                Send(
                    want.key[0],
                    Fetched(
                        self._card.name,
                        self._card.incarnation,
                        want.key[1],
                        want.attempt,
                        num_blocks=max(0, num_held - num_first),
                        num_wanted=len(want.keys) - num_first,
                        num_bytes=want.num_bytes,
                        seconds=now - want.began_s,
                        means=max(want.came_by, key=lambda m: want.came_by[m], default=""),
                        reason=want.reason if num_held < len(want.keys) else "",
                    ),
                )
            )
        if want.sequence is None and now < want.lease_until_s:
            self.took_room(want, num_held)
        elif want.sequence is None or not num_held:
            self._drop(want)

    def took_room(self, want: Want, num_blocks: int) -> None:
        """So many blocks of what has been announced have their room."""
        if want.sequence is None and want.lease_until_s:
            missing = -(-want.num_tokens // self._card.layout.block_tokens) - num_blocks
            self._holds.promise(want.key, max(0, missing))

    def _cancel(self, want: Want) -> None:
        """Of no use to anybody. An import that others wait for goes on."""
        want.done = True
        self._receiving.leave(want)
        self._drop(want)

    def _drop(self, want: Want, number: int | None = None) -> None:
        if number is None:
            number = next((n for n, w in self._wants.items() if w is want), None)
            if number is None:
                return
        if not want.done:  # it waits for a transfer: the sequence found its blocks otherwise
            self._cancel(want)
            return
        del self._wants[number]
        if want.sequence is None:
            self._holds.withdraw(want.key)
        if want.hold is not None:
            self._holds.release(want.hold)

    def touch(self, sequences: Iterable[Sequence]) -> None:
        """These have been let in: what slower tiers have of their prefixes is young again."""
        if self.tiers.enabled:
            for seq in sequences:
                if seq.public:
                    self.tiers.touch(seq.keys)

    def _take_effects(self) -> list[Effect]:
        effects = self._receiving.take_effects()
        if self._effects:
            effects += self._effects
            self._effects = []
        return effects
