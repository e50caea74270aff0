"""Windows: block ids beyond the pool's own, each standing for one page of a peer's pool.

A window is mapped read-only into a slot's range, so no bug here can spoil what a peer computed. Its
owner may still move on: it counts up the page's generation word *before* the content changes. So
whoever reads looks at the generation after the last read, and what was read counts only if it is
still the one that was offered. (A seqlock without the writer's second count, since a page's old
content never comes back. The owner needs no barrier of its own: it counts in the thread that
schedules, and the page is written by another one that was handed the batch through a lock.)
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

_T = TypeVar("_T", bound=np.generic)

Generations = npt.NDArray[np.uint64]

_TOTAL_STORE_ORDER = os.uname().machine in ("x86_64", "i686")
_MEMBARRIER_SYSCALL = 283  # arm64 and riscv64 alike
_PRIVATE_EXPEDITED, _REGISTER_PRIVATE_EXPEDITED = 1 << 3, 1 << 4


class PeerPool(Protocol):
    """A peer's pool and its generation words, open in this process."""

    fd: int
    #: A live view of what the owner writes, uint64 [blocks of its pool].
    generations: Generations


@dataclass(frozen=True, slots=True)
class Page:
    """Block `block` of a peer's pool, as it was at `generation`."""

    pool: PeerPool
    block: int
    generation: int


class Windows:
    """Which page each window shows. `open`, `close` and `moved_on` may come from any thread, but
    the caller knows that no step reads a window that is being opened or closed."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._pages: dict[int, Page] = {}
        # The same by window - first, for whoever checks hundreds after each step.
        self._pools: list[PeerPool | None] = []
        self._num_of_pool: list[int] = []
        self._pool_W = np.zeros(0, dtype=np.int64)
        self._block_W = np.zeros(0, dtype=np.int64)
        self._generation_W = np.zeros(0, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[int]:
        return iter(self._pages)

    def __getitem__(self, window: int) -> Page:
        return self._pages[window]

    def __contains__(self, window: int) -> bool:
        return window in self._pages

    def open(self, window: int, page: Page) -> None:
        assert window >= self._first, f"{window} is a block of our own"
        assert window not in self._pages, f"window {window} is open"
        place = window - self._first
        if place >= len(self._pool_W):
            size = max(64, 2 * place)
            self._pool_W = _grown(self._pool_W, size)
            self._block_W = _grown(self._block_W, size)
            self._generation_W = _grown(self._generation_W, size)
        self._pool_W[place] = self._number(page.pool)
        self._block_W[place] = page.block
        self._generation_W[place] = page.generation
        self._pages[window] = page

    def close(self, window: int) -> None:
        del self._pages[window]
        number = int(self._pool_W[window - self._first])
        self._num_of_pool[number] -= 1
        if not self._num_of_pool[number]:
            self._pools[number] = None

    def moved_on(self, windows_N: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """For each window whether its page is not any more what was offered. What was read from it
        before this call may be used only if it is still so."""
        loads_before_are_done()
        places_N = windows_N - self._first
        pools_N = self._pool_W[places_N]
        moved_N = np.zeros(len(windows_N), dtype=np.bool_)
        for number in np.unique(pools_N):
            pool = self._pools[number]
            assert pool is not None, "a window without a pool"
            here = pools_N == number
            places = places_N[here]
            moved_N[here] = pool.generations[self._block_W[places]] != self._generation_W[places]
        return moved_N

    def _number(self, pool: PeerPool) -> int:
        """Where `pool` stands in `_pools`, with one window more."""
        if pool not in self._pools:
            if None not in self._pools:
                self._pools.append(None)
                self._num_of_pool.append(0)
            self._pools[self._pools.index(None)] = pool
        number = self._pools.index(pool)
        self._num_of_pool[number] += 1
        return number


def _grown(array: npt.NDArray[_T], size: int) -> npt.NDArray[_T]:
    grown = np.zeros(size, dtype=array.dtype)
    grown[: len(array)] = array
    return grown


def loads_before_are_done() -> None:
    """What this process has loaded so far is not from later than what it loads from here on.

    x86 keeps loads (and stores) in order by itself. Elsewhere the kernel is asked for a barrier on
    all processors that run threads of ours, since several of them have read the pages.
    """
    if not _TOTAL_STORE_ORDER:
        _membarrier()


def _membarrier() -> None:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    if syscall(_MEMBARRIER_SYSCALL, _PRIVATE_EXPEDITED, 0, 0) == 0:
        return
    syscall(_MEMBARRIER_SYSCALL, _REGISTER_PRIVATE_EXPEDITED, 0, 0)  # once, before its first use
    if syscall(_MEMBARRIER_SYSCALL, _PRIVATE_EXPEDITED, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"membarrier: {os.strerror(code)}")
