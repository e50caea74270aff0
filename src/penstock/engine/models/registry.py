"""From the architecture's name in config.json to the family that can run it."""

from __future__ import annotations

from dataclasses import replace

from penstock.checkpoint import Checkpoint
from penstock.engine.models import llama, mistral, qwen2, qwen3
from penstock.engine.models.base import Family
from penstock.engine.models.config import ModelConfig
from penstock.engine.models.fields import Fields
from penstock.protocol.errors import CheckpointError, UnsupportedModel

FAMILIES = (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)

_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}


def supported_architectures() -> tuple[str, ...]:
    return tuple(_BY_ARCHITECTURE)


def family_of(checkpoint: Checkpoint) -> Family:
    """The first architecture of config.json that a family here covers.

    Raises `CheckpointError` if config.json names none, `UnsupportedModel` if none is covered.
    """
    fields = Fields(checkpoint.config)
    names = fields.strings("architectures")
    if not names:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} names no architectures: is this a language model?"
        )
    for name in names:
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    raise UnsupportedModel(
        f"{', '.join(names)} is not supported; supported: {', '.join(_BY_ARCHITECTURE)}"
    )


def family_named(name: str) -> Family:
    """The family of a `ModelConfig.family`."""
    return next(family for family in FAMILIES if family.name == name)


def model_config(checkpoint: Checkpoint, *, max_model_len: int | None = None) -> ModelConfig:
    """Reads and checks config.json; no tensor is touched.

    `dtype` is the checkpoint's own. Raises `CheckpointError` for a broken file,
    `UnsupportedModel` for a setting that no family here covers, `ConfigError` for a
    `max_model_len` that the positions do not reach.
    """
    config = family_of(checkpoint).parse(Fields(checkpoint.config))
    config = replace(config, eos_token_ids=_eos_token_ids(checkpoint, config.vocab_size))
    return config.with_max_model_len(max_model_len)


def _eos_token_ids(checkpoint: Checkpoint, vocab_size: int) -> tuple[int, ...]:
    try:
        found = checkpoint.eos_token_ids
    except (TypeError, ValueError):
        found = (-1,)
    for token in found:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise CheckpointError(
                f"eos_token_id of {checkpoint.path} is no token id below vocab_size = {vocab_size}"
            )
    return found
