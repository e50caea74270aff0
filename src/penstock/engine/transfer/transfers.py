"""What the receiver's side keeps books of: wants, and the transfers that serve them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from penstock.engine.scheduler.imports import Hold, Import
from penstock.engine.scheduler.sequence import Key, Sequence, State
from penstock.engine.transfer.jobs import Moved, Peer
from penstock.protocol.kv import KvSource, Tier


@dataclass(frozen=True, slots=True)
class ExchangeConfig:
    """Bounds of everything that waits, in seconds, and of everything that is kept."""

    #: A peer that is not heard of for this long, or a job that does not end, is given up.
    stall_s: float = 2.0
    #: A question without an answer is asked again, once.
    retry_s: float = 0.5
    #: How often an owner says that it lives while its peer waits.
    speak_s: float = 0.5
    #: How long what a sequence had behind windows outlives it.
    linger_s: float = 1.0
    #: How long a `Submit` with a source waits for blocks that are still being computed there.
    submit_wait_s: float = 2.0
    #: Of offers made to us; renewed three times within it.
    lease_s: float = 3.0
    #: A `Fetch` may ask for less.
    max_fetch_lease_s: float = 30.0
    max_wants: int = 2048
    max_offers: int = 512
    #: Blocks that one job fills: progress is seen job by job.
    blocks_a_job: int = 128
    #: Stores to slower tiers that run at once, and how far ahead of eviction they look, in blocks.
    max_stores: int = 2
    #: For how many of those that come next tiers are asked.
    load_ahead_seqs: int = 8
    store_ahead_blocks: int = 256


@dataclass(slots=True, eq=False)
class Want:
    """Leading blocks that a sequence, here or to come, wants to find in the cache."""

    key: Key
    attempt: int
    keys: list[bytes]
    source: KvSource | None
    wait_s: float
    began_s: float
    #: None: announced only (`Fetch`), and kept until `lease_until_s`.
    sequence: Sequence | None = None
    lease_until_s: float = 0.0
    num_tokens: int = 0
    #: Does the service want to be told what came?
    tell: bool = False
    hold: Hold | None = None
    done: bool = False
    asked_source: bool = False
    tiers_failed: bool = False
    num_here_first: int | None = None
    num_bytes: int = 0
    came_by: Counter[str] = field(default_factory=Counter)
    reason: str = ""

    @property
    def over(self) -> bool:
        """The sequence has its blocks, or needs none any more."""
        return self.sequence is not None and self.sequence.state is not State.WAITING


@dataclass(slots=True, eq=False)
class Transfer:
    """One import under way, or one whose windows are still in use.

    A peer's: asked for (`Pull`), then offered in runs (`BlocksReady`), each of which becomes jobs.
    A tier's: all of its jobs are given at once.
    """

    name: str
    imp: Import
    wants: list[Want]
    began_s: float
    #: When it last made progress, or its owner spoke.
    news_s: float
    source: KvSource | None = None
    tier: Tier | None = None
    owner: Peer | None = None
    wait_until_s: float = 0.0
    answered: bool = False
    asked_s: float = 0.0
    #: Nothing more is to be offered (or taken).
    complete: bool = False
    importing: bool = True
    reason: str = ""
    jobs: dict[int, tuple[int, int]] = field(default_factory=dict)  # (start, count) by number
    #: Those of `jobs` that wait for steps in flight.
    num_fenced: int = 0
    windows: dict[int, None] = field(default_factory=dict)
    next_ack_s: float = 0.0


@dataclass(slots=True)
class Moves:
    """Totals by means, as `Load` carries them."""

    blocks: int = 0
    failed: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    busy_s: float = 0.0
    _under_way: int = 0
    _changed_s: float = 0.0

    def add(self, blocks: int, failed: int, moved: Moved) -> None:
        self.blocks += blocks
        self.failed += failed
        self.num_bytes += moved.num_bytes
        self.seconds += moved.seconds

    def began(self, now: float) -> None:
        self._change(1, now)

    def ended(self, now: float) -> None:
        self._change(-1, now)

    def _change(self, by: int, now: float) -> None:
        if self._under_way:
            self.busy_s += now - self._changed_s
        self._changed_s = now
        self._under_way += by
