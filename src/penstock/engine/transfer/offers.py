"""The owner's side: blocks of ours that peers read.

A peer asks for the blocks of a chain (`Pull`). What is cached is pinned and offered at once, the
rest as sequences here store it, up to the time the peer wants to wait. Pins hold whole prefixes, so
eviction cannot make a hole before what a peer reads. They last until the peer's `Release` or the
end of its lease, which each of its `Ack`s begins anew; while a sequence here cannot get in because
of pins (`Holds.starved`), leases are not renewed and no new ones are given.

An offer says something every `speak_s`, so that silence means that the owner, or the way to it, is
gone. A `Pull` that comes again is answered from the start: that is how lost offers are repaired.

Whatever cannot be pinned is said at once, since the peer would only wait for it: an offer whose
next block is here, but not to be had, is the last, and one that has nothing is refused. Mapped
blocks stay pinned until the peer's sequence has ended; when there is no more room for such pins,
blocks are copied if both sides can (`Holds`).
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.scheduler.imports import Hold
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.protocol.effects import Effect, Send
from penstock.protocol.instance import InstanceCard
from penstock.protocol.kv import Ack, BlockHandle, BlocksReady, Pull, Refused, Release, split_keys

#: A message with more handles than this would be long in the way of others.
_HANDLES_A_MESSAGE = 512


@dataclass(slots=True, eq=False)
class _Offer:
    peer: str
    pull: Pull
    means: str
    hold: Hold
    wait_until_s: float
    lease_until_s: float
    num_told: int  # keys before this one have been offered (or were not wanted)
    spoke_s: float
    last: bool = False


class Offers:
    """`endpoints`: where peers find blocks, by means (`Mover.endpoints`)."""

    def __init__(
        self,
        card: InstanceCard,
        scheduler: Scheduler,
        endpoints: dict[str, str],
        *,
        speak_s: float,
        max_offers: int,
        max_lease_s: float = 60.0,
    ) -> None:
        self._card = card
        self._scheduler = scheduler
        self._endpoints = endpoints
        self._layout_digest = card.layout.digest()
        self._speak_s = speak_s
        self._max_offers = max_offers
        self._max_lease_s = max_lease_s
        #: By (peer, transfer); the same dictionary for ever.
        self.live: dict[tuple[str, str], _Offer] = {}

    def __len__(self) -> int:
        return len(self.live)

    @property
    def unfinished(self) -> bool:
        """Does a peer still wait for bytes from this process? (Mapped pages outlive it.)"""
        return any(not o.last or o.means != "map" for o in self.live.values())

    # --- messages ------------------------------------------------------------------------------

    def on_pull(self, peer: str, pull: Pull, now: float) -> list[Effect]:
        offer = self.live.get((peer, pull.transfer))
        if offer is not None and pull.first_index >= 0:
            wanted = max(pull.first_index, offer.hold.foreign)
            offer.num_told = min(wanted, len(offer.hold.keys))
            self._renew(offer, now)
            return self._tell(offer, now)
        refusal = self._refusal(pull)
        if refusal is not None:
            code, reason = refusal
            return [Send(peer, Refused("pull", reason, pull.transfer, code=code))]
        self._drop_older(peer, pull.receiver_incarnation)
        keys = split_keys(pull.keys)
        means = self._choose_means(pull, keys)
        hold = self._scheduler.holds.pin(keys, pull.first_index, brief=means != "map")
        if len(hold.blocks) <= pull.first_index and self._scheduler.holds.is_stuck(hold):
            self._scheduler.holds.release(hold)
            reason = "no more blocks can be pinned at the moment"
            return [Send(peer, Refused("pull", reason, pull.transfer, code="no_room"))]
        offer = _Offer(
            peer,
            pull,
            means,
            hold,
            wait_until_s=now + pull.wait_s,
            lease_until_s=now + min(pull.lease_s, self._max_lease_s),
            num_told=min(pull.first_index, len(keys)),
            spoke_s=now,
        )
        self.live[peer, pull.transfer] = offer
        self._look_whether_last(offer, now)
        return self._tell(offer, now)

    def on_ack(self, peer: str, ack: Ack, now: float) -> None:
        offer = self.live.get((peer, ack.transfer))
        if offer is not None:
            self._renew(offer, now)

    def on_release(self, peer: str, release: Release) -> None:
        """Partial releases only tell: a chain is held from its beginning."""
        if release.num_blocks is None:
            self._end((peer, release.transfer))

    def _refusal(self, pull: Pull) -> tuple[str, str] | None:
        card = self._card
        # The comparisons are false for NaN, which would make a lease without an end.
        if pull.first_index < 0 or not (pull.wait_s >= 0 and pull.lease_s >= 0):
            return "protocol_error", "a pull needs an index and times that are not negative"
        if pull.owner_incarnation != card.incarnation:
            return "stale_incarnation", f"{card.name} has been started again since"
        if pull.model_digest != card.model_digest:
            return "other_model", "the two instances serve different models"
        if pull.layout_digest != self._layout_digest:
            return "other_layout", f"blocks here are laid out as {card.layout}"
        if not self._common_means(pull):
            has = ", ".join(self._endpoints) or "none"
            return "no_means", f"no means in common (here: {has}; there: {', '.join(pull.means)})"
        if self._scheduler.holds.starved or len(self.live) >= self._max_offers:
            return "no_room", "the instance needs its blocks for its own sequences"
        return None

    def _common_means(self, pull: Pull) -> list[str]:
        """What both sides have, as the receiver prefers it. Pages are mapped on one host."""
        return [
            means
            for means, detail in pull.means.items()
            if means in self._endpoints and (means != "map" or detail == self._card.host != "")
        ]

    def _choose_means(self, pull: Pull, keys: list[bytes]) -> str:
        """The first of them; but nothing is mapped, if it can be copied, unless there is room to
        pin all of it beside what is still to come for others."""
        common = self._common_means(pull)
        if common[0] == "map" and len(common) > 1:
            to_come = sum(
                len(o.hold.keys) - len(o.hold.blocks)
                for o in self.live.values()
                if o.means == "map" and not o.last
            )
            if not self._scheduler.holds.has_room_for_pin(keys, besides=to_come):
                return common[1]
        return common[0]

    # --- as time passes ------------------------------------------------------------------------

    def poll(self, now: float) -> list[Effect]:
        """Offer what has been stored since, say that we live, end leases."""
        effects: list[Effect] = []
        for key, offer in list(self.live.items()):
            if now >= offer.lease_until_s:
                self._end(key)
            elif not offer.last:
                came = self._scheduler.holds.pin_more(offer.hold)
                if self._look_whether_last(offer, now) or came or self._speaks_at_s(offer) <= now:
                    effects += self._tell(offer, now)
        return effects

    def next_s(self) -> float:
        """When to poll at the latest."""
        return min(
            (
                o.lease_until_s if o.last else min(o.lease_until_s, self._speaks_at_s(o))
                for o in self.live.values()
            ),
            default=float("inf"),
        )

    def _speaks_at_s(self, offer: _Offer) -> float:
        return offer.spoke_s + self._speak_s

    def _look_whether_last(self, offer: _Offer, now: float) -> bool:
        """All is here; or nobody here will store what is missing, or not in time, or it cannot be
        pinned."""
        held, keys = len(offer.hold.blocks), offer.hold.keys
        offer.last = (
            held == len(keys)
            or now >= offer.wait_until_s
            or not offer.hold.trusted
            or self._scheduler.holds.is_stuck(offer.hold)
            # The request may be on its way here behind the pull: hold on for a moment.
            or (
                now >= offer.wait_until_s - offer.pull.wait_s + self._speak_s
                and not self._scheduler.will_store(keys[held], held)
            )
        )
        return offer.last

    def _tell(self, offer: _Offer, now: float) -> list[Effect]:
        effects: list[Effect] = []
        offer.spoke_s = now
        while True:
            first = offer.num_told
            end = min(len(offer.hold.blocks), first + _HANDLES_A_MESSAGE)
            end = max(first, end)
            offer.num_told = end
            done = end >= len(offer.hold.blocks)
            effects.append(Send(offer.peer, self._ready(offer, first, end, offer.last and done)))
            if done:
                return effects

    def _ready(self, offer: _Offer, first: int, end: int, last: bool) -> BlocksReady:
        generations = self._scheduler.pool.generations
        return BlocksReady(
            transfer=offer.pull.transfer,
            owner=self._card.name,
            owner_incarnation=self._card.incarnation,
            first_index=first,
            blocks=[
                BlockHandle(block, int(generations[block]), offer.hold.keys[index])
                for index, block in enumerate(offer.hold.blocks[first:end], first)
            ],
            last=last,
            means=offer.means,
            endpoint=self._endpoints[offer.means],
        )

    # --- ends ----------------------------------------------------------------------------------

    def _renew(self, offer: _Offer, now: float) -> None:
        if not self._scheduler.holds.starved:
            offer.lease_until_s = now + min(offer.pull.lease_s, self._max_lease_s)

    def _drop_older(self, peer: str, incarnation: int) -> None:
        """The peer has been started again: what its predecessor read, nobody reads."""
        for key, offer in list(self.live.items()):
            if offer.peer == peer and offer.pull.receiver_incarnation < incarnation:
                self._end(key)

    def _end(self, key: tuple[str, str]) -> None:
        offer = self.live.pop(key, None)
        if offer is not None:
            self._scheduler.holds.release(offer.hold)
