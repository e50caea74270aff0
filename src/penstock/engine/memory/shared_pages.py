"""A file without a name, mapped so that its pages can be huge ones."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import weakref

from penstock.engine.memory.sizing import HUGE_PAGE_BYTES

_MADV_COLLAPSE = 25  # Linux 6.1
_MAP_FIXED = 0x10
_NICE = 10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64),
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


class SharedPages:
    """The first `num_bytes` of `fd`, which has at least as many, shared and writable. `buffer` is
    what to make tensors of; the mapping goes with the last of them. Raises `OSError`."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        whole = num_bytes + HUGE_PAGE_BYTES
        nowhere = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = _map(None, whole, 0, nowhere, -1)
        # A huge page of the file fits a place whose address is a multiple of its size only.
        self._address = -(-base // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        both = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            _map(self._address, num_bytes, both, mmap.MAP_SHARED | _MAP_FIXED, fd)
        except OSError:
            _libc.munmap(base, whole)
            raise
        self._num_bytes = num_bytes
        self.buffer = (ctypes.c_char * num_bytes).from_address(self._address)
        weakref.finalize(self.buffer, _libc.munmap, base, whole).atexit = False

    def read_only(self) -> None:
        """A stray write ends its process from now on, and changes nothing for others. Raises
        `OSError`."""
        if _libc.mprotect(self._address, self._num_bytes, mmap.PROT_READ) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def collapse(self, used_bytes: int) -> threading.Thread:
        """Make huge pages of the first `used_bytes`, beside whatever else is done: moving them
        takes a while, and nobody needs to wait for it. Most systems give shared memory no huge
        pages by themselves. Where the kernel cannot, they stay as they are."""
        keeps = self.buffer  # until the thread is done

        def work() -> None:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            for start in range(0, used_bytes - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
                at = ctypes.addressof(keeps) + start
                if _libc.madvise(at, HUGE_PAGE_BYTES, _MADV_COLLAPSE) != 0:
                    return

        thread = threading.Thread(target=work, name="penstock-huge-pages", daemon=True)
        thread.start()
        return thread


def _map(address: int | None, size: int, prot: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, size, prot, flags, fd, 0)
    if found == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {size} bytes: {os.strerror(code)}")
    return int(found)
