"""Blocks in a Mooncake Store, which instances share: what one has stored another can load.

Every instance lends the store a segment of its memory, and `mooncake_master` knows what is where
and evicts. An object is a header and a block, under a name that says model and layout; what comes
back is believed only if the header names the key and the checksum holds. An object that is missing,
empty or of another length is a miss.

The library's calls block for seconds while the master is away, its setup for minutes. So a thread
of their own makes them, one at a time, and is waited for with a bound; after that the store counts
as away and is not asked for a while.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from penstock.engine.memory.tiers.data import Block
from penstock.engine.memory.tiers.header import HEADER_BYTES, Header, why_not
from penstock.protocol.errors import ConfigError

log = logging.getLogger(__name__)

DEFAULT_MASTER_PORT = 50051
_STAGING_BYTES = 32 << 20
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where the store is, and what this instance brings to it.

    As a URL: `mooncake://master:50051?segment_bytes=1073741824&protocol=tcp&device=&host=`.
    `host` is where other instances reach this one; by default its address towards the master.
    """

    master: str
    port: int = DEFAULT_MASTER_PORT
    segment_bytes: int = 1 << 30
    protocol: str = "tcp"
    device: str = ""
    host: str = ""
    #: Longest wait for one batch, then the store counts as away for `retry_s`.
    timeout_s: float = 2.0
    retry_s: float = 15.0

    @staticmethod
    def parse(url: str) -> StoreConfig:
        """Raises `ConfigError`."""
        parts = urlsplit(url)
        try:
            port = parts.port or DEFAULT_MASTER_PORT
            given = dict(parse_qsl(parts.query, keep_blank_values=True))
        except ValueError as exc:
            raise ConfigError(f"--kv-store {url}: {exc}") from exc
        if parts.scheme != "mooncake" or not parts.hostname or parts.path not in ("", "/"):
            raise ConfigError(f"--kv-store {url}: give mooncake://host:port")
        settings: dict[str, Any] = {
            k: given.pop(k) for k in ("protocol", "device", "host") if k in given
        }
        try:
            if "segment_bytes" in given:
                settings["segment_bytes"] = int(given.pop("segment_bytes"))
        except ValueError as exc:
            raise ConfigError(f"--kv-store {url}: segment_bytes must be a number") from exc
        if given:
            raise ConfigError(f"--kv-store {url}: there is no setting {next(iter(given))}")
        return StoreConfig(parts.hostname, port, **settings)


class ObjectStore(Protocol):
    """What is used of `mooncake.store.MooncakeDistributedStore`."""

    def register_buffer(self, address: int, size: int) -> int: ...
    def batch_is_exist(self, keys: list[str]) -> list[int]: ...
    def batch_put_from(
        self, keys: list[str], addresses: list[int], sizes: list[int]
    ) -> list[int]: ...
    def batch_get_into(
        self, keys: list[str], addresses: list[int], sizes: list[int]
    ) -> list[int]: ...
    def remove(self, key: str) -> int: ...
    def close(self) -> int: ...


def connect(config: StoreConfig) -> ObjectStore:
    """Join the store. Raises `OSError` where the master cannot be reached."""
    # The library's own attempts would go on for a minute and a half.
    with socket.create_connection((config.master, config.port), config.timeout_s) as link:
        local_host = config.host or link.getsockname()[0]
    os.environ.setdefault("GLOG_minloglevel", "3")  # it reports misses as errors
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    code = store.setup(
        local_host, "P2PHANDSHAKE", config.segment_bytes, 2 * _STAGING_BYTES,
        config.protocol, config.device, f"{config.master}:{config.port}",
    )  # fmt: skip
    if code != 0:
        raise OSError(f"Mooncake Store refused the setup (code {code})")
    return store


