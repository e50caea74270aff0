"""Places kept for sequences whose prompts are being computed elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.protocol.effects import Effect, Send
from penstock.protocol.kv import Refused
from penstock.protocol.request import Cancel
from penstock.service import orders
from penstock.service.cluster.instances import Instance
from penstock.service.journal import Entry, Reservation


class Reservations:
    """`instances` are those of placement, as they come and go."""

    def __init__(self, instances: Mapping[str, Instance]) -> None:
        self._instances = instances

    def make(self, entry: Entry, prefill: Instance, decode: Instance) -> list[Effect]:
        """`decode` is to have the prompt's blocks as they are made; it may refuse, and be asked
        all the same when the time has come."""
        ttft_s = entry.record.placements[-1].predicted_ttft_s or 0.0
        fetch = orders.fetch(entry, decode, prefill, ttft_s)
        entry.decode_on = Reservation(decode.name, decode.incarnation, decode.epoch, entry.attempt)
        decode.expects(entry)
        return [] if fetch is None else [Send(decode.name, fetch)]

    def use(self, entry: Entry) -> Instance | None:
        """The prompt is computed. Where its place is, if that is still what it was: then the
        reservation is fulfilled."""
        reserved = entry.decode_on
        target = None if reserved is None else self._instances.get(reserved.instance)
        if reserved is None or target is None or not target.keeps(reserved):
            return None
        self.forget(entry)
        return target

    def refused(self, instance: Instance, refused: Refused) -> None:
        """There was no room. The plan stands on the other side: its row says "handover" when the
        prompt is done, and the policy is asked then."""
        entry = instance.coming.get(refused.request_id or "")
        if entry is not None and entry.attempt == refused.attempt:
            self.forget(entry)

    def cancel(self, entry: Entry) -> list[Effect]:
        """If there is one, tell its instance."""
        reserved = entry.decode_on
        self.forget(entry)
        if reserved is None or reserved.instance not in self._instances:
            return []
        return [Send(reserved.instance, Cancel(entry.key, reserved.attempt))]

    def forget(self, entry: Entry) -> None:
        if entry.decode_on is not None:
            self._instances[entry.decode_on.instance].expects_no_more(entry)
            entry.decode_on = None
