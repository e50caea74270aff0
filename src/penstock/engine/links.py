"""The services attached to an instance: who they are, what they were sent, what they lack.

Rows are counted per service, and a service that leaves too many unacknowledged is out of credit:
its sequences pause, and are freed if that lasts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.sequence import SequenceUpdate
from penstock.protocol.codec import Message
from penstock.protocol.effects import Effect, Send
from penstock.protocol.errors import PenstockError
from penstock.protocol.instance import Attach, InstanceCard
from penstock.protocol.kv import KvChange, KvEvents, Refused
from penstock.protocol.tokens import Credit, PromptLogprobs, TokenRow, Tokens


@dataclass(slots=True)
class Link:
    """One attached service."""

    incarnation: int
    kv_events: bool
    heard_s: float
    sent: int = 0
    acknowledged: int = 0
    kv_sent: int = 0
    stalled_since_s: float | None = None
    unreachable_since_s: float | None = None

    @property
    def outstanding(self) -> int:
        return self.sent - self.acknowledged


class Links:
    def __init__(self, card: InstanceCard, scheduler: Scheduler, credit_window: int) -> None:
        self._card = card
        self._scheduler = scheduler
        self._credit_window = credit_window
        self._links: dict[str, Link] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._links)

    def get(self, service: str) -> Link | None:
        return self._links.get(service)

    def items(self) -> list[tuple[str, Link]]:
        return list(self._links.items())

    def add(self, service: str, link: Link) -> None:
        self._links[service] = link

    def remove(self, service: str) -> None:
        self._links.pop(service, None)

    # --- what they say -------------------------------------------------------------------------

    def heard(self, service: str, message: Message, now: float) -> None:
        link = self._links.get(service)
        if link is None:
            return
        # Whoever would attach with an older incarnation is not the service that has attached: a
        # successor on a clock that was put back, which is let in once its predecessor is silent.
        if not isinstance(message, Attach) or message.incarnation >= link.incarnation:
            link.heard_s = now

    def on_sent(self, service: str, taken: bool, now: float) -> None:
        link = self._links.get(service)
        if link is None or taken == (link.unreachable_since_s is None):
            return
        link.unreachable_since_s = None if taken else now

    def forgive(self, late_s: float) -> None:
        for link in self._links.values():
            link.heard_s += late_s

    def credit(self, service: str, credit: Credit) -> list[Effect]:
        link = self._links.get(service)
        if link is None:
            # A service that only listens would not notice for long that it is not known here.
            return [Send(service, Refused("credit", "attach first", code="not_attached"))]
        if credit.number > link.sent:
            return []
        link.acknowledged = max(link.acknowledged, credit.number)
        if link.stalled_since_s is not None and link.outstanding <= self._credit_window // 2:
            link.stalled_since_s = None
            self._scheduler.resume(service)
        return []

    # --- what they are sent --------------------------------------------------------------------

    def publish(self, updates: Iterable[SequenceUpdate], now: float) -> list[Effect]:
        """One `Tokens` for each service that has rows in `updates`."""
        effects: list[Effect] = []
        rows: dict[str, list[TokenRow]] = {}
        card = self._card
        for update in updates:
            service, request_id = update.sequence.key
            attempt = update.sequence.attempt
            if update.prompt_logprobs:
                chunk = PromptLogprobs(
                    card.name,
                    card.incarnation,
                    request_id,
                    attempt,
                    update.prompt_logprobs_start,
                    update.prompt_logprobs,
                )
                effects.append(Send(service, chunk))
            if not update.ids and update.finish is None:
                continue
            row = TokenRow(
                request_id,
                attempt,
                update.start,
                update.ids,
                update.finish,
                update.stop_token,
                update.logprobs,
                update.cached_tokens,
                update.error,
                _queued_s(update),
            )
            rows.setdefault(service, []).append(row)
        for service, group in rows.items():
            effects += self.send_rows(service, group, now)
        return effects

    def send_rows(self, service: str, rows: list[TokenRow], now: float) -> list[Effect]:
        link = self._links.get(service)
        if link is None:
            return []  # it detached while the step ran; its sequences are already freed
        link.sent += 1
        if link.stalled_since_s is None and link.outstanding >= self._credit_window:
            link.stalled_since_s = now
            self._scheduler.pause(service)
        card = self._card
        return [Send(service, Tokens(card.name, card.incarnation, link.sent, rows))]

    def kv_events(self, changes: list[KvChange]) -> list[Effect]:
        card = self._card
        effects: list[Effect] = []
        for service, link in self._links.items():
            if link.kv_events:
                link.kv_sent += 1
                events = KvEvents(card.name, card.incarnation, link.kv_sent, changes)
                effects.append(Send(service, events))
        return effects


def terminal_row(request_id: str, attempt: int, start: int, error: PenstockError) -> TokenRow:
    return TokenRow(request_id, attempt, start, [], "error", error=error.info())


def _queued_s(update: SequenceUpdate) -> float | None:
    """How long the sequence waited for its first step; said once, with its first token."""
    sequence = update.sequence
    if sequence.arrived_s is None or sequence.started_s is None or not update.ids:
        return None
    waited_s = sequence.started_s - sequence.arrived_s
    sequence.arrived_s = None
    return waited_s
