"""The receiver's side: imports under way, and windows in use.

`Receiving` begins a transfer for a want (`load` from a tier, `ask` a peer), turns what is offered
into jobs, and when the import has ended, well or not, tells `Wanting`. A peer's transfer whose
blocks were mapped stays, renewing its lease, until none of its windows is used any more.

A transfer that makes no progress is given up: its owner is silent for `stall_s`, or not done
`stall_s` after the time it was given, or a job does not end for so long. Giving up settles the
claims at once. Blocks that a job may still write to stay held until its end is heard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Protocol, cast

from penstock.engine.memory.tiers.index import TierIndex
from penstock.engine.scheduler.imports import Import
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.transfer.jobs import Abandon, Incoming, LetGo, Load, Means, Moved, Peer
from penstock.engine.transfer.jobs import Import as ImportJob
from penstock.engine.transfer.transfers import ExchangeConfig, Moves, Transfer, Want
from penstock.protocol.effects import Connect, Effect, Move, Send
from penstock.protocol.instance import InstanceCard, MoveCounts
from penstock.protocol.kv import Ack, BlocksReady, Pull, Release

_NEVER = float("inf")


class Wanting(Protocol):
    """Whose wants are served here."""

    def hold(self, want: Want) -> int:
        """Hold what is here of it by now."""

    def advance(self, want: Want, now: float) -> None:
        """It waits for nothing any more: what next?"""

    def took_room(self, want: Want, num_blocks: int) -> None:
        """Blocks promised to it have been taken for it."""


class Receiving:
    def __init__(
        self,
        card: InstanceCard,
        scheduler: Scheduler,
        config: ExchangeConfig,
        means: Mapping[str, str],
        tiers: TierIndex,
        wanting: Wanting,
    ) -> None:
        self.config = config
        self.tiers = tiers
        self._card = card
        self._layout_digest = card.layout.digest()
        self._scheduler = scheduler
        self._holds = scheduler.holds
        self._means = dict(means)
        self._wanting = wanting
        #: Under way, and those with windows in use; the same dictionary for ever.
        self.transfers: dict[str, Transfer] = {}
        self._by_import: dict[Import, Transfer] = {}
        self._by_job: dict[int, Transfer] = {}
        self._fenced: deque[tuple[int, Transfer, ImportJob | Load]] = deque()
        self._window_of: dict[int, Transfer] = {}
        self._moves: dict[str, Moves] = {}
        #: Of each job under way.
        self._counts_in: dict[int, Moves] = {}
        self._number = 0
        self._effects: list[Effect] = []

    def next_number(self) -> int:
        """Of jobs and transfers: each is used once."""
        self._number += 1
        return self._number

    def take_effects(self) -> list[Effect]:
        if not self._effects:
            return []
        effects, self._effects = self._effects, []
        return effects

    # --- beginning -----------------------------------------------------------------------------

    def join(self, want: Want, owner: object) -> bool:
        """Wait for the import `owner`, if it is one."""
        transfer = self._by_import.get(owner) if isinstance(owner, Import) else None
        if transfer is not None:
            transfer.wants.append(want)
        return transfer is not None

    def leave(self, want: Want) -> None:
        """It waits no longer. An import that nobody wants takes in nothing more."""
        for transfer in self.transfers.values():
            if want in transfer.wants:
                transfer.wants.remove(want)
                if not transfer.wants and transfer.importing:
                    transfer.complete = True
                    transfer.reason = "nobody wants it any more"

    def load(self, want: Want, num_here: int, now: float) -> bool:
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
            imp, len(imp.keys) - start, False, self._scheduler.room.spare()
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
            self._fence(transfer, Load(number, tiers[0], part), now)
        return True

    def ask(self, want: Want, num_here: int, now: float) -> bool:
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
        name = f"{self._card.name}/{self._card.incarnation}/{self.next_number()}"
        transfer = Transfer(name, imp, [want], began_s=now, news_s=now)
        self.transfers[name] = transfer
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

    # --- what comes ----------------------------------------------------------------------------

    def on_ready(self, peer: str, ready: BlocksReady, now: float) -> None:
        """The owner has blocks for us: take room for them and let them come."""
        transfer = self.transfers.get(ready.transfer)
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
            imp, len(offered), ready.means == "map", self._scheduler.room.spare()
        )
        incoming = [Incoming(handle, block) for handle, block in zip(offered, taken)]
        for first in range(0, len(incoming), self.config.blocks_a_job):
            part = tuple(incoming[first : first + self.config.blocks_a_job])
            number = self._job(transfer, expected + first, len(part))
            self._fence(transfer, ImportJob(number, transfer.owner, part), now)
        if len(taken) < len(offered):
            transfer.reason = "no room for all of it here"
            transfer.complete = True
        elif ready.last and len(imp.blocks) < len(imp.keys):
            transfer.reason = f"{source.instance} has no more of it"
        transfer.complete |= ready.last or len(imp.blocks) == len(imp.keys)
        self._look_at(transfer, now)

    def on_refused(self, transfer_name: str, reason: str, now: float) -> None:
        transfer = self.transfers.get(transfer_name)
        if transfer is not None and transfer.importing:
            self._end_import(transfer, reason, now)

    def on_moved(self, moved: Moved, now: float) -> None:
        """The end of a job of ours."""
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
        moves = self._counts_in.pop(moved.number)
        moves.ended(now)
        moves.add(sum(ok), count - sum(ok), moved)
        transfer.news_s = now
        for want in transfer.wants:
            want.came_by[self._means_of(transfer)] += num_named
            want.num_bytes += moved.num_bytes
        if not all(ok) and not transfer.reason:
            transfer.reason = moved.reason or "some blocks did not come whole"
            transfer.complete = True
        self._look_at(transfer, now)

    # --- ends ----------------------------------------------------------------------------------

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
            self._wanting.hold(want)  # before the import lets go: windows have no other holder
            if not came_whole:
                want.reason = reason or want.reason
                if transfer.tier is not None:
                    want.tiers_failed = True
                elif want.source is not None and want.source == transfer.source:
                    want.asked_source = True
        if not transfer.jobs:
            self._close(transfer)
        else:
            self._effects.append(Move(Abandon(tuple(transfer.jobs))))
        for want in wants:
            if not want.done:
                self._wanting.advance(want, now)

    def _close(self, transfer: Transfer) -> None:
        """No job runs. It stays only while its windows are in use."""
        transfer.importing = False
        self._holds.give_up(transfer.imp)
        self._holds.release(transfer.imp)
        self._by_import.pop(transfer.imp, None)
        if not transfer.windows:
            self._part(transfer)

    def _part(self, transfer: Transfer) -> None:
        self.transfers.pop(transfer.name, None)
        if transfer.source is not None:
            self._effects.append(Send(transfer.source.instance, Release(transfer.name)))

    # --- jobs ----------------------------------------------------------------------------------

    def _job(self, transfer: Transfer, start: int, count: int) -> int:
        number = self.next_number()
        transfer.jobs[number] = (start, count)
        self._by_job[number] = transfer
        for want in transfer.wants:
            self._wanting.took_room(want, start + count)
        return number

    def _fence(self, transfer: Transfer, job: ImportJob | Load, now: float) -> None:
        """Start it when no step in flight touches its blocks any more."""
        self._fenced.append((self._scheduler.fence(), transfer, job))
        transfer.num_fenced += 1
        self._start_jobs(now)

    def _start_jobs(self, now: float) -> None:
        while self._fenced and self._scheduler.passed(self._fenced[0][0]):
            _, transfer, job = self._fenced.popleft()
            transfer.num_fenced -= 1
            moves = self._moves.setdefault(self._means_of(transfer), Moves())
            moves.began(now)
            self._counts_in[job.number] = moves
            self._effects.append(Move(job))
            if not transfer.importing:
                self._effects.append(Move(Abandon((job.number,))))

    def _return_windows(self) -> None:
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

    # --- as time passes ------------------------------------------------------------------------

    def poll(self, now: float) -> None:
        """Start what waited for steps, give back windows, renew, ask again, give up."""
        if self._fenced:
            self._start_jobs(now)
        if self._scheduler.pool.num_windows:
            self._return_windows()
        for transfer in list(self.transfers.values()):
            self._watch(transfer, now)

    def next_s(self) -> float:
        return min(map(self._due_s, self.transfers.values()), default=_NEVER)

    def forgive(self, late_s: float) -> None:
        """This process itself stood still for so long: nobody else was silent then."""
        for transfer in self.transfers.values():
            transfer.news_s += late_s
            transfer.wait_until_s += late_s

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

    # --- looking in ----------------------------------------------------------------------------

    def move_counts(self) -> list[MoveCounts]:
        return [
            MoveCounts(means, m.blocks, m.failed, m.num_bytes, m.seconds, m.busy_s)
            for means, m in self._moves.items()
        ]

    def num_holds(self) -> int:
        """How many holds of the scheduler are imports of ours."""
        return sum(not imp.released for imp in self._by_import)

    def check(self) -> None:
        for transfer in self.transfers.values():
            assert transfer.importing or transfer.jobs or transfer.windows, "a transfer for nothing"
            assert transfer.name in self.transfers and not (
                transfer.wants and not transfer.importing
            )
        for window, transfer in self._window_of.items():
            assert window in transfer.windows and transfer.name in self.transfers
        assert all(n in t.jobs for n, t in self._by_job.items())

    @staticmethod
    def _means_of(transfer: Transfer) -> str:
        if transfer.tier is not None:
            return transfer.tier
        return transfer.owner.means if transfer.owner is not None else ""
