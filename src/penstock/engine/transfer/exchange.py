"""The books of blocks that come from elsewhere and go elsewhere. No I/O, no clock.

`Exchange` is the part of InstanceCore that turns "this sequence's prefix is over there" into
imports (`scheduler/imports.py`), messages to peers and jobs for the data plane, and answers peers
that ask for blocks of ours (`offers.py`). Copies to slower tiers are made in `spill.py`.

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
from typing import cast

from penstock.engine.memory.tiers.index import NO_TIERS, TierIndex
from penstock.engine.scheduler.imports import Import
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.sequence import Sequence
from penstock.engine.transfer.jobs import Import as ImportJob
from penstock.engine.transfer.jobs import Incoming, LetGo, Load, Means, Moved, Peer
from penstock.engine.transfer.offers import Offers
from penstock.engine.transfer.spill import Spill
from penstock.engine.transfer.transfers import ExchangeConfig, Moves, Transfer, Want
from penstock.protocol.effects import Connect, Effect, Move, Send
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
_MAX_ROUNDS = 16


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
        self._layout_digest = card.layout.digest()
        self._scheduler = scheduler
        self._holds = scheduler.holds
        self._means = dict(means or {})
        self._spill = Spill(
            scheduler,
            tiers,
            ahead_blocks=self.config.store_ahead_blocks,
            max_stores=self.config.max_stores,
        )
        self._wants: dict[int, Want] = {}
        self._transfers: dict[str, Transfer] = {}
        self._by_import: dict[Import, Transfer] = {}
        self._by_job: dict[int, Transfer] = {}
        self._fenced: deque[tuple[int, Transfer, ImportJob | Load]] = deque()
        self._window_of: dict[int, Transfer] = {}
        self._moves: dict[str, Moves] = {}
        self._number = 0
        self._effects: list[Effect] = []

    # --- what comes in -------------------------------------------------------------------------

    def on_submit(self, seq: Sequence, now: float) -> list[Effect]:
        """A sequence has been queued: bring what can be had of its prefix."""
        source = seq.submit.kv_source
        earlier = self._of(seq.key)
        if not seq.public or not (source or earlier or self.tiers.enabled):
            return []
        block_tokens = self._card.layout.block_tokens
        want = Want(
            seq.key,
            seq.attempt,
            seq.keys[: seq.max_reusable_blocks(block_tokens)],
            source,
            self.config.submit_wait_s,
            now,
            sequence=seq,
            tell=source is not None,
        )
        self.tiers.touch(want.keys)
        self._add(want, now)
        for older in earlier:  # what it was announced with; it has the blocks now
            older.lease_until_s = now
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
        keys = split_keys(fetch.keys)
        num_blocks = -(-fetch.num_tokens // self._card.layout.block_tokens)
        num_missing = max(0, num_blocks - len(self._scheduler.pool.match(keys)))
        room = self._scheduler.room_for_imports() - self._holds.promised(key)
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
                self._ready(peer, message, now)
            case Refused():
                transfer = self._transfers.get(message.request_id or "")
                if transfer is not None and transfer.importing:
                    self._end_import(transfer, message.reason, now)
        return self._take_effects()

    def on_moved(self, moved: Moved, now: float) -> list[Effect]:
        """The end of a job."""
        if self._spill.on_moved(moved):
            return []
        transfer = self._by_job.pop(moved.number)
        start, count = transfer.jobs.pop(moved.number)
        imp = transfer.imp
        ok = [*moved.ok, *[False] * (count - len(moved.ok))]
        for window, good in zip(imp.blocks[start : start + count], ok):
            if good and self._scheduler.pool.is_window(window):
                transfer.windows[window] = None
                self._window_of[window] = transfer
        if transfer.tier is not None:
            self.tiers.end_load(transfer.tier, imp.keys[start : start + count], ok)
        num_named = self._holds.filled(imp, start, ok)
        self._count(transfer, sum(ok), count - sum(ok), moved)
        transfer.news_s = now
        for want in transfer.wants:
            want.came_by[self._means_of(transfer)] += num_named
            want.num_bytes += moved.num_bytes
        if not all(ok) and not transfer.reason:
            transfer.reason = moved.reason or "some blocks did not come whole"
            transfer.complete = True
        self._look_at(transfer, now)
        return self._take_effects()

    # --- as time passes ------------------------------------------------------------------------

    def poll(self, now: float) -> list[Effect]:
        """To be called in every turn, after results and messages and before scheduling."""
        if self._fenced:
            self._start_jobs()
        if self._scheduler.pool.num_windows:
            self._return_windows(now)
        for number, want in list(self._wants.items()):
            if want.over or (want.done and want.sequence is None and now >= want.lease_until_s):
                self._drop(want, number)
        for transfer in list(self._transfers.values()):
            self._watch(transfer, now)
        if len(self.offers):
            self._effects += self.offers.poll(now)
        if spilled := self._spill.poll(self._number + 1):
            self._number += len(spilled)
            self._effects += spilled
        return self._take_effects()

    def next_s(self) -> float:
        """When `poll` should be called at the latest."""
        if not (self._transfers or self._wants or len(self.offers)):
            return _NEVER
        due_s = self.offers.next_s()
        for t in self._transfers.values():
            due_s = min(due_s, self._due_s(t))
        for w in self._wants.values():
            if w.done and w.sequence is None:
                due_s = min(due_s, w.lease_until_s)
        return due_s

    @property
    def serves_peers(self) -> bool:
        """Do peers still wait for bytes from here? Then a drain is not over."""
        return self.offers.unfinished

    def forgive(self, late_s: float) -> None:
        """This process itself stood still for so long: nobody else was silent then."""
        for transfer in self._transfers.values():
            transfer.news_s += late_s
            transfer.wait_until_s += late_s

    # --- looking in ----------------------------------------------------------------------------

    def tier_loads(self) -> list[TierLoad]:
        return [TierLoad(t, s.used, s.capacity) for t, s in self.tiers.stats.items()]

    def move_counts(self) -> list[MoveCounts]:
        return [
            MoveCounts(means, m.blocks, m.failed, m.num_bytes, m.seconds)
            for means, m in self._moves.items()
        ]

    @property
    def idle(self) -> bool:
        """Nothing is wanted, under way, borrowed, lent or being stored."""
        return not (
            self._wants or self._transfers or self._fenced or len(self.offers) or len(self._spill)
        )

    def check(self) -> None:
        """Assert that what the books hold is what the scheduler's holds say, each once."""
        wanted = [w.hold for w in self._wants.values() if w.hold and not w.hold.released]
        imports = [i for i in self._by_import if not i.released]
        assert len(self._holds) == len(wanted) + len(imports) + len(self.offers), "a hold is lost"
        for transfer in self._transfers.values():
            assert transfer.importing or transfer.jobs or transfer.windows, "a transfer for nothing"
            assert all(w in self._wants.values() for w in transfer.wants), "a want is lost"
        for window, transfer in self._window_of.items():
            assert window in transfer.windows and transfer.name in self._transfers
        assert all(n in t.jobs for n, t in self._by_job.items())

    # --- wants ---------------------------------------------------------------------------------

    def _of(self, key: tuple[str, str]) -> list[Want]:
        return [want for want in self._wants.values() if want.key == key]

    def _add(self, want: Want, now: float) -> None:
        if len(self._wants) >= self.config.max_wants:
            return  # then it is computed
        self._number += 1
        self._wants[self._number] = want
        self._advance(want, now)

    def _advance(self, want: Want, now: float) -> None:
        """The next round of a want that waits for nothing."""
        for _ in range(_MAX_ROUNDS):
            num_here = self._hold(want)
            if num_here == len(want.keys):
                break
            owner = self._scheduler.claims.owner(want.keys[num_here])
            if isinstance(owner, Import) and owner in self._by_import:
                self._by_import[owner].wants.append(want)
                return
            if owner is not None:
                want.reason = want.reason or "it is being computed here"
                break
            if self._load(want, num_here, now) or self._ask(want, num_here, now):
                return
            if not want.tiers_failed or not want.asked_source:
                break
        self._finish(want, now)

    def _hold(self, want: Want) -> int:
        """Hold what is here by now; how many blocks that is. Windows have no other holder."""
        older, want.hold = want.hold, self._holds.hold(want.keys, soft=True)
        if older is not None:
            self._holds.release(older)
        if want.num_here_first is None:
            want.num_here_first = len(want.hold.blocks)
        return len(want.hold.blocks)

    def _finish(self, want: Want, now: float) -> None:
        """Nothing is left to try."""
        if want.done:
            return
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
            num_blocks = -(-want.num_tokens // self._card.layout.block_tokens)
            self._holds.promise(want.key, max(0, num_blocks - num_held))
        elif want.sequence is None or not num_held:
            self._drop(want)

    def _cancel(self, want: Want) -> None:
        """Of no use to anybody. An import that others wait for goes on."""
        want.done = True
        for transfer in self._transfers.values():
            if want in transfer.wants:
                transfer.wants.remove(want)
                if not transfer.wants and transfer.importing:
                    transfer.complete = True
                    transfer.reason = "nobody wants it any more"
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

    # --- transfers -----------------------------------------------------------------------------

    def _load(self, want: Want, num_here: int, now: float) -> bool:
        """Load the next keys from the tier that has them. False: no tier, or no room."""
        if want.tiers_failed or not self.tiers.enabled:
            return False
        tiers = self.tiers.match(want.keys[num_here:])
        if not tiers:
            return False
        same = next((i for i, tier in enumerate(tiers) if tier != tiers[0]), len(tiers))
        transfer = self._begin(want, want.keys[: num_here + same], now)
        if transfer is None:
            return False
        transfer.tier = tiers[0]
        transfer.complete = True
        imp = transfer.imp
        start = len(imp.blocks)
        taken = self._holds.take_room(
            imp, len(imp.keys) - start, False, self._scheduler.room_for_imports()
        )
        if not taken:
            want.reason, want.tiers_failed = "no room for it here", True
            transfer.wants.clear()
            self._close(transfer)
            return False
        pairs = list(zip(imp.keys[start:], taken))
        self.tiers.begin_load(tiers[0], [key for key, _ in pairs])
        for first in range(0, len(pairs), self.config.blocks_a_job):
            part = tuple(pairs[first : first + self.config.blocks_a_job])
            number = self._job(transfer, start + first, len(part))
            self._fence(transfer, Load(number, tiers[0], part))
        return True

    def _ask(self, want: Want, num_here: int, now: float) -> bool:
        """Ask the want's source for what is missing. False: that is no use."""
        source = want.source
        if want.asked_source or source is None or source.instance == self._card.name:
            return False
        want.asked_source = True
        if not self._means:
            want.reason = "this instance has no means of moving blocks"
            return False
        transfer = self._begin(want, want.keys[: source.num_blocks], now)
        if transfer is None:
            return False
        transfer.source = source
        transfer.wait_until_s = now + want.wait_s
        self._effects.append(Connect(source.instance, source.address))
        self._pull(transfer, now)
        return True

    def _begin(self, want: Want, keys: list[bytes], now: float) -> Transfer | None:
        imp = self._holds.begin_import(keys)
        if imp is None:
            return None
        self._number += 1
        name = f"{self._card.name}/{self._card.incarnation}/{self._number}"
        transfer = Transfer(name, imp, [want], began_s=now, news_s=now)
        self._transfers[name] = transfer
        self._by_import[imp] = transfer
        return transfer

    def _pull(self, transfer: Transfer, now: float) -> None:
        assert transfer.source is not None
        transfer.asked_s = now
        transfer.next_ack_s = now + self.config.lease_s / 3
        pull = Pull(
            transfer=transfer.name,
            receiver=self._card.name,
            receiver_incarnation=self._card.incarnation,
            owner_incarnation=transfer.source.incarnation,
            model_digest=self._card.model_digest,
            layout_digest=self._layout_digest,
            keys=b"".join(transfer.imp.keys),
            means=self._means,
            wait_s=max(0.0, transfer.wait_until_s - now),
            lease_s=self.config.lease_s,
            first_index=len(transfer.imp.blocks),
        )
        self._effects.append(Send(transfer.source.instance, pull))

    def _ready(self, peer: str, ready: BlocksReady, now: float) -> None:
        """The owner has blocks for us: take room for them and let them come."""
        transfer = self._transfers.get(ready.transfer)
        if transfer is None or not transfer.importing or transfer.complete:
            if transfer is None:
                self._effects.append(Send(peer, Release(ready.transfer)))
            return
        source, imp = transfer.source, transfer.imp
        if source is None or (ready.owner, ready.owner_incarnation) != (
            source.instance,
            source.incarnation,
        ):
            return
        transfer.answered = True
        transfer.news_s = now
        expected = len(imp.blocks)
        if ready.first_index > expected:  # something was lost on the way
            if now - transfer.asked_s >= self.config.retry_s:
                self._pull(transfer, now)
            return
        offered = ready.blocks[expected - ready.first_index :]
        offered = offered[: len(imp.keys) - expected]
        if any(h.key != imp.keys[i] for i, h in enumerate(offered, expected)):
            self._end_import(transfer, "the owner offered blocks of another chain", now)
            return
        means = cast(Means, ready.means)
        transfer.owner = Peer(peer, ready.owner_incarnation, means, ready.endpoint)
        taken = self._holds.take_room(
            imp, len(offered), ready.means == "map", self._scheduler.room_for_imports()
        )
        incoming = [Incoming(handle, block) for handle, block in zip(offered, taken)]
        for first in range(0, len(incoming), self.config.blocks_a_job):
            part = tuple(incoming[first : first + self.config.blocks_a_job])
            number = self._job(transfer, expected + first, len(part))
            self._fence(transfer, ImportJob(number, transfer.owner, part))
        if len(taken) < len(offered):
            transfer.reason = "no room for all of it here"
            transfer.complete = True
        elif ready.last and len(imp.blocks) < len(imp.keys):
            transfer.reason = f"{source.instance} has no more of it"
        transfer.complete |= ready.last or len(imp.blocks) == len(imp.keys)
        self._look_at(transfer, now)

    def _look_at(self, transfer: Transfer, now: float) -> None:
        """Has its import, or all of it, come to an end?"""
        if transfer.importing and transfer.complete and not transfer.jobs:
            self._end_import(transfer, transfer.reason, now)
        elif not transfer.importing and not transfer.jobs:
            self._close(transfer)

    def _end_import(self, transfer: Transfer, reason: str, now: float) -> None:
        """It brings nothing more: who waited for it goes on with what there is. Jobs may still run;
        then their blocks are held until they end."""
        if not transfer.importing:
            return
        transfer.importing = False
        wants, transfer.wants = transfer.wants, []
        came_whole = transfer.imp.num_named == len(transfer.imp.keys)
        self._holds.give_up(transfer.imp)
        for want in wants:
            self._hold(want)  # before the import lets go: windows have no other holder
            if not came_whole:
                want.reason = reason or want.reason
                if transfer.tier is not None:
                    want.tiers_failed = True
                elif want.source is not None and want.source == transfer.source:
                    want.asked_source = True
        if not transfer.jobs:
            self._close(transfer)
        for want in wants:
            if not want.done:
                self._advance(want, now)

    def _close(self, transfer: Transfer) -> None:
        """No job runs. It stays only while its windows are in use."""
        transfer.importing = False
        self._holds.give_up(transfer.imp)
        self._holds.release(transfer.imp)
        self._by_import.pop(transfer.imp, None)
        if not transfer.windows:
            self._part(transfer)

    def _part(self, transfer: Transfer) -> None:
        self._transfers.pop(transfer.name, None)
        if transfer.source is not None:
            self._effects.append(Send(transfer.source.instance, Release(transfer.name)))

    # --- jobs ----------------------------------------------------------------------------------

    def _job(self, transfer: Transfer, start: int, count: int) -> int:
        self._number += 1
        transfer.jobs[self._number] = (start, count)
        self._by_job[self._number] = transfer
        return self._number

    def _fence(self, transfer: Transfer, job: ImportJob | Load) -> None:
        """Start it when no step in flight touches its blocks any more."""
        self._fenced.append((self._scheduler.fence(), transfer, job))
        transfer.num_fenced += 1
        self._start_jobs()

    def _start_jobs(self) -> None:
        while self._fenced and self._scheduler.passed(self._fenced[0][0]):
            _, transfer, job = self._fenced.popleft()
            transfer.num_fenced -= 1
            self._effects.append(Move(job))

    def _return_windows(self, now: float) -> None:
        """Back to their owners with what nobody here uses any more."""
        released = self._scheduler.take_released_windows()
        known = [w for w in released if w in self._window_of]  # others were never opened
        if known:
            self._effects.append(Move(LetGo(tuple(known))))
        for window in known:
            transfer = self._window_of.pop(window)
            del transfer.windows[window]
            if not transfer.windows and not transfer.importing and not transfer.jobs:
                self._part(transfer)

    # --- bounds --------------------------------------------------------------------------------

    def _due_s(self, transfer: Transfer) -> float:
        due_s = _NEVER
        if transfer.importing:
            due_s = transfer.news_s + self.config.stall_s
            if transfer.source is not None:
                if not transfer.complete:
                    due_s = min(due_s, transfer.wait_until_s + self.config.stall_s)
                if not transfer.answered:
                    due_s = min(due_s, transfer.asked_s + self.config.retry_s)
        if transfer.source is not None:
            due_s = min(due_s, transfer.next_ack_s)
        return due_s

    def _watch(self, transfer: Transfer, now: float) -> None:
        """Ask again, renew, or give up."""
        if transfer.importing:
            if transfer.complete and not transfer.jobs:
                self._look_at(transfer, now)
                return
            if transfer.num_fenced:
                transfer.news_s = now  # it waits for our own steps
            silent = now >= transfer.news_s + self.config.stall_s
            late = (
                transfer.source is not None
                and not transfer.complete
                and now >= transfer.wait_until_s + self.config.stall_s
            )
            if silent or late:
                self._end_import(transfer, self._complaint(transfer), now)
            elif (
                transfer.source is not None
                and not transfer.answered
                and now >= transfer.asked_s + self.config.retry_s
            ):
                self._pull(transfer, now)
        if transfer.source is not None and now >= transfer.next_ack_s:
            transfer.next_ack_s = now + self.config.lease_s / 3
            ack = Ack(transfer.name, transfer.imp.num_named)
            self._effects.append(Send(transfer.source.instance, ack))

    def _complaint(self, transfer: Transfer) -> str:
        if transfer.source is None:
            return f"loading from {transfer.tier} makes no progress"
        owner = transfer.source.instance
        if not transfer.answered:
            return f"{owner} does not answer"
        return f"{owner} falls silent" if transfer.jobs == {} else "the copy makes no progress"

    # --- counts --------------------------------------------------------------------------------

    @staticmethod
    def _means_of(transfer: Transfer) -> str:
        if transfer.tier is not None:
            return transfer.tier
        return transfer.owner.means if transfer.owner is not None else ""

    def _count(self, transfer: Transfer, blocks: int, failed: int, moved: Moved) -> None:
        moves = self._moves.setdefault(self._means_of(transfer), Moves())
        moves.blocks += blocks
        moves.failed += failed
        moves.num_bytes += moved.num_bytes
        moves.seconds += moved.seconds

    def touch(self, sequences: Iterable[Sequence]) -> None:
        """These have been let in: what slower tiers have of their prefixes is young again."""
        if self.tiers.enabled:
            for seq in sequences:
                if seq.public:
                    self.tiers.touch(seq.keys)

    def _take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects
