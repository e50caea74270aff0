"""What the runner sees of a model, and what a family says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.engine.attention.base import AttentionBackend
from penstock.engine.layers.decoder import Decoder
from penstock.engine.layers.weights import Weights
from penstock.engine.models.config import ModelConfig
from penstock.engine.models.fields import Fields


class Model(Protocol):
    """Call it under `torch.inference_mode()`. Its attention comes from
    `layers.attention.build_attention`, which knows that layers may differ."""

    config: ModelConfig
    dtype: torch.dtype

    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        """Final hidden states [T, E] of the flat tokens `attention` has been planned for."""

    def logits(self, hidden_RE: torch.Tensor) -> torch.Tensor:
        """float32 [R, V] for the rows asked for."""


@dataclass(frozen=True, slots=True)
class Family:
    """`parse` reads config.json; `build` takes the tensors it needs from `Weights`, in order."""

    name: str
    architectures: tuple[str, ...]
    parse: Callable[[Fields], ModelConfig]
    build: Callable[[ModelConfig, Weights], Model] = Decoder
