"""The data plane of one instance: threads that bring blocks in and put blocks out (`jobs.Mover`).

Copies run beside compute: they let go of the interpreter, and nobody else writes to a job's blocks
while it runs. Tiers and mapped pages have threads of their own, so that a peer that makes us wait
holds up no load from memory and no mapping; and of those that copy from peers, some are always left
for others (`threads.py`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from penstock.engine.memory.tiers.data import NO_TIER_DATA, Tiers
from penstock.engine.memory.windows import Page
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.transfer import tcp
from penstock.engine.transfer.jobs import (
    Abandon,
    Import,
    Incoming,
    Job,
    LetGo,
    Load,
    Means,
    Moved,
    Peer,
    Store,
)
from penstock.engine.transfer.mooncake import Mooncake, MooncakeEndpoint
from penstock.engine.transfer.pages import (
    CannotAttach,
    PageServer,
    PeerPages,
    PoolHeader,
    attach,
    host_id,
)
from penstock.engine.transfer.server import BlockServer, Served
from penstock.engine.transfer.threads import Threads

log = logging.getLogger(__name__)

_Done = Callable[[Moved], None]
_COPY_THREADS = 4
_COPIES_OF_A_PEER = 3
_TIER_THREADS = 2
_IDLE_CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class MoverConfig:
    """`means` in the order of preference; `host` is where peers reach this instance."""

    means: tuple[Means, ...] = ("map", "tcp")
    host: str = "127.0.0.1"
    #: Known to every instance that may fetch from another host.
    secret: bytes = b""
    mooncake_protocol: str = "tcp"


class DataPlane:
    """See `jobs.Mover`. Opens what the means need, and closes it; also `tiers`."""

    def __init__(
        self,
        memory: XTensorMemory,
        header: PoolHeader,
        config: MoverConfig,
        tiers: Tiers = NO_TIER_DATA,
    ) -> None:
        """Raises `ConfigError` for means that cannot work here."""
        self.means: dict[str, str] = {}
        self.endpoints: dict[str, str] = {}
        self._memory = memory
        self._header = header
        self._config = config
        self._tiers = tiers
        self._closing = False
        self._key_of: Callable[[int], bytes | None] = _nothing
        self._connections = _Connections(memory.layout.block_bytes, config.secret)
        self._windows = _PeerWindows(memory, header.identity.layout_digest)
        self._undo = contextlib.ExitStack()
        #: Numbers of jobs that wait for a thread.
        self._waiting: dict[int, None] = {}
        self._copiers = Threads(_COPY_THREADS, "kv-import", _COPIES_OF_A_PEER)
        self._mapper = Threads(1, "kv-map")
        self._tier_threads = Threads(_TIER_THREADS, "kv-tier")
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._undo.close)
            self._open(memory, header, config)
            on_failure.pop_all()

    def _open(self, memory: XTensorMemory, header: PoolHeader, config: MoverConfig) -> None:
        if "map" in config.means:
            pages = PageServer(memory.fd, header)
            self._undo.callback(pages.close)
            self.means["map"], self.endpoints["map"] = host_id(), pages.endpoint
        if not {"tcp", "mooncake"} & {*config.means}:
            return
        incarnation, block_bytes = header.identity.incarnation, memory.layout.block_bytes
        served = Served(
            memory.block_bytes,
            header.generations,
            incarnation,
            block_bytes,
            lambda block: self._key_of(block),
        )
        server = BlockServer(served, config.host, config.secret)
        self._undo.callback(server.close)
        for means in config.means:
            if means == "tcp":
                self.means["tcp"], self.endpoints["tcp"] = "", server.endpoint
            if means == "mooncake":
                protocol = config.mooncake_protocol
                self._mooncake = Mooncake(memory.bytes, config.host, protocol, server.endpoint)
                self._undo.callback(self._mooncake.close)
                self.means["mooncake"] = protocol
                self.endpoints["mooncake"] = self._mooncake.endpoint

    def offer(self, key_of: Callable[[int], bytes | None]) -> None:
        self._key_of = key_of

    # --- jobs ----------------------------------------------------------------------------------

    def start(self, job: Job, done: _Done) -> None:
        match job:
            case LetGo():
                # On the thread that opens windows, so that what is asked for later comes later.
                self._mapper.put(partial(self._let_go, job))
            case Abandon():
                for number in job.numbers:
                    self._waiting.pop(number, None)
            case Import():
                threads = self._mapper if job.peer.means == "map" else self._copiers
                self._queue(threads, job, done, self._import, job.peer)
            case Load():
                self._queue(self._tier_threads, job, done, self._load)
            case Store():
                self._queue(self._tier_threads, job, done, self._store)

    def _queue(
        self,
        threads: Threads,
        job: Import | Load | Store,
        done: _Done,
        work: _Work,
        peer: Peer | None = None,
    ) -> None:
        self._waiting[job.number] = None
        threads.put(partial(self._run, job, done, work), peer)

    def _let_go(self, job: LetGo, _reason: str) -> str:
        self._windows.close_windows(job.windows)
        return ""

    def _run(self, job: Import | Load | Store, done: _Done, work: _Work, spoilt_by: str) -> str:
        """See `threads.Work`."""
        started_s = time.perf_counter()
        outcome = _Outcome([False] * len(job.blocks))
        is_wanted = self._waiting.pop(job.number, job) is None
        peer_failed = False
        try:
            if self._closing:
                outcome.reason = "the instance is closing"
            elif not is_wanted:
                outcome.reason = "nobody waits for it any more"
            elif spoilt_by:
                outcome.reason = spoilt_by
            else:
                work(job, outcome)
        except (tcp.TransferFailed, CannotAttach) as exc:
            outcome.reason = str(exc)
            peer_failed = True
        except Exception as exc:
            log.exception("job %d failed", job.number)
            outcome.reason = f"{type(exc).__name__}: {exc}"
        if not all(outcome.ok) and not outcome.reason:
            outcome.reason = "some blocks were not what was asked for any more"
        num_bytes = sum(outcome.ok) * self._memory.layout.block_bytes if outcome.copied else 0
        seconds = time.perf_counter() - started_s
        ok = tuple(outcome.ok)
        done(Moved(job.number, ok, num_bytes, seconds, outcome.reason, tuple(outcome.demoted)))
        return outcome.reason if peer_failed else ""

    def _import(self, job: Import, outcome: _Outcome) -> None:
        if job.peer.means == "map":
            outcome.copied = False
            self._windows.open_windows(job, outcome.ok)
            return
        mooncake = job.peer.means == "mooncake"
        endpoint = job.peer.endpoint
        if mooncake:
            endpoint = MooncakeEndpoint.parse(endpoint).server
        with self._connections.to(endpoint, job.peer.incarnation) as connection:
            if mooncake:
                self._mooncake.fetch(job, self._destination, connection, outcome.ok)
            else:
                blocks = [(each.handle, self._destination(each)) for each in job.blocks]
                connection.fetch(blocks, outcome.ok)

    def _destination(self, incoming: Incoming) -> tcp.Bytes:
        return self._memory.block_bytes(incoming.block)

    def _load(self, job: Load, outcome: _Outcome) -> None:
        blocks = [(key, self._memory.block_bytes(block)) for key, block in job.blocks]
        outcome.ok = self._tiers.load(job.tier, blocks)

    def _store(self, job: Store, outcome: _Outcome) -> None:
        blocks = [(key, self._memory.block_bytes(block)) for key, block in job.blocks]
        outcome.ok, outcome.demoted = self._tiers.store(job.tier, blocks, job.before)

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._connections.close()
        self._copiers.close()
        self._mapper.close()
        self._tier_threads.close()
        self._undo.close()
        self._tiers.close()
        self._windows.close()
        self._header.close()


def _nothing(block: int) -> bytes | None:
    """The key of every block while there are none."""
    return None


@dataclass(slots=True)
class _Outcome:
    ok: list[bool]
    reason: str = ""
    copied: bool = True
    demoted: tuple[bool, ...] | list[bool] = ()


_Work = Callable[[Any, _Outcome], None]


class _PeerWindows:
    """Peers whose pages are mapped here, each attached as long as a window shows one. For one
    thread, but for `close`, which comes after its end."""

    def __init__(self, memory: XTensorMemory, layout_digest: str) -> None:
        self._memory = memory
        self._layout_digest = layout_digest
        self._attached: dict[tuple[str, int], PeerPages] = {}
        self._peer_of: dict[int, tuple[str, int]] = {}  # by open window
        self._num_windows: Counter[tuple[str, int]] = Counter()

    def open_windows(self, job: Import, ok: list[bool]) -> None:
        """Raises `CannotAttach`."""
        key = (job.peer.endpoint, job.peer.incarnation)
        pages = self._attached.get(key) or self._attach(key)
        try:
            for i, incoming in enumerate(job.blocks):
                handle = incoming.handle
                in_pool = 0 <= handle.block < pages.identity.num_blocks
                if in_pool and int(pages.generations[handle.block]) == handle.generation:
                    page = Page(pages, handle.block, handle.generation)
                    self._memory.open_window(incoming.block, page)
                    self._peer_of[incoming.block] = key
                    self._num_windows[key] += 1
                    ok[i] = True
        finally:
            self._part_unless_used(key)

    def close_windows(self, windows: tuple[int, ...]) -> None:
        open_now = [w for w in windows if w in self._peer_of]
        self._memory.close_windows(open_now)
        for window in open_now:
            key = self._peer_of.pop(window)
            self._num_windows[key] -= 1
            self._part_unless_used(key)

    def close(self) -> None:
        """The descriptors; what is mapped stays until the memory is closed."""
        for pages in self._attached.values():
            pages.close()
        self._attached.clear()

    def _attach(self, key: tuple[str, int]) -> PeerPages:
        endpoint, incarnation = key
        self._attached[key] = attach(  # it may make us wait
            endpoint,
            incarnation=incarnation,
            layout_digest=self._layout_digest,
            block_stride_bytes=self._memory.block_stride_bytes,
        )
        return self._attached[key]

    def _part_unless_used(self, key: tuple[str, int]) -> None:
        if not self._num_windows[key]:
            del self._num_windows[key]
            self._attached.pop(key).close()


class _Connections:
    """To the block servers of peers: those in use, and some that wait to be used again."""

    def __init__(self, block_bytes: int, secret: bytes) -> None:
        self._block_bytes = block_bytes
        self._secret = secret
        self._idle: list[tuple[tuple[str, int], tcp.Connection]] = []
        self._busy: list[tcp.Connection] = []
        self._changes = threading.Lock()
        self._closed = False

    @contextlib.contextmanager
    def to(self, endpoint: str, incarnation: int) -> Iterator[tcp.Connection]:
        """Raises `TransferFailed`."""
        key = (endpoint, incarnation)
        connection = self._take(key)
        if connection is None:
            expected = tcp.Expected(incarnation, self._block_bytes)
            connection = tcp.Connection(endpoint, expected, self._secret)
        with self._changes:
            self._busy.append(connection)
            if self._closed:
                connection.close()
        try:
            yield connection
        except BaseException:
            self._done(connection, None)
            raise
        self._done(connection, key)

    def _take(self, key: tuple[str, int]) -> tcp.Connection | None:
        while True:
            with self._changes:
                found = next((each for each in self._idle if each[0] == key), None)
                if found is None:
                    return None
                self._idle.remove(found)
            if found[1].is_quiet():
                return found[1]
            found[1].close()

    def _done(self, connection: tcp.Connection, key: tuple[str, int] | None) -> None:
        """With a key it may be used again."""
        with self._changes:
            self._busy.remove(connection)
            if key is not None and not self._closed:
                self._idle.append((key, connection))
                if len(self._idle) <= _IDLE_CONNECTIONS:
                    return
                connection = self._idle.pop(0)[1]
        connection.close()

    def close(self) -> None:
        """Whoever waits for a peer stops waiting."""
        with self._changes:
            self._closed = True
            for connection in self._busy:
                connection.cut()
            idle = [each for _, each in self._idle]
            self._idle.clear()
        for connection in idle:
            connection.close()
