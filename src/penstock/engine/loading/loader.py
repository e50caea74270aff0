"""From a checkpoint folder to a model that is ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from penstock.checkpoint import Checkpoint
from penstock.engine.layers.weights import Weights
from penstock.engine.loading.digest import model_digest
from penstock.engine.loading.shared_weights import Segment, Sharing, room_for
from penstock.engine.loading.sources import (
    Adopted,
    Declared,
    Dummy,
    FromCheckpoint,
    Progress,
    quantized,
)
from penstock.engine.loading.tensors import CheckpointTensors
from penstock.engine.memory.sizing import torch_dtype
from penstock.engine.models.base import Model
from penstock.engine.models.config import DTYPES, ModelConfig
from penstock.engine.models.registry import family_named, model_config
from penstock.engine.platforms.base import Platform
from penstock.engine.quantization.formats.base import PLAIN, Find
from penstock.engine.quantization.select import Quantization, log_remarks, quantization_of
from penstock.gguf.checkpoint import GgufCheckpoint
from penstock.protocol.errors import CheckpointError, ConfigError, NotEnoughMemory

GIB = 1 << 30


def load_model(
    checkpoint: Checkpoint,
    platform: Platform,
    dtype: torch.dtype | str = "auto",
    max_model_len: int | None = None,
    *,
    load_format: str = "auto",
    quantization: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    share: Segment | None = None,
    digest: Callable[[], str] = lambda: "",
) -> tuple[Model, ModelConfig]:
    """The model in `dtype` on the platform's device, and its config with that dtype and length.

    Everything is checked before the first byte of data is read; then tensors stream into place one
    by one, so that memory peaks at the weights and one linear more. With `load_format` "dummy" only
    config.json is read and the weights are random (`seed`). `quantization`: see `quantization_of`.
    With `share` the weights are mapped from there, or read to there for others to map
    (shared_weights.py); `digest` then gives the `checkpoint_digest`.

    Raises `CheckpointError`, `UnsupportedModel`, `NotEnoughMemory`, `ConfigError`.
    """
    check_load_format(checkpoint, load_format)
    config = model_config(checkpoint, max_model_len=max_model_len)
    config = replace(config, dtype=choose_dtype(config, platform, dtype))
    wanted = quantization_of(checkpoint, quantization)
    target = _Target(config, platform, share, digest)
    if load_format == "dummy":
        wanted = replace(wanted, format=PLAIN)
        dummy = Dummy(platform, torch_dtype(config.dtype), seed)
        return target.load(dummy, wanted, declare(config, platform, wanted)), config
    with CheckpointTensors(checkpoint) as tensors:
        declared = declare(config, platform, wanted, tensors.find)
        check_tensors(tensors, declared, config, wanted)
        log_remarks(wanted.format)
        total_bytes = sum(tensors.info(name).num_bytes for name in declared.shapes)
        stored = FromCheckpoint(
            platform, torch_dtype(config.dtype), tensors, total_bytes, progress, wanted
        )
        return target.load(stored, wanted, declared, tensors.find), config


@dataclass(frozen=True, slots=True)
class _Target:
    """What is to be built, and where its weights go."""

    config: ModelConfig
    platform: Platform
    share: Segment | None
    digest: Callable[[], str]

    def load(
        self,
        source: Weights,
        wanted: Quantization,
        declared: Declared,
        find: Find = lambda name: None,
    ) -> Model:
        config, platform = self.config, self.platform

        def build(weights: Weights) -> Model:
            return family_named(config.family).build(config, quantized(weights, wanted))

        def read() -> Model:
            _check_memory(declared, platform)
            return build(source)

        if self.share is None:
            return read()
        sharing = Sharing(self.share, lambda: model_digest(self.digest(), config))
        adopted = Adopted(platform, torch_dtype(config.dtype), wanted, find)
        return sharing.load(platform, read, lambda: build(adopted), room_for(declared.num_bytes))


def check_load_format(checkpoint: Checkpoint, load_format: str) -> None:
    """Raises `ConfigError`. "dummy" goes with every checkpoint: it asks for no tensor's data."""
    if load_format not in ("auto", "safetensors", "dummy"):
        raise ConfigError(f"load_format {load_format!r} is none of auto, safetensors, dummy")
    if load_format == "safetensors" and isinstance(checkpoint, GgufCheckpoint):
        raise ConfigError(
            f"--load-format safetensors does not go with {checkpoint.path}, which is a GGUF file: "
            "leave the flag out"
        )


