"""A model family: which architectures it covers, how to read its config, how to build it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.engine.layers.decoder import Decoder
from penstock.engine.layers.weights import Weights
from penstock.engine.models.config import ModelConfig
from penstock.engine.models.fields import Fields


@dataclass(frozen=True, slots=True)
class Family:
    """`parse` reads config.json; `build` takes the tensors it needs from `Weights`, in order."""

    name: str
    architectures: tuple[str, ...]
    parse: Callable[[Fields], ModelConfig]
    build: Callable[[ModelConfig, Weights], Decoder] = Decoder
