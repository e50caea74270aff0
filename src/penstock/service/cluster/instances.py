"""Instances as the service sees them: their life, their load, and who runs where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from penstock.protocol.instance import CostModel, InstanceCard, Load
from penstock.service.journal import Entry
from penstock.service.policies.routing import ROLES, ClusterView, Floats

#: connecting: known, not attached yet · active: takes work · suspect: silent, takes no new work ·
#: lost: its sequences have been placed elsewhere or wait for an instance
InstanceState = Literal["connecting", "active", "suspect", "lost"]


@dataclass(slots=True)
class Instance:
    name: str
    state: InstanceState = "connecting"
    card: InstanceCard | None = None
    load: Load | None = None
    heard_s: float = 0.0
    next_attach_s: float = 0.0
    attach_tries: int = 0
    #: Why it may not be used ("" if it may): another protocol version, another model.
    refusal: str = ""
    #: It finishes what it has and takes nothing new.
    draining: bool = False
    #: Number of the last `Tokens` message taken in, and the last one acknowledged by a Credit.
    tokens_seen: int = 0
    tokens_credited: int = 0
    credit_sent_s: float = 0.0
    resync_sent_s: float | None = None
    resync_nonce: int = 0
    #: Prompt tokens whose sequences have had no token yet, and sequences that have.
    queued_tokens: int = 0
    running: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def incarnation(self) -> int:
        return self.card.incarnation if self.card else 0

    def heard(self, now: float) -> None:
        self.heard_s = now
        if self.state == "suspect":
            self.state = "active"

    def attached(self, card: InstanceCard, now: float) -> None:
        self.card = card
        self.state = "active"
        self.refusal = ""
        self.draining = False
        self.attach_tries = 0
        self.heard(now)

    def place(self, entry: Entry) -> None:
        entry.instance = self.name
        entry.queued_tokens = entry.num_tokens
        self.entries[entry.key] = entry
        self.queued_tokens += entry.queued_tokens

    def started(self, entry: Entry) -> None:
        """The first token of this placement has come."""
        self.queued_tokens -= entry.queued_tokens
        self.running += 1
        entry.queued_tokens = 0

    def unplace(self, entry: Entry) -> None:
        del self.entries[entry.key]
        if entry.queued_tokens:
            self.queued_tokens -= entry.queued_tokens
        else:
            self.running -= 1
        entry.instance = None
        entry.queued_tokens = 0


def view_of(instances: Iterable[Instance]) -> ClusterView:
    """The instances that take new work, as arrays for the policies."""
    active = [i for i in instances if i.state == "active" and not i.draining]
    costs = [i.load.cost if i.load else CostModel() for i in active]
    cards = [i.card for i in active if i.card is not None]
    assert len(cards) == len(active), "an active instance has shown its card"
    hosts: dict[str, int] = {}

    def column(values: Iterable[float]) -> Floats:
        return np.array(list(values), dtype=np.float64)

    def free_blocks(instance: Instance) -> float:
        load = instance.load
        return float(load.kv_blocks_total - load.kv_blocks_used) if load else np.inf

    return ClusterView(
        names=tuple(i.name for i in active),
        roles=np.array([ROLES.index(i.load.role if i.load else "any") for i in active]),
        queued_tokens=column(i.queued_tokens for i in active),
        queued=column(len(i.entries) - i.running for i in active),
        running=column(i.running for i in active),
        running_tokens=column(i.load.running_tokens if i.load else 0 for i in active),
        step_left_s=column(i.load.step_end_in_s if i.load else 0.0 for i in active),
        base_s=column(c.base_s for c in costs),
        per_token_s=column(c.per_token_s for c in costs),
        per_row_s=column(c.per_row_s for c in costs),
        per_context_token_s=column(c.per_context_token_s for c in costs),
        per_attention_s=column(c.per_attention_s for c in costs),
        residual_s=column(c.residual_s for c in costs),
        num_steps=column(c.num_steps for c in costs),
        ttft_ratio=column(1.0 for _ in active),
        step_tokens=column(card.max_num_batched_tokens for card in cards),
        max_running=column(card.max_num_seqs for card in cards),
        free_blocks=column(free_blocks(i) for i in active),
        total_blocks=column(card.num_blocks for card in cards),
        hosts=np.array([hosts.setdefault(card.host, len(hosts)) for card in cards]),
    )
