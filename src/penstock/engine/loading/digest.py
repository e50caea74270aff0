"""A short name for what a checkpoint computes: the root of every KV block's key."""

from __future__ import annotations

import hashlib

from penstock.checkpoint import Checkpoint
from penstock.engine.loading.tensors import CheckpointTensors
from penstock.engine.quantization.select import SETTINGS_FILES, quantization_of

#: Of each tensor: a few MiB in all, milliseconds, and norms and biases whole.
PIECE_BYTES = 16 << 10


def model_digest(
    checkpoint: Checkpoint,
    *,
    load_format: str = "auto",
    seed: int = 0,
    quantization: str = "auto",
) -> str:
    """64 hex digits: sha256 over config.json, what `quantization` makes of the weights, and each
    weight file's name, size, header and a sample of its data. Equal for a copy of the folder
    elsewhere. Raises `CheckpointError`, and `ConfigError` as `quantization_of` does."""
    _ = checkpoint.config  # says what is wrong with it
    h = hashlib.sha256()
    for name in ("config.json", *SETTINGS_FILES):
        if (text := checkpoint.text(name)) is not None:
            _add(h, name.encode(), text.encode())
    if label := quantization_of(checkpoint, quantization).label:
        _add(h, b"quantization", label.encode())
    if load_format == "dummy":
        _add(h, b"dummy", str(seed).encode())
        return h.hexdigest()
    with CheckpointTensors(checkpoint) as tensors:
        for file in tensors.files:
            _add(h, file.path.name.encode(), file.num_bytes.to_bytes(8, "little"))
            _add(h, file.header, *file.sample(PIECE_BYTES))
    return h.hexdigest()


def _add(h: hashlib._Hash, *parts: bytes) -> None:
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
