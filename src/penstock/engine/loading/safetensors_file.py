"""Reading one .safetensors file straight into tensors that exist already.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, little
endian; the header, a JSON object name -> {dtype, shape, data_offsets}; the data, without holes.
The library of that name maps the file, and mapped pages count as this process's memory: a loader
that fills tensors in place is better served by plain reads, which need no second copy of anything.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.protocol.errors import CheckpointError, UnsupportedModel

#: The reference implementation's limit: a longer header is garbage, not a checkpoint.
MAX_HEADER_BYTES = 100_000_000

FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
#: Of quantized weights: read as they are, never converted as if they were numbers.
_CODES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
#: torch's dtypes by the format's names for them.
NAMES = {dtype: name for name, dtype in (FLOAT_DTYPES | _CODES).items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor stands; `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """One file, its header read and checked. Raises `CheckpointError` if it is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as exc:
            raise CheckpointError(f"{path} cannot be read: {exc.strerror}") from exc
        try:
            self.num_bytes = os.fstat(self._fd).st_size
            self.tensors = self._parse(self._read_header())
        except BaseException:
            self.close()
            raise

    def read_into(self, name: str, out: torch.Tensor, staging: torch.Tensor) -> None:
        """Fill `out`, contiguous and of the tensor's shape, converting to its dtype and device
        by way of `staging` (uint8, on the CPU) where that is not just reading."""
        info = self.tensors[name]
        dtype = FLOAT_DTYPES.get(info.dtype)
        if dtype is None:
            raise UnsupportedModel(
                f"{self.path}: {name} has dtype {info.dtype}; supported: {', '.join(FLOAT_DTYPES)}"
            )
        assert out.is_contiguous() and tuple(out.shape) == info.shape, (name, out.shape)
        flat = out.view(-1)
        if out.dtype == dtype and out.device.type == "cpu":
            self._read(info.start, _bytes_of(flat))
            return
        pieces = staging.view(dtype)
        for first in range(0, flat.numel(), pieces.numel()):
            part = pieces[: flat.numel() - first]
            self._read(info.start + first * dtype.itemsize, _bytes_of(part))
            flat[first : first + part.numel()].copy_(part)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored. Raises `UnsupportedModel` for a dtype that is not known."""
        info = self.tensors[name]
        dtype = FLOAT_DTYPES.get(info.dtype) or _CODES.get(info.dtype)
        if dtype is None:
            raise UnsupportedModel(f"{self.path}: {name} has dtype {info.dtype}")
        data = torch.empty(info.num_bytes, dtype=torch.uint8)
        self._read(info.start, _bytes_of(data))
        return data.view(dtype).view(info.shape)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_header(self) -> bytes:
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if self.num_bytes < 8 or not 2 <= length <= MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.path} is not a safetensors file")
        header = os.pread(self._fd, length, 8)
        if len(header) < length:
            raise CheckpointError(
                f"{self.path} is truncated: its header alone has {length} bytes, the file "
                f"{self.num_bytes}"
            )
        return header

    def _parse(self, header: bytes) -> dict[str, TensorInfo]:
        try:
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            start = 8 + len(header)
            tensors = {name: _tensor_info(entry, start) for name, entry in entries.items()}
        except (UnicodeDecodeError, RecursionError, ValueError, TypeError, KeyError,
                AttributeError) as exc:  # fmt: skip
            raise CheckpointError(f"{self.path} is not a safetensors file: bad header") from exc
        end = max((info.start + info.num_bytes for info in tensors.values()), default=start)
        if self.num_bytes != end:
            kind = "truncated" if self.num_bytes < end else "damaged"
            raise CheckpointError(
                f"{self.path} is {kind}: {end} bytes expected, {self.num_bytes} found"
            )
        return tensors

    def _read(self, offset: int, into: memoryview) -> None:
        """Fill `into`; a single read returns at most 2 GiB, and fewer at the file's end."""
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._fd, [into[done:]], offset + done)
            except OSError as exc:
                raise CheckpointError(f"{self.path} cannot be read: {exc.strerror}") from exc
            if count == 0:
                raise CheckpointError(f"{self.path} was truncated while it was read")
            done += count


def _tensor_info(entry: dict[str, Any], data_start: int) -> TensorInfo:
    """Raises ValueError, TypeError or KeyError for what the format does not allow."""
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if min((begin, end - begin, *shape)) < 0:
        raise ValueError("negative size")
    known = FLOAT_DTYPES.get(dtype) or _CODES.get(dtype)
    if known is not None and end - begin != math.prod(shape) * known.itemsize:
        raise ValueError("shape and offsets disagree")
    return TensorInfo(dtype, shape, data_start + begin, end - begin)


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data
