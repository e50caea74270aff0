"""What the core asks of the data plane, as plain data: bring blocks in, put blocks out.

The core (`exchange.py`) decides and keeps the books; the data plane (`mover.py`) touches bytes. A
job's blocks are held by the core from before it starts until after its end has been heard, so
nobody else writes to them meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from penstock.protocol.kv import BlockHandle, Tier

#: How blocks of a peer come: its pages are mapped here (same host), or their bytes are copied.
Means = Literal["map", "mooncake", "tcp"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Whose blocks, and how to get at them (`BlocksReady`)."""

    name: str
    incarnation: int
    means: Means
    endpoint: str


@dataclass(frozen=True, slots=True)
class Incoming:
    """Fill `block` with what the peer has at `handle`. With "map", `block` is a window: an id from
    `num_blocks` on, which stands for the peer's own page."""

    handle: BlockHandle
    block: int


@dataclass(frozen=True, slots=True)
class Import:
    """Blocks from a peer. A block counts as come only if its generation has not moved on and, where
    bytes crossed a network, its checksum holds."""

    number: int
    peer: Peer
    blocks: tuple[Incoming, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks from a slower tier (or the shared store) into device blocks: (key, block)."""

    number: int
    tier: Tier
    blocks: tuple[tuple[bytes, int], ...]


@dataclass(frozen=True, slots=True)
class Demotion:
    """`key` leaves `tier`, for the slower tier `to` or for good (None)."""

    key: bytes
    tier: Tier
    to: Tier | None


@dataclass(frozen=True, slots=True)
class Store:
    """Device blocks into a slower tier: (key, block). `before` makes the room there, in order."""

    number: int
    tier: Tier
    blocks: tuple[tuple[bytes, int], ...]
    before: tuple[Demotion, ...] = ()


@dataclass(frozen=True, slots=True)
class LetGo:
    """Windows whose pages nobody here uses any more. Has no end to be told of."""

    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Nobody waits for these jobs any more: those that have not begun end at once, as not ok. Has
    no end of its own."""

    numbers: tuple[int, ...]


Job = Import | Load | Store | LetGo | Abandon


@dataclass(frozen=True, slots=True)
class Moved:
    """The end of a job: for each of its blocks, in order, whether it is there, whole and unspoilt.
    `reason` says why some are not."""

    number: int
    ok: tuple[bool, ...]
    num_bytes: int
    seconds: float
    reason: str = ""
    #: Of a `Store`: what became of each step of its `before`.
    demoted: tuple[bool, ...] = ()


class Mover(Protocol):
    """The data plane of one instance. Jobs run on its own threads, several at once."""

    #: What it can do as a receiver, for `Pull.means`.
    means: dict[str, str]
    #: Where peers find what it offers, by means, for `BlocksReady.endpoint`.
    endpoints: dict[str, str]

    def offer(self, key_of: Callable[[int], bytes | None]) -> None:
        """From now on peers may have blocks: those whose key they say. Before that, none."""

    def start(self, job: Job, done: Callable[[Moved], None]) -> None:
        """`done` is called once, from any thread, whatever happens (never for a `LetGo` or an
        `Abandon`)."""

    def close(self) -> None:
        """Unfinished jobs end as not ok. Returns when no thread touches KV memory any more."""
