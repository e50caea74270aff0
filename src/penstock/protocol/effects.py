"""What a core wants done. A core returns these; a driver (or the simulator) carries them out."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.protocol.codec import Message


class Send(msgspec.Struct, frozen=True):
    """Deliver `message` to the peer of that name. May be lost; cores must live with it."""

    peer: str
    message: Message


class Launch(msgspec.Struct, frozen=True):
    """Give a batch to the runner. Batches finish in the order in which they were launched."""

    batch: Any


class Shorten(msgspec.Struct, frozen=True):
    """Something came that should not wait: end the run `step`, the batch launched last, with the
    step under way, or with the next one where that is due within `ahead_s`, since it would have
    been given to the device by now. How many steps that makes is told at once
    (`InstanceCore.on_shortened`)."""

    step: int
    ahead_s: float


class Connect(msgspec.Struct, frozen=True):
    """Be able to `Send` to the instance `peer`, which listens at `address`. Told again with another
    address, the old connection is given up; with the same, nothing happens."""

    peer: str
    address: str


class Move(msgspec.Struct, frozen=True):
    """Give a `engine.transfer.jobs.Job` to the data plane; its end comes back as `on_moved`."""

    job: Any


class SetTimer(msgspec.Struct, frozen=True):
    """Call `on_timer` at `at_s` (the core's clock). A later one of the same core replaces it."""

    at_s: float


class Reply(msgspec.Struct, frozen=True):
    """Hand something to whoever made request `request_id` (service side only)."""

    request_id: str
    event: Any


class Stop(msgspec.Struct, frozen=True):
    """The driver should end the process: the core has drained, or (with a `failure`) cannot go on
    and leaves what runs to a successor."""

    failure: str | None = None


Effect = Send | Launch | Shorten | Connect | Move | SetTimer | Reply | Stop
