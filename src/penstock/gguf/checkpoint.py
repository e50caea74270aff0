"""A GGUF file as a checkpoint: it answers for the JSON files that a folder would have."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from penstock.checkpoint import Checkpoint
from penstock.gguf import config
from penstock.gguf.header import MAGIC, GgufHeader, GgufTensor, read_header
from penstock.gguf.metadata import Metadata
from penstock.gguf.tokenizer import GgufTokenizer
from penstock.protocol.errors import CheckpointError, UnsupportedModel

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.I)
_MAX_ROPE_FACTORS = 512


class GgufCheckpoint(Checkpoint):
    """One file, or the first of several that llama.cpp's gguf-split made of one."""

    describes_itself_in = "metadata"

    def __init__(self, path: Path) -> None:
        """Any of several parts will do. Raises `CheckpointError` if one is missing."""
        self.files = parts_of(path)
        super().__init__(self.files[0])
        self._headers: dict[Path, GgufHeader] = {}
        self._made: dict[str, Callable[[], str]] = {
            "config.json": lambda: _json(self._config),
            "generation_config.json": lambda: _json(self._generation_config),
            "tokenizer.json": lambda: self._tokenizer.tokenizer_json(),
            "tokenizer_config.json": lambda: _json(self._tokenizer.tokenizer_config()),
        }

    def text(self, name: str) -> str | None:
        return self._made[name]() if name in self._made else None

    def has(self, name: str) -> bool:
        return name in self._made

    @cached_property
    def header(self) -> GgufHeader:
        """Of the first part, which has the metadata."""
        return self.header_of(self.path)

    def header_of(self, part: Path) -> GgufHeader:
        """Of one of `files`, read once."""
        if part not in self._headers:
            self._headers[part] = read_header(part)
        return self._headers[part]

    @cached_property
    def metadata(self) -> Metadata:
        return Metadata(self.path, self.header.metadata)

    @cached_property
    def tensors(self) -> dict[str, GgufTensor]:
        """Of all parts."""
        found = dict(self.header.tensors)
        for part in self.files[1:]:
            more = self.header_of(part).tensors
            if twice := found.keys() & more.keys():
                raise CheckpointError(f"{part} holds {min(twice)}, which another part has too")
            found |= more
        expected = self.metadata.integer("split.tensors.count", len(found))
        if expected != len(found):
            raise CheckpointError(f"{self.path}: {len(found)} tensors of {expected} are there")
        return found

    @property
    def interleaved_heads(self) -> tuple[int, int] | None:
        """(query heads, key heads) if the rows of q and k are in the order of ggml's rotary
        embedding for Llama, pairs side by side; None if they are in Hugging Face's."""
        if config.architecture(self.metadata) != "llama":
            return None
        return int(self.config["num_attention_heads"]), int(self.config["num_key_value_heads"])

    @cached_property
    def _config(self) -> dict[str, Any]:
        return config.model_config(self.metadata, self.tensors, self._rope_factors())

    @cached_property
    def _generation_config(self) -> dict[str, Any]:
        has_text = "tokenizer.ggml.tokens" in self.metadata
        ends = self._tokenizer.eos_token_ids() if has_text else []
        return config.generation_config(self.metadata, ends)

    @cached_property
    def _tokenizer(self) -> GgufTokenizer:
        return GgufTokenizer(self.metadata)

    def _rope_factors(self) -> tuple[float, ...]:
        tensor = self.header.tensors.get(config.ROPE_FACTORS)
        if tensor is None:
            return ()
        count = tensor.shape[-1]
        if tensor.type.name != "F32" or len(tensor.shape) != 1 or count > _MAX_ROPE_FACTORS:
            raise UnsupportedModel(
                f"{self.path}: {config.ROPE_FACTORS} is {tensor.type.name} {tensor.shape}"
            )
        try:
            with self.path.open("rb") as file:
                file.seek(tensor.start)
                return struct.unpack(f"<{count}f", file.read(4 * count))
        except (OSError, struct.error) as exc:
            raise CheckpointError(f"{self.path} cannot be read: {exc}") from exc


def parts_of(path: Path) -> list[Path]:
    """All parts of a split file, in order; the file alone if it is whole."""
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    count = int(named["count"])
    parts = [
        path.with_name(f"{named['stem']}-{number:05}-of-{named['count']}{named['suffix']}")
        for number in range(1, count + 1)
    ]
    absent = [part.name for part in parts if not part.is_file()]
    if absent or not parts:
        raise CheckpointError(
            f"{path.parent} lacks {len(absent)} of the {count} parts of this GGUF file: "
            f"{', '.join(absent[:4])}: is the download complete?"
        )
    return parts


def is_gguf(path: Path) -> bool:
    """By the first bytes: what a cache calls by its digest is a GGUF file too.

    Raises `CheckpointError` for a file that cannot be read."""
    if not path.is_file():  # a pipe would wait for its writer
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror}") from exc


def only_gguf(folder: Path) -> Path | None:
    """The one model in GGUF files that a folder holds, if it holds no safetensors.

    Raises `CheckpointError` for a folder with several.
    """
    if any(folder.glob("*.safetensors")):
        return None
    firsts = sorted({_first_part(path) for path in folder.glob("*.gguf") if path.is_file()})
    if len(firsts) == 1:
        return firsts[0]
    if firsts:
        names = ", ".join(path.name for path in firsts[:4]) + ", ..." * (len(firsts) > 4)
        raise CheckpointError(f"{folder} holds several GGUF files: give one of {names}")
    return None


def _first_part(path: Path) -> Path:
    named = _PART.fullmatch(path.name)
    if named is None:
        return path
    return path.with_name(f"{named['stem']}-00001-of-{named['count']}{named['suffix']}")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
