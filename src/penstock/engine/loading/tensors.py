"""The tensors of a checkpoint folder: which file holds which, and whether they fit the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from penstock.checkpoint import Checkpoint
from penstock.engine.loading.gguf_file import GgufFile
from penstock.engine.loading.safetensors_file import FLOAT_DTYPES, SafetensorsFile, TensorInfo
from penstock.engine.quantization.formats.base import Stored
from penstock.gguf.checkpoint import GgufCheckpoint
from penstock.protocol.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: Read at once when dtype or device change on the way. One buffer, not one a tensor: what malloc
#: gets back it does not always give back.
STAGING_BYTES = 8 << 20

#: Left in checkpoints by older exporters: buffers that are computed, not learnt.
_HARMLESS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")
_SHOWN = 4
_ANY: Mapping[str, frozenset[str]] = {}


class CheckpointTensors:
    """All safetensors files of a folder, or the parts of a GGUF file, opened. A context manager:
    closes them.

    Raises `CheckpointError` for a folder without safetensors, an index that does not match its
    shards, and files that are not whole.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder = checkpoint.path
        self.files: list[SafetensorsFile | GgufFile] = []
        self._checkpoint = checkpoint
        self._file_of: dict[str, SafetensorsFile | GgufFile] = {}
        self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        try:
            for path, expected in _weight_files(checkpoint):
                self._open(path, expected)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def read_into(self, name: str, out: torch.Tensor) -> int:
        """Fill `out` with the tensor; returns how many bytes of the file that was."""
        file = self._file_of[name]
        file.read_into(name, out, self._staging)
        return file.tensors[name].num_bytes

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, whatever its dtype."""
        return self._file_of[name].read(name)

    def info(self, name: str) -> TensorInfo:
        return self._file_of[name].tensors[name]

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype of a tensor of plain floats; None for what is none, or not there."""
        found = self._file_of.get(name)
        return None if found is None else FLOAT_DTYPES.get(found.tensors[name].dtype)

    def names(self) -> Iterable[str]:
        return self._file_of

    def find(self, name: str) -> Stored | None:
        """How a tensor is held; None: not at all."""
        if name not in self._file_of:
            return None
        info = self.info(name)
        return Stored(info.shape, frozenset({info.dtype}))

    def check(
        self,
        declared: Mapping[str, tuple[int, ...]],
        *,
        tied: bool,
        dtypes: Mapping[str, frozenset[str]] = _ANY,
        ignores: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Raises `CheckpointError` unless the files hold exactly what a model `declared`, in the
        `dtypes` given, and beside it only what the checkpoint's format `ignores`."""
        source = self._checkpoint.describes_itself_in
        missing = [name for name in declared if name not in self._file_of]
        extra = [
            name
            for name in self._file_of
            if name not in declared
            and not (tied and name.startswith("lm_head."))
            and not _HARMLESS.search(name)
            and not ignores(name)
        ]
        if missing or extra:
            parts = [f"missing {_some(missing)}"] if missing else []
            parts += [f"not known to this model {_some(extra)}"] if extra else []
            raise CheckpointError(
                f"{self.folder}: tensors and {source} do not match: {'; '.join(parts)}: is this "
                f"another model's {source}?"
            )
        for name, shape in declared.items():
            found = self.info(name).shape
            if found != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {_shape(found)}, {source} asks for "
                    f"{_shape(shape)}: is this another model's {source}?"
                )
        for name, allowed in dtypes.items():
            if (dtype := self.info(name).dtype) not in allowed:
                raise CheckpointError(
                    f"{self.folder}: {name} is {dtype}, where config.json's quantization asks for "
                    f"{' or '.join(sorted(allowed))}"
                )

    def close(self) -> None:
        for file in self.files:
            file.close()

    def _open(self, path: Path, expected: list[str]) -> None:
        if isinstance(self._checkpoint, GgufCheckpoint):
            file: SafetensorsFile | GgufFile = GgufFile(path, self._checkpoint)
        else:
            file = SafetensorsFile(path)
        self.files.append(file)
        absent = [name for name in expected if name not in file.tensors]
        if absent:
            raise CheckpointError(f"{path} lacks {_some(absent)}, which {INDEX} says it holds")
        for name in expected or file.tensors:
            if name in self._file_of:
                raise CheckpointError(
                    f"{path} and {self._file_of[name].path} both hold {name}: "
                    f"{INDEX} must say which counts"
                )
            self._file_of[name] = file


def _weight_files(checkpoint: Checkpoint) -> list[tuple[Path, list[str]]]:
    """(file, the names it must hold; empty: whatever it holds), as transformers looks for them."""
    folder = checkpoint.path
    if isinstance(checkpoint, GgufCheckpoint):
        return [(path, []) for path in checkpoint.files]
    if (folder / SINGLE).is_file():
        return [(folder / SINGLE, [])]
    if (folder / INDEX).is_file():
        return _indexed(folder, checkpoint.json(INDEX))
    found = sorted(folder.glob("*.safetensors"))
    # Mistral ships its own format beside Hugging Face's.
    found = [path for path in found if not path.name.startswith("consolidated")]
    if found:
        return [(path, []) for path in found]
    others = [path.name for end in ("bin", "pt", "pth", "gguf") for path in folder.glob(f"*.{end}")]
    if others:
        raise CheckpointError(
            f"{folder} holds {_some(sorted(others))} but no safetensors file: convert it "
            "(save_pretrained of transformers writes safetensors)"
        )
    raise CheckpointError(f"{folder} holds no weights: {SINGLE} or {INDEX} is needed")


def _indexed(folder: Path, index: Mapping[str, object]) -> list[tuple[Path, list[str]]]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    names_of: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # An index must not lead out of its folder.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(f"{folder / INDEX}: {json.dumps(file)} is no file of this folder")
        names_of.setdefault(file, []).append(name)
    absent = [file for file in names_of if not (folder / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(names_of)} shards that {INDEX} names: "
            f"{_some(absent)}: is the download complete?"
        )
    return [(folder / file, names_of[file]) for file in sorted(names_of)]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
