"""Calls the native operations, now or later.

`Ops.run` calls an operation at once. While a `Recorder` (graph.py) is set it is written down
instead, its outputs taken from the recorder's arena, and the same Python code that computes a step
becomes the program of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """What writes a program down. See graph.py."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...
    def num_tokens_address(self) -> int: ...
    def add(self, operation: int, args: ctypes.Structure, keep: tuple[Any, ...]) -> None: ...
    def cut(self, piece: Callable[[int], None]) -> None: ...


class Ops:
    """The operations of one compiled library, for one compute thread.

    Every args structure has a first field `num_tokens`, a pointer to an int64: `run` fills it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.recorder: Recorder | None = None
        self._num_tokens = ctypes.c_int64()
        self._num_tokens_address = ctypes.addressof(self._num_tokens)

    def address(self, name: str, library: ctypes.CDLL | None = None) -> int:
        """Where the operation penstock_op_`name` is: what `run` wants. It may be another library's
        than the core's."""
        function = getattr(library or self.library, f"penstock_op_{name}")
        found = ctypes.cast(function, ctypes.c_void_p).value
        assert found is not None
        return found

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for an output (uninitialised)."""
        if self.recorder is not None:
            return self.recorder.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype)

    def run(
        self,
        operation: int,
        args: ctypes.Structure,
        num_tokens: int,
        *,
        serial: bool = False,
        keep: tuple[Any, ...] = (),
    ) -> None:
        """Compute, over the first `num_tokens` rows. `serial`: too little work to wake the other
        threads for. `keep` is what must live as long as the call may be replayed: weights, plans.
        Memory from `empty` need not be named."""
        if self.recorder is not None:
            args.num_tokens = self.recorder.num_tokens_address()
            self.recorder.add(operation, args, keep)
            return
        self._num_tokens.value = num_tokens
        args.num_tokens = self._num_tokens_address
        threads = 1 if serial else torch.get_num_threads()
        self.library.penstock_run(operation, ctypes.byref(args), threads)
