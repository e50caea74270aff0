"""xTensor memory on a CPU: virtually contiguous sequences over one pool of physical blocks.

The pool is a memfd whose pages are allocated at once, so that it either fits or fails at the start,
and touched by a thread of its own while the model loads (a first touch zeroes the page, and costs
far more where a hypervisor has yet to find the memory). Each slot reserves an address range
as long as the longest sequence; `map` lays a block of the memfd over its place in that range, so
that kernels walk a sequence by a constant stride and two slots share a block by mapping it twice.
The idea is the xLLM technical report's (xTensor); the driver's virtual memory API does on a GPU
what mmap does here.

A mapping outlives its sequence: blocks tend to come back to the same place, and then `map` costs a
table lookup instead of a system call. `map_ahead` brings that about on purpose: a thread beside
compute lays a block where the next step will want it (premap.py says when it may). Only when the
kernel's limit on mappings of a process (vm.max_map_count) comes near are mappings that no live
sequence uses taken down.

Ids from `num_blocks` on are *windows* (windows.py): pages of a peer's pool, which is a file like
ours, mapped read-only into a range like any block.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from penstock.engine.memory.base import ContiguousAccess
from penstock.engine.memory.sizing import (
    GIB,
    HUGE_PAGE_BYTES,
    available_memory_bytes,
    block_shape,
    block_stride_bytes,
    torch_dtype,
)
from penstock.engine.memory.windows import Page, Windows
from penstock.protocol.errors import EngineFailed, NotEnoughMemory
from penstock.protocol.instance import NO_MAPS, MapCounts
from penstock.protocol.kv import KvLayout

_UNMAPPED = -1
_CLOSED = -2  # unmapped, because the window that was here has been closed
#: Touched at a time: other mappings of this process wait for no longer than this takes.
_TOUCH_BYTES = 4 << 20
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_PROT_NONE = 0
# Linux values that Python's mmap module does not name (the same on x86-64 and arm64).
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_POPULATE = 0x8000
_MADV_HUGEPAGE = 14
_RESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


#: Of a place in a range: the pool's inode, how it may be accessed, and which block of it it is.
_Mapping = tuple[str, str, int]


class XTensorMemory(ContiguousAccess):
    """See `KvMemory`. Raises `NotEnoughMemory` when the pool does not fit the machine.

    `max_mappings` bounds the mappings kept; by default three quarters of vm.max_map_count, which
    leaves the rest of the process its share.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        num_slots: int,
        max_blocks_per_slot: int,
        *,
        max_mappings: int | None = None,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device("cpu")
        self.block_stride_bytes = block_stride_bytes(layout)
        self._num_slots = num_slots
        self._max_blocks_per_slot = max_blocks_per_slot
        self._max_mappings = max_mappings or _max_map_count() * 3 // 4
        self._range_bytes = max_blocks_per_slot * self.block_stride_bytes
        self._pool_bytes = num_blocks * self.block_stride_bytes
        #: Pages of peers that may be mapped.
        self.windows = Windows(first=num_blocks)
        #: [slot, index] -> the block or window that is mapped there, live or left over.
        self._table = np.full((num_slots, max_blocks_per_slot), _UNMAPPED, dtype=np.int32)
        #: Blocks at and beyond this index of a slot belong to no live sequence.
        self._live = [0] * num_slots
        self.num_mapped = 0  # blocks mapped into ranges, live and left over
        self.num_syscalls = 0  # spent on mapping and unmapping
        self.maps = NO_MAPS
        #: The table and the kernel's list change together.
        self._changing = threading.Lock()
        self._open()

    def _open(self) -> None:
        self.fd = _prefaulted_memfd(self._pool_bytes)
        self._pool_base = _mmap(None, self._pool_bytes, _READ_WRITE, mmap.MAP_SHARED, self.fd, 0)
        self._reserved_bytes = self._num_slots * self._range_bytes
        self._ranges_base = _mmap(None, self._reserved_bytes, _PROT_NONE, _RESERVE, -1, 0)
        if self.block_stride_bytes % HUGE_PAGE_BYTES == 0:
            # Advice only: without shmem huge pages the kernel declines and nothing is lost.
            _libc.madvise(self._pool_base, self._pool_bytes, _MADV_HUGEPAGE)
        self._pool = self._view(self._pool_base, self.num_blocks)
        buffer = (ctypes.c_char * self._pool_bytes).from_address(self._pool_base)
        strides = np.frombuffer(memoryview(buffer), np.uint8).reshape(self.num_blocks, -1)
        #: Our own blocks as bytes [num_blocks, layout.block_bytes], a view of the pool.
        self.bytes = strides[:, : self.layout.block_bytes]
        self._closing = threading.Event()
        self._toucher = threading.Thread(target=self._touch, name="kv-prefault", daemon=True)
        self._toucher.start()
        self._slots = [
            self._view(self.base(slot), self._max_blocks_per_slot)
            for slot in range(self._num_slots)
        ]

    def map(self, slot: int, index: int, block: int) -> None:
        with self._changing:
            self._check_known(block)
            if self._table[slot, index] != block:
                started_s = time.perf_counter()
                if self._is_full(slot, index):
                    self._unmap_stale()
                self._lay(slot, index, block, populate=False)
                taken_s = time.perf_counter() - started_s
                n = self.maps
                self.maps = MapCounts(n.ahead, n.ahead_s, n.at_start + 1, n.at_start_s + taken_s)
            self._live[slot] = max(self._live[slot], index + 1)

    def map_ahead(self, slot: int, index: int, block: int) -> None:
        """Make a `map` that is to come cheap; from any thread. It changes nothing that `base` and
        the slot's sequence may rely on: the caller knows that no step under way uses the place.

        A hint: where mappings are scarce or the kernel refuses, it is left to `map`.
        """
        with self._changing:
            self._check_known(block)
            if self._table[slot, index] == block or self._is_full(slot, index):
                return
            started_s = time.perf_counter()
            try:
                self._lay(slot, index, block, populate=True)
            except (OSError, EngineFailed):
                self._vacate(slot, index)
                return
            taken_s = time.perf_counter() - started_s
            n = self.maps
            self.maps = MapCounts(n.ahead + 1, n.ahead_s + taken_s, n.at_start, n.at_start_s)

    def _is_full(self, slot: int, index: int) -> bool:
        """Would another mapping here be one too many?"""
        return (
            self._table[slot, index] < 0 and self.num_mapped + self._num_slots >= self._max_mappings
        )

    def _check_known(self, block: int) -> None:
        known = 0 <= block < self.num_blocks or block in self.windows
        assert known, f"block {block} of {self.num_blocks} and {len(self.windows)} windows"

    def _lay(self, slot: int, index: int, block: int, populate: bool) -> None:
        """Of our own blocks every page is entered at once. Those of a window may be left to their
        readers: a read fault brings in its neighbours, and the threads of a kernel share them."""
        fd, place, prot, flags = self.fd, block, _READ_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        if block >= self.num_blocks:
            page = self.windows[block]
            fd, place, prot = page.pool.fd, page.block, mmap.PROT_READ
        if populate or block < self.num_blocks:
            flags |= _MAP_POPULATE
        self.num_syscalls += 1
        stride = self.block_stride_bytes
        _mmap(self.base(slot) + index * stride, stride, prot, flags, fd, place * stride)
        self.num_mapped += int(self._table[slot, index] < 0)
        self._table[slot, index] = block

    def _vacate(self, slot: int, index: int) -> None:
        """After a refused mapping, when it is not known whether the old one still stands: let `map`
        lay it anew. Where it does not there may be a hole in the reservation, into which any mmap
        of this process might fall, so it is closed if the kernel lets us."""
        self.num_mapped -= int(self._table[slot, index] >= 0)
        self._table[slot, index] = _UNMAPPED
        with contextlib.suppress(OSError, EngineFailed):
            self._reserve(slot, index, 1)

    def _reserve(self, slot: int, index: int, count: int) -> None:
        """Lay the empty reservation over `count` places."""
        self.num_syscalls += 1
        _mmap(
            self.base(slot) + index * self.block_stride_bytes,
            count * self.block_stride_bytes,
            _PROT_NONE,
            _RESERVE | _MAP_FIXED,
            -1,
            0,
        )

    def free_slot(self, slot: int) -> None:
        self._live[slot] = 0

    def base(self, slot: int, num_blocks: int = 0) -> int:
        assert 0 <= slot < self._num_slots, f"slot {slot} of {self._num_slots}"
        live = self._live[slot]
        assert num_blocks <= live, f"slot {slot} has {live} blocks mapped, {num_blocks} are needed"
        return self._ranges_base + slot * self._range_bytes

    def slot_blocks(self, slot: int, num_blocks: int) -> torch.Tensor:
        return self._slots[slot][:num_blocks]

    def open_window(self, window: int, page: Page) -> None:
        """From now on `window` may be mapped. From any thread."""
        with self._changing:
            self.windows.open(window, page)

    def close_windows(self, windows: Sequence[int]) -> None:
        """Unmap them everywhere; no step under way may use them. Then the ids may be opened anew,
        and a peer's memory is held by us no longer than its windows are open."""
        with self._changing:
            for slot, index in np.argwhere(np.isin(self._table, windows)).tolist():
                self._reserve(slot, index, 1)
                self._table[slot, index] = _CLOSED
                self.num_mapped -= 1
            for window in windows:
                self.windows.close(window)

    def moved_on(self, rows: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
        """Given (slot, leading blocks read) of each row of a step that has just ended: which rows
        have read windows whose pages are not theirs any more, and those windows."""
        if not len(self.windows):
            return {}
        read = [self._table[slot, :num_blocks] for slot, num_blocks in rows]
        row_N = np.repeat(np.arange(len(rows)), [len(blocks) for blocks in read])
        block_N = np.concatenate(read)
        is_window_N = block_N >= self.num_blocks
        row_N, window_N = row_N[is_window_N], block_N[is_window_N]
        found: dict[int, list[int]] = {}
        for i in np.flatnonzero(self.windows.moved_on(window_N)).tolist():
            found.setdefault(int(row_N[i]), []).append(int(window_N[i]))
        return found

    def block_bytes(self, block: int) -> npt.NDArray[np.uint8]:
        """One of our own blocks as bytes [layout.block_bytes], a view of the pool."""
        assert 0 <= block < self.num_blocks, f"block {block} of {self.num_blocks}"
        return self.bytes[block]

    def pool_blocks(self) -> torch.Tensor:
        """All blocks [num_blocks, layer, 2, kv_head, token, dim], as a view of the pool itself."""
        return self._pool

    def check(self) -> None:
        """Compare the table with the kernel's own list of this process's mappings."""
        actual, expected = self._actual_mappings(), self._expected_mappings()
        wrong = [place for place in sorted({*actual, *expected})
                 if actual.get(place) != expected.get(place)]  # fmt: skip
        for slot, index in wrong[:1]:
            found = actual.get((slot, index), ("", "no", _UNMAPPED))
            raise AssertionError(
                f"slot {slot} index {index}: block {found[2]} is mapped, "
                f"block {self._table[slot, index]} was asked for ({len(wrong)} such places)"
            )
        assert self.num_mapped == np.count_nonzero(self._table >= 0)
        for slot, live in enumerate(self._live):
            assert (self._table[slot, :live] != _UNMAPPED).all(), f"slot {slot} has a hole"

    def close(self) -> None:
        """Give everything back. Views handed out before must not be touched any more."""
        if self.fd < 0:
            return
        self._closing.set()
        self._toucher.join()
        self._slots.clear()
        del self._pool, self.bytes
        self.close_windows([*self.windows])
        _libc.munmap(self._ranges_base, self._reserved_bytes)
        _libc.munmap(self._pool_base, self._pool_bytes)
        os.close(self.fd)
        self.fd = -1

    def _touch(self) -> None:
        """Fault the pool in through a mapping that does not stay (and so does not count twice)."""
        for start in range(0, self._pool_bytes, _TOUCH_BYTES):
            if self._closing.is_set():
                return
            size = min(_TOUCH_BYTES, self._pool_bytes - start)
            flags = mmap.MAP_SHARED | _MAP_POPULATE
            _libc.munmap(_mmap(None, size, _READ_WRITE, flags, self.fd, start), size)

    def _unmap_stale(self) -> None:
        """Lay the empty reservation over everything that no live sequence uses."""
        for slot, live in enumerate(self._live):
            mapped = np.flatnonzero(self._table[slot, live:] >= 0)
            if len(mapped) == 0:
                continue
            end = live + int(mapped[-1]) + 1
            self._reserve(slot, live, end - live)
            self.num_mapped -= len(mapped)
            self._table[slot, live:end] = _UNMAPPED

    def _expected_mappings(self) -> dict[tuple[int, int], _Mapping]:
        """What the table says, by (slot, index)."""
        expected: dict[tuple[int, int], _Mapping] = {}
        inodes: dict[int, str] = {}
        for slot, index in np.argwhere(self._table >= 0).tolist():
            block, fd, access = int(self._table[slot, index]), self.fd, "rw"
            if block >= self.num_blocks:
                page = self.windows[block]
                block, fd, access = page.block, page.pool.fd, "r-"
            if fd not in inodes:
                inodes[fd] = str(os.fstat(fd).st_ino)
            expected[slot, index] = (inodes[fd], access, block)
        return expected

    def _actual_mappings(self) -> dict[tuple[int, int], _Mapping]:
        """The same as /proc/self/maps tells it; neighbours may have been merged into one line."""
        actual: dict[tuple[int, int], _Mapping] = {}
        stride, ranges_end = self.block_stride_bytes, self._ranges_base + self._reserved_bytes
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, access, offset, _, inode, *_ = line.split(None, 5)
            start, end = (int(part, 16) for part in addresses.split("-"))
            if inode == "0" or not self._ranges_base <= start < ranges_end:
                continue
            first, block = (start - self._ranges_base) // stride, int(offset, 16) // stride
            for i in range((end - start) // stride):
                place = divmod(first + i, self._max_blocks_per_slot)
                actual[place] = (inode, access[:2], block + i)
        return actual

    def _view(self, address: int, num_blocks: int) -> torch.Tensor:
        dtype, shape = torch_dtype(self.layout.dtype), block_shape(self.layout)
        num_bytes = num_blocks * self.block_stride_bytes
        buffer = (ctypes.c_char * num_bytes).from_address(address)
        flat = torch.frombuffer(buffer, dtype=dtype)
        stride = self.block_stride_bytes // dtype.itemsize
        inner = torch.empty(shape, dtype=dtype, device="meta").stride()
        return flat.as_strided((num_blocks, *shape), (stride, *inner))


def _mmap(address: int | None, size: int, prot: int, flags: int, fd: int, offset: int) -> int:
    found = _libc.mmap(address, size, prot, flags, fd, offset)
    if found == _MAP_FAILED:
        code = ctypes.get_errno()
        if code == errno.ENOMEM:
            raise EngineFailed(
                "the kernel has no room for another mapping: raise vm.max_map_count "
                f"(now {_max_map_count()}) or lower --max-num-seqs"
            )
        raise OSError(code, f"mmap of {size} bytes: {os.strerror(code)}")
    return int(found)


def _prefaulted_memfd(size: int) -> int:
    """An anonymous file with all its pages present, so that no step pays for a first touch."""
    available = available_memory_bytes()
    if size > available:
        raise NotEnoughMemory(
            f"the KV cache of {size / GIB:.2f} GiB does not fit: {available / GIB:.2f} GiB are "
            "available. Lower the KV cache size, --max-model-len or --max-num-seqs"
        )
    fd = os.memfd_create("penstock-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
        # Who maps it from outside need not fear that it is cut short under a reader.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as exc:
        os.close(fd)
        raise NotEnoughMemory(
            f"the KV cache of {size / GIB:.2f} GiB cannot be allocated: {exc.strerror}"
        ) from exc
    return fd


def _max_map_count() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        return 65_530  # the kernel's default