def choose_dtype(config: ModelConfig, platform: Platform, dtype: torch.dtype | str) -> str:
    """`auto` keeps a bfloat16 checkpoint as it is, and float16 on a GPU; others become the
    platform's default. Raises `ConfigError` for a dtype that does not exist."""
    name = str(dtype).removeprefix("torch.")
    name = {"half": "float16", "float": "float32"}.get(name, name)
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r} is none of auto, {', '.join(DTYPES)}")
        return name
    if config.dtype == "bfloat16" or (config.dtype == "float16" and platform.device.type == "cuda"):
        return config.dtype
    return str(platform.default_dtype).removeprefix("torch.")


def declare(
    config: ModelConfig,
    platform: Platform | None = None,
    quantization: Quantization | None = None,
    find: Find = lambda name: None,
) -> Declared:
    """The names, shapes and bytes of a model, found out by building it of nothing. The bytes are
    those on `platform`; `find` tells how a quantized checkpoint holds its tensors."""
    quantization = quantization or Quantization()
    declared = Declared(torch_dtype(config.dtype), platform, quantization, find)
    family_named(config.family).build(config, quantized(declared, quantization))
    return declared


def check_tensors(
    tensors: CheckpointTensors, declared: Declared, config: ModelConfig, quantization: Quantization
) -> None:
    """Raises `CheckpointError` unless the files hold what was `declared`, and nothing else that
    could matter."""
    stored = quantization.format
    if stored is not PLAIN and not declared.dtypes:
        raise CheckpointError(
            f"{tensors.folder}: config.json says that it is quantized by {stored.method}, but no "
            "tensor is: is this another model's config.json?"
        )
    if stored is PLAIN and (codes := _codes(tensors)) is not None:
        raise CheckpointError(
            f"{tensors.folder}: {codes} is {tensors.info(codes).dtype}, so this model is quantized "
            "in some way, but config.json does not say how: quantization_config is missing"
        )
    tensors.check(
        declared.shapes,
        tied=config.tie_word_embeddings,
        dtypes=declared.dtypes,
        ignores=stored.ignores,
    )
    for name in tensors.names():
        unused = name.endswith(".bias") and name not in declared.shapes
        if unused and tensors.read(name).any():
            raise CheckpointError(
                f"{tensors.folder}: {name} is not zero, and config.json knows no such bias: is "
                "this another model's config.json?"
            )


def _codes(tensors: CheckpointTensors) -> str | None:
    """A weight that is stored as something else than floats, under the names that formats use."""
    weights = (n for n in tensors.names() if n.endswith((".weight", ".qweight", ".weight_packed")))
    return next((name for name in weights if tensors.dtype_of(name) is None), None)


def weights_bytes(config: ModelConfig, dtype: torch.dtype | str | None = None) -> int:
    """What the weights will take in memory; `dtype` defaults to the config's own."""
    if dtype is not None:
        config = replace(config, dtype=str(dtype).removeprefix("torch."))
    return declare(config).num_bytes


def _check_memory(declared: Declared, platform: Platform) -> None:
    needed, available = declared.num_bytes + declared.largest_bytes, platform.available_bytes()
    if needed > available:
        raise NotEnoughMemory(
            f"loading the weights takes {needed / GIB:.2f} GiB and {available / GIB:.2f} GiB are "
            "free: use a smaller model or dtype, or a larger machine"
        )
