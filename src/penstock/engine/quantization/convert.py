"""A checkpoint folder into a quantized one, one linear at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from penstock.checkpoint import Checkpoint
from penstock.engine.loading.loader import check_tensors, declare
from penstock.engine.loading.safetensors_writer import Planned, write_shards
from penstock.engine.loading.sources import FromCheckpoint
from penstock.engine.loading.tensors import CheckpointTensors
from penstock.engine.memory.sizing import torch_dtype
from penstock.engine.models.registry import model_config
from penstock.engine.platforms.base import Platform
from penstock.engine.quantization import export
from penstock.engine.quantization.formats.base import PLAIN
from penstock.engine.quantization.schemes import INT8, Scheme
from penstock.engine.quantization.select import (
    HEAD_FIELD,
    SETTINGS_FIELDS,
    SETTINGS_FILES,
    Quantization,
    stored_format,
)
from penstock.engine.quantization.weight import QuantizedWeight, row_slices
from penstock.protocol.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

#: What is not copied: weights in any format, and what is written anew.
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
_TEXTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
_HEAD = "lm_head"


@dataclass(slots=True)
class Report:
    """Bytes of weights before and after; of each linear the relative error |W - Q| / |W|."""

    bytes_before: int = 0
    bytes_after: int = 0
    errors: dict[str, float] = field(default_factory=dict)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    scheme: Scheme,
    *,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[float], None] | None = None,
) -> Report:
    """Write `out`, a folder that is not there yet: it appears when it is complete.

    Raises `CheckpointError` for a checkpoint that cannot be read and an `out` that cannot be
    written; nothing is left behind then.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another name, or remove it")
    out = out.absolute()
    if file := next((path for path in out.parents if path.is_file()), None):
        raise CheckpointError(f"{out} cannot be written: {file} is a file")
    try:
        with _becoming(out) as folder, CheckpointTensors(checkpoint) as tensors:
            report = _Conversion(checkpoint, tensors, scheme).write(
                folder, max_shard_bytes, progress or (lambda _: None)
            )
            folder.chmod(0o755)
            folder.rename(out)
    except OSError as exc:
        full = ": the disk is full" if exc.errno == errno.ENOSPC else f": {exc.strerror}"
        raise CheckpointError(f"{out} cannot be written{full}; nothing is left of it") from exc
    return report


@contextlib.contextmanager
def _becoming(out: Path) -> Iterator[Path]:
    """A folder beside `out`, to be renamed; removed if it has not been. The lock on it ends with
    this process, however that ends, and tells the next run what a dead one has left behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}-unfinished-"
    for left in sorted(out.parent.iterdir()):
        if left.name.startswith(prefix) and left.is_dir() and not left.is_symlink():
            with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                _remove_if_dead(left)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_dead(left: Path) -> None:
    with _locked(left) as mine:
        # What is empty may be so new that it is not locked yet.
        if mine and any(left.iterdir()):
            shutil.rmtree(left)
            logger.warning("removed %s, which a run that was killed had left behind", left)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether it could be locked: another process may hold it, and some file systems cannot."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


class _Conversion:
    """What goes where: the linears are quantized, all else is copied as it is stored."""

    def __init__(self, checkpoint: Checkpoint, tensors: CheckpointTensors, scheme: Scheme) -> None:
        self._checkpoint = checkpoint
        self._tensors = tensors
        self._scheme = scheme
        self._config = model_config(checkpoint)
        stored = Quantization(stored_format(checkpoint), keep_bits=False)
        as_stored = declare(self._config, None, stored, tensors.find)
        check_tensors(tensors, as_stored, self._config, stored)
        if stored.format is not PLAIN:
            logger.warning(
                "%s is quantized already (%s): the errors of both times add up, and those that are "
                "reported are of the second; take the original if you can",
                checkpoint.path,
                stored.format.describe(),
            )
        self._num_bytes = sum(tensors.info(name).num_bytes for name in as_stored.shapes)
        self._dtype = torch_dtype(self._config.dtype)
        self._source = FromCheckpoint(
            Platform(), self._dtype, tensors, self._num_bytes, None, stored
        )
        plain = declare(self._config)
        self._shapes = plain.shapes
        self._linears = {
            f"{name}.weight": shape for name, shape in plain.linears.items() if name != _HEAD
        }

    def write(
        self, folder: Path, max_shard_bytes: int, progress: Callable[[float], None]
    ) -> Report:
        report = Report(bytes_before=self._num_bytes)
        planned = list(self._planned())
        report.bytes_after = sum(entry.num_bytes for entry in planned)
        if report.bytes_after > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, "the disk is full")
        self._copy_files(folder)
        write_shards(folder, planned, self._produced(report, progress), max_shard_bytes)
        return report

    def _planned(self) -> Iterator[Planned]:
        for name, shape in self._shapes.items():
            if name in self._linears:
                for part, tensor in self._parts(name, self._scheme.declare(*self._linears[name])):
                    yield Planned(part, tensor.dtype, tuple(tensor.shape))
            else:
                yield Planned(name, self._dtype_of(name), shape)

    def _produced(
        self, report: Report, progress: Callable[[float], None]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, shape) in enumerate(self._shapes.items(), 1):
            if name in self._linears:
                yield from self._quantized(name, report)
            else:
                out = torch.empty(shape, dtype=self._dtype_of(name))
                self._source.fill(name, out)
                yield name, out
            progress(number / len(self._shapes))

    def _quantized(self, name: str, report: Report) -> Iterator[tuple[str, torch.Tensor]]:
        weight_NK = torch.empty(self._linears[name], dtype=self._dtype_of(name))
        self._source.fill(name, weight_NK)
        weight = self._scheme.quantize(weight_NK, name)
        report.errors[name.removesuffix(".weight")] = relative_error(weight_NK, weight)
        del weight_NK
        yield from self._parts(name, weight)

    def _parts(self, name: str, weight: QuantizedWeight) -> Iterator[tuple[str, torch.Tensor]]:
        module = name.removesuffix(".weight")
        scale_dtype = self._dtype_of(name)
        for suffix, tensor in export.tensors_of(weight, scale_dtype).items():
            yield f"{module}.{suffix}", tensor

    def _dtype_of(self, name: str) -> torch.dtype:
        """As it is stored; the model's where that is no plain float."""
        stored = self._tensors.dtype_of(name)
        return self._dtype if stored is None else stored

    def _copy_files(self, folder: Path) -> None:
        if self._checkpoint.path.is_dir():
            for path in sorted(self._checkpoint.path.iterdir()):
                written = path.name == "config.json" or path.name in SETTINGS_FILES
                if path.is_file() and not written and not path.name.endswith(_WEIGHTS):
                    shutil.copyfile(path, folder / path.name)
        else:  # a GGUF file, which answers for a folder's files
            for name in _TEXTS:
                if (text := self._checkpoint.text(name)) is not None:
                    (folder / name).write_text(text, encoding="utf-8")
        inputs = {
            name.removesuffix(".weight"): columns for name, (_, columns) in self._linears.items()
        }
        config = changed_config(self._checkpoint.config, self._scheme, inputs)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def changed_config(
    config: Mapping[str, Any], scheme: Scheme, inputs: Mapping[str, int]
) -> dict[str, Any]:
    """config.json of the quantized checkpoint."""
    kept = {name: value for name, value in config.items() if name not in SETTINGS_FIELDS}
    return kept | {"quantization_config": export.settings(scheme, inputs), HEAD_FIELD: INT8.name}


def relative_error(weight_NK: torch.Tensor, quantized: QuantizedWeight) -> float:
    """The Frobenius norm of the difference over that of the weight."""
    rows, columns = weight_NK.shape
    wrong = whole = 0.0
    for part in row_slices(rows, columns):
        tables = (quantized.scales_NG[part], quantized.offsets()[part])
        piece = QuantizedWeight(
            quantized.bits, quantized.group_size, quantized.codes_NK[part], *tables
        )
        exact = weight_NK[part].double()
        wrong += float((piece.dequantize().double() - exact).square().sum())
        whole += float(exact.square().sum())
    return (wrong / whole) ** 0.5 if whole else 0.0
