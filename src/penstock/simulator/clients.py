"""Who makes requests in a world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from penstock.protocol.errors import PenstockError
from penstock.service.generation import TokenDelta


class Client(Protocol):
    """Who made a request."""

    def take(self, delta: TokenDelta) -> None:
        """A reply."""

    def refused(self, error: PenstockError) -> None:
        """`Overloaded`, or `EngineUnavailable` where no service listens."""


@dataclass(slots=True)
class Answer:
    """What the caller of one request saw, by choice."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    finish: dict[int, list[str]] = field(default_factory=dict)

    def take(self, delta: TokenDelta) -> None:
        self.ids.setdefault(delta.choice, []).extend(delta.ids)
        if delta.finish is not None:
            self.finish.setdefault(delta.choice, []).append(delta.finish)

    def refused(self, error: PenstockError) -> None:
        self.finish[0] = [error.info().code]
