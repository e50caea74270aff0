"""What a core wants done. A core returns these; a driver (or the simulator) carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.protocol.codec import Message


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver `message` to the peer of that name. May be lost; cores must live with it."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Launch:
    """Give a batch to the runner. Batches finish in the order in which they were launched."""

    batch: Any


@dataclass(frozen=True, slots=True)
class Connect:
    """Be able to `Send` to the instance `peer`, which listens at `address`. Told again with another
    address, the old connection is given up; with the same, nothing happens."""

    peer: str
    address: str


@dataclass(frozen=True, slots=True)
class Move:
    """Give a `engine.transfer.jobs.Job` to the data plane; its end comes back as `on_moved`."""

    job: Any


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Call `on_timer` at `at_s` (the core's clock). A later one of the same core replaces it."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """Hand something to whoever made request `request_id` (service side only)."""

    request_id: str
    event: Any


@dataclass(frozen=True, slots=True)
class Stop:
    """The driver should end the process: the core has drained, or (with a `failure`) cannot go on
    and leaves what runs to a successor."""

    failure: str | None = None


Effect = Send | Launch | Connect | Move | SetTimer | Reply | Stop
