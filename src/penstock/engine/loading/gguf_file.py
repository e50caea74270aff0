"""One GGUF file's tensors, under Hugging Face's names and in Hugging Face's order of rows.

Stands beside `SafetensorsFile`. Data come by plain reads, a few MiB of rows at a time, and not by
mmap: a file that is cut short meanwhile is an error and no SIGBUS, and pages of the file do not
count as the process's memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from penstock.engine.loading.safetensors_file import TensorInfo
from penstock.gguf.checkpoint import GgufCheckpoint
from penstock.gguf.config import ROPE_FACTORS
from penstock.gguf.names import hugging_face_name
from penstock.protocol.errors import CheckpointError, UnsupportedModel

_FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_SLAB_BYTES = 4 << 20


class GgufFile:
    """`path` is one of `checkpoint.files`. Raises `CheckpointError` for a file that is not whole,
    before any data is read."""

    def __init__(self, path: Path, checkpoint: GgufCheckpoint) -> None:
        self.path = path
        self._fd = -1
        header = checkpoint.header_of(path)
        #: By Hugging Face's name; `dtype` is ggml's name of the type.
        self.tensors = {
            hugging_face_name(name): TensorInfo(t.type.name, t.shape, t.start, t.num_bytes)
            for name, t in header.tensors.items()
            if name != ROPE_FACTORS  # which the config has
        }
        self._heads = checkpoint.interleaved_heads
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as exc:
            raise CheckpointError(f"{path} cannot be read: {exc.strerror}") from exc

    def read_into(self, name: str, out: torch.Tensor, staging: torch.Tensor) -> None:
        """Fill `out`, contiguous and of the tensor's shape, from floats of any kind. A format
        reads what is quantized: see `read`."""
        info = self.tensors[name]
        dtype = _FLOATS.get(info.dtype)
        if dtype is None:
            raise UnsupportedModel(
                f"{self.path}: {name} has type {info.dtype}; supported: {', '.join(_FLOATS)}"
            )
        assert out.is_contiguous() and tuple(out.shape) == info.shape, (name, out.shape)
        for rows, raw in self._slabs(name):
            out[rows].copy_(raw.view(dtype).view(out[rows].shape))

    def read(self, name: str) -> torch.Tensor:
        """The tensor as its bytes, uint8 [rows, bytes of a row]."""
        info = self.tensors[name]
        out = torch.empty((info.shape[0], info.num_bytes // info.shape[0]), dtype=torch.uint8)
        for rows, raw in self._slabs(name):
            out[rows] = raw
        return out

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _slabs(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows from first to last, some at a time: (which, their bytes [n, bytes of a row])."""
        info = self.tensors[name]
        num_rows = info.shape[0]
        row_bytes = info.num_bytes // num_rows
        head_rows = self._head_rows(name)
        at_once = max(1, _SLAB_BYTES // row_bytes // head_rows) * head_rows
        for first in range(0, num_rows, at_once):
            count = min(at_once, num_rows - first)
            raw = torch.empty((count, row_bytes), dtype=torch.uint8)
            self._read(info.start + first * row_bytes, raw)
            if head_rows > 1:
                raw = raw.view(-1, head_rows // 2, 2, row_bytes).transpose(1, 2)
                raw = raw.reshape(count, row_bytes)
            yield slice(first, first + count), raw

    def _head_rows(self, name: str) -> int:
        """Rows of one head where the two halves of a head are interleaved; 1: nothing to undo.

        ggml rotates Llama's dimensions 2f and 2f + 1 as a pair, Hugging Face f and f + D / 2; the
        converter to GGUF has moved the rows of q and k accordingly.
        """
        if self._heads is None:
            return 1
        for part, heads in zip(("q_proj", "k_proj"), self._heads, strict=True):
            if f".{part}." in name:
                return self.tensors[name].shape[0] // heads
        return 1

    def _read(self, offset: int, into: torch.Tensor) -> None:
        view, done = into.view(-1).numpy().data, 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as exc:
                raise CheckpointError(f"{self.path} cannot be read: {exc.strerror}") from exc
            if count == 0:
                raise CheckpointError(f"{self.path} was truncated while it was read")
            done += count
