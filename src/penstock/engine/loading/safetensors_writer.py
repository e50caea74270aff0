"""Writing .safetensors shards tensor by tensor: never more than one of them is in memory.

A header stands before the data, so what will be written is planned first, and written in that
order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from penstock.engine.loading.safetensors_file import NAMES
from penstock.engine.loading.tensors import INDEX, SINGLE


@dataclass(frozen=True, slots=True)
class Planned:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path,
    planned: list[Planned],
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int,
) -> None:
    """`tensors` are the planned ones in that order, made as they are asked for. One file, or
    several with an index, named as transformers names them. Raises OSError as files do."""
    shards = _split(planned, max_shard_bytes)
    produced = iter(tensors)
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            _write(file, shard, produced)
        file_of |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        total = sum(entry.num_bytes for entry in planned)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(
    file: BinaryIO, shard: list[Planned], produced: Iterator[tuple[str, torch.Tensor]]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in shard:
        name, tensor = next(produced)
        assert (name, tensor.dtype, tuple(tensor.shape)) == (entry.name, entry.dtype, entry.shape)
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _split(planned: list[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for entry in planned:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards
