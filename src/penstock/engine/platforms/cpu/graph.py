"""A step written down once, then replayed by one call: what a CUDA graph is to a GPU.

While a `Program` records, the model's own Python code runs over the largest number of tokens, its
operations are noted instead of computed, and their outputs come from an arena that reuses memory as
Python lets go of it. A replay needs only the number of tokens, the inputs and a planned attention:
dimensions are parameters, so that one program serves every batch up to its size. It computes bit by
bit what the eager calls compute, since it is the same calls.

What cannot be written down (an operation of torch that computes) is refused while recording. A
piece that has to stay in Python can be cut out: `Program.cut`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.engine.platforms.base import CannotCapture, Forward
from penstock.engine.platforms.cpu.ops import Ops

_ALIGN_BYTES = 64


class Arena:
    """Blocks of memory that return when the last tensor over them is gone."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._blocks: list[np.ndarray] = []
        self.num_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        size = max(1, -(-num_bytes // _ALIGN_BYTES)) * _ALIGN_BYTES
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._allocate(size)
        # A tensor made from an array keeps that very array object until its storage is freed.
        lent = block[:]
        weakref.finalize(lent, free.append, block).atexit = False
        flat: torch.Tensor = torch.from_numpy(lent)[:num_bytes]
        return flat.view(dtype).view(shape)

    def _allocate(self, size: int) -> np.ndarray:
        whole = np.empty(size + _ALIGN_BYTES, dtype=np.uint8)
        start = -whole.ctypes.data % _ALIGN_BYTES
        self._blocks.append(whole)
        self.num_bytes += size
        return whole[start : start + size]


class Program:
    """The recorder that `Ops` writes to, and what replays it."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._arena = Arena()
        self._num_tokens = ctypes.c_int64()
        self._keep: list[Any] = []
        self._open: list[tuple[int, ctypes.Structure]] = []
        self._pieces: list[Callable[[int], None]] = []
        self.num_operations = 0

    # --- as `Ops` sees it ------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._arena.empty(shape, dtype)

    def num_tokens_address(self) -> int:
        return ctypes.addressof(self._num_tokens)

    def add(self, operation: int, args: ctypes.Structure, keep: tuple[Any, ...]) -> None:
        self._open.append((operation, args))
        self._keep.append(keep)

    # --- making and using it ---------------------------------------------------------------------

    def cut(self, piece: Callable[[int], None]) -> None:
        """Leave the program here, run `piece(num_tokens)`, and go on."""
        self.close()
        self._pieces.append(piece)

    def close(self) -> None:
        """What has been written since the last cut becomes one native call."""
        count = len(self._open)
        if count == 0:
            return
        operations = (ctypes.c_void_p * count)(*(each for each, _ in self._open))
        arguments = (ctypes.c_void_p * count)(*(ctypes.addressof(each) for _, each in self._open))
        self._keep.append(self._open)
        self._open = []
        self.num_operations += count
        call = self._ops.library.penstock_replay

        def run(num_tokens: int) -> None:
            self._num_tokens.value = num_tokens
            call(operations, arguments, count, torch.get_num_threads())

        self._pieces.append(run)

    def replay(self, num_tokens: int) -> None:
        for piece in self._pieces:
            piece(num_tokens)

    @property
    def num_bytes(self) -> int:
        """Of the arena."""
        return self._arena.num_bytes


def capture(ops: Ops, forward: Forward, max_tokens: int) -> Forward:
    """`forward` as a program for up to `max_tokens`. Raises `CannotCapture`.

    The result is overwritten by the next call.
    """
    program = Program(ops)
    ids_T = program.empty((max_tokens,), torch.int64).zero_()
    positions_T = program.empty((max_tokens,), torch.int64).zero_()
    ops.recorder = program
    try:
        with _OnlyViews():
            out_TE = forward(ids_T, positions_T)
    finally:
        ops.recorder = None
    program.close()

    def run(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        num_tokens = len(ids)
        assert num_tokens <= max_tokens, f"{num_tokens} tokens, captured for {max_tokens}"
        ids_T[:num_tokens] = ids
        positions_T[:num_tokens] = positions
        program.replay(num_tokens)
        return out_TE[:num_tokens]

    return run


class _OnlyViews(TorchDispatchMode):
    """Lets through what only looks at tensors differently; a program would miss anything else."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would otherwise import its compiler, to keep it off this class: 150 MB and a second.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        returns = func._schema.returns
        views = all(each.alias_info is not None for each in returns)
        if not returns or not views or func._schema.is_mutable:
            raise CannotCapture(f"{func} is computed by torch")
        return func(*args, **(kwargs or {}))
