"""Large buffers on the host, outside malloc."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap

import torch

from penstock.engine.memory.sizing import GIB, HUGE_PAGE_BYTES
from penstock.protocol.errors import NotEnoughMemory

_LARGE_BYTES = 2 * HUGE_PAGE_BYTES
_MADV_HUGEPAGE = 14  # Linux; not everywhere in Python's mmap
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # mmap's default here is shared memory


def empty_huge(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory in huge pages where the system gives them to who asks: fewer page faults
    while a model loads, fewer misses of the address cache while it is read.

    It goes back to the system the moment its last tensor is gone; of what malloc gets back it keeps
    hundreds of megabytes after a model has been loaded.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LARGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    try:
        region = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=_PRIVATE)
    except OSError as exc:
        raise NotEnoughMemory(
            f"{num_bytes / GIB:.2f} GiB for a weight cannot be had: {exc.strerror}"
        ) from exc
    with contextlib.suppress(OSError):  # a kernel without huge pages
        region.madvise(_MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(region)) % HUGE_PAGE_BYTES
    flat = torch.frombuffer(region, dtype=torch.uint8, count=num_bytes, offset=start)
    return flat.view(dtype).view(shape)