class StoreTier:
    """See `TierData`; `drop` does nothing, since what is there belongs to all."""

    def __init__(
        self,
        config: StoreConfig,
        block_bytes: int,
        namespace: str,
        connect: Callable[[StoreConfig], ObjectStore] = connect,
    ) -> None:
        """`namespace` stands for model and layout. Raises `ConfigError` without the library; that
        the store cannot be reached is no error: it is tried again."""
        if connect is globals()["connect"]:
            _require_library()
        self._config = config
        self._block_bytes = block_bytes
        self._namespace = namespace
        self._connect = connect
        self._store: ObjectStore | None = None
        object_bytes = HEADER_BYTES + block_bytes
        num_staged = max(1, min(64, _STAGING_BYTES // object_bytes))
        self._staged = np.zeros((num_staged, object_bytes), np.uint8)
        self._one_at_a_time = threading.Lock()
        self._worker = _Worker()
        self._away_until_s = 0.0
        self._was_away = False
        self._spoilt_told = False
        with self._one_at_a_time:
            self._ready()

    def load(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        """The leading ones that are there: of a prefix, what stands behind a hole is of no use."""
        ok: list[bool] = []
        with self._one_at_a_time:
            while len(ok) < len(blocks) and all(ok):
                ok += self._get(blocks[len(ok) : len(ok) + len(self._staged)])
        return ok + [False] * (len(blocks) - len(ok))

    def _get(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        """Asks first what is there, so that a miss costs a round trip and moves nothing."""
        names = [self._name(key) for key, _ in blocks]
        there = self._call(lambda store: store.batch_is_exist(names)) or []
        names = names[: next((i for i, code in enumerate(there) if code != 1), len(there))]
        sizes: list[int] | None = None
        if names:
            where = self._buffers(len(names))
            sizes = self._call(lambda store: store.batch_get_into(names, *where))
        ok = [
            self._take_in(staged, size, key, destination)
            for staged, size, (key, destination) in zip(self._staged, sizes or [], blocks)
        ]
        return ok + [False] * (len(blocks) - len(ok))

    def _take_in(self, staged: Block, size: int, key: bytes, destination: Block) -> bool:
        if size != staged.nbytes:
            return False  # evicted meanwhile, empty, or somebody's whose blocks are larger
        np.copyto(destination, staged[HEADER_BYTES:])
        why = why_not(staged[:HEADER_BYTES].tobytes(), key, destination)
        if why:
            if not self._spoilt_told:
                log.warning("from the KV store %s: %s; it is computed", self._config.master, why)
                self._spoilt_told = True
            self._call(lambda store: store.remove(self._name(key)))
        return not why

    def store(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        ok: list[bool] = []
        with self._one_at_a_time:
            while len(ok) < len(blocks):
                ok += self._put(blocks[len(ok) : len(ok) + len(self._staged)])
        return ok

    def _put(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        if not self._ready():
            return [False] * len(blocks)
        for staged, (key, source) in zip(self._staged, blocks):
            staged[:HEADER_BYTES] = np.frombuffer(Header.of(key, source).pack(), np.uint8)
            np.copyto(staged[HEADER_BYTES:], source)
        names = [self._name(key) for key, _ in blocks]
        codes = self._call(lambda store: store.batch_put_from(names, *self._buffers(len(names))))
        return [code == 0 for code in codes] if codes else [False] * len(blocks)

    def drop(self, key: bytes) -> None:
        pass

    def close(self) -> None:
        """Leaves the store, if it can be had at once; its segment is gone with the process."""
        with self._one_at_a_time:
            if self._store is not None:
                self._call(lambda store: store.close())
            self._away_until_s = float("inf")
            self._worker.end()

    def _name(self, key: bytes) -> str:
        return f"penstock/{self._namespace}/{key.hex()}"

    def _buffers(self, count: int) -> tuple[list[int], list[int]]:
        """Addresses and sizes of the first staging buffers."""
        size = self._staged[0].nbytes
        first = self._staged.ctypes.data
        return [first + i * size for i in range(count)], [size] * count

    # ---- the library, at arm's length -----------------------------------------------------

    def _ready(self) -> bool:
        """Is the store there, as far as we know?"""
        if time.monotonic() < self._away_until_s or self._worker.busy:
            return False
        if self._store is None:
            return self._call_worker(self._join, 5 * self._config.timeout_s) is not None
        return True

    def _join(self) -> bool:
        store = self._connect(self._config)
        code = store.register_buffer(self._staged.ctypes.data, self._staged.nbytes)
        if code != 0:
            raise OSError(f"Mooncake Store did not take a buffer (code {code})")
        self._store = store
        return True

    def _call(self, ask: Callable[[ObjectStore], _R]) -> _R | None:
        """None: the store is away."""
        if not self._ready():
            return None
        store = self._store
        assert store is not None
        result = self._call_worker(lambda: ask(store), self._config.timeout_s)
        if isinstance(result, list) and result and all(code == _RPC_FAILED for code in result):
            self._went_away("its master does not answer")
            return None
        return result

    def _call_worker(self, task: Callable[[], _R], timeout_s: float) -> _R | None:
        try:
            result = self._worker.call(task, timeout_s)
        except (OSError, TimeoutError) as exc:
            self._went_away(str(exc) or "no answer in time")
            return None
        if self._was_away:
            self._was_away = False
            log.info("the KV store at %s is there again", self._config.master)
        return result

    def _went_away(self, why: str) -> None:
        self._away_until_s = time.monotonic() + self._config.retry_s
        if not self._was_away:
            self._was_away = True
            log.warning("the KV store at %s is away: %s", self._config.master, why)


#: The library's code for "the master could not be asked".
_RPC_FAILED = -900


class _Worker:
    """A thread that makes one call after the other; the caller may stop waiting for one."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kv-store", daemon=True)
        self._thread.start()
        self.busy = False

    def call(self, task: Callable[[], _R], timeout_s: float) -> _R:
        """Raises what the task raises, and `TimeoutError`; then `busy` until it has ended."""
        done = threading.Event()
        results: list[_R] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(task())
            except BaseException as exc:  # the caller raises it
                errors.append(exc)
            self.busy = False
            done.set()

        self.busy = True
        self._tasks.put(run)
        if not done.wait(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        if errors:
            raise errors[0]
        return results[0]

    def end(self) -> None:
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def _require_library() -> None:
    try:
        import mooncake.store  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            "--kv-store needs the Mooncake transfer engine: pip install penstock[mooncake] "
            f"(and Debian's libibverbs1): {exc}"
        ) from exc
