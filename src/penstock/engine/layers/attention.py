"""Attention of one layer: q, k and v from one linear, norms where a family has them, rotation, and
the backend; and the backend for models whose layers have different windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock.engine.attention.base import AttentionBackend, AttentionRow, AttentionShape
from penstock.engine.layers.weights import Weights
from penstock.engine.models.config import ModelConfig
from penstock.engine.platforms.base import QkNorms


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one step share."""

    cos: torch.Tensor  # [T, D], as `Platform.rope_` wants it
    sin: torch.Tensor
    attention: AttentionBackend


class SelfAttention:
    def __init__(self, config: ModelConfig, layer: int, weights: Weights, prefix: str) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._platform = weights.platform
        self._layer = layer
        self._dim = dim
        self._splits = (heads * dim, kv_heads * dim, kv_heads * dim)
        self._qkv = weights.linear(
            config.hidden_size,
            {
                f"{prefix}.q_proj": heads * dim,
                f"{prefix}.k_proj": kv_heads * dim,
                f"{prefix}.v_proj": kv_heads * dim,
            },
            bias=config.qkv_bias,
        )
        self._out = weights.linear(
            heads * dim, {f"{prefix}.o_proj": config.hidden_size}, bias=config.attention_out_bias
        )
        self._norms: QkNorms | None = None
        if config.qk_norm:
            q_D, k_D = (weights.vector(f"{prefix}.{x}_norm.weight", dim) for x in "qk")
            self._norms = QkNorms(q_D, k_D, config.rms_norm_eps)

    def __call__(self, x_TE: torch.Tensor, step: Step) -> torch.Tensor:
        """x_TE: normed hidden states [T, hidden]. Returns the attention's share of the residual."""
        parts = self._qkv(x_TE).split(self._splits, dim=-1)
        q_THD, k_TGD, v_TGD = (part.unflatten(-1, (-1, self._dim)) for part in parts)
        self._platform.rope_(q_THD, k_TGD, step.cos, step.sin, self._norms)
        out_THD = step.attention.run(self._layer, q_THD, k_TGD, v_TGD)
        return self._out(out_THD.flatten(1))


def build_attention(
    config: ModelConfig, make: Callable[[AttentionShape], AttentionBackend]
) -> AttentionBackend:
    """The backend that `Decoder.forward` wants. `make` is called once for each distinct window,
    mostly once: `lambda shape: platform.attention(shape, memory, dtype, name)`."""
    backends = {window: make(attention_shape(config, window)) for window in distinct(config)}
    if len(backends) == 1:
        return backends[config.windows[0]]
    return LayeredAttention([backends[window] for window in config.windows])


def distinct(config: ModelConfig) -> list[int | None]:
    """The windows that occur among the layers, in order of appearance."""
    return list(dict.fromkeys(config.windows))


def attention_shape(config: ModelConfig, window: int | None) -> AttentionShape:
    return AttentionShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.attention_scale,
        sliding_window=window,
    )


class LayeredAttention:
    """Layers with different windows over one memory: each asks the backend of its own shape."""

    def __init__(self, backend_of_layer: list[AttentionBackend]) -> None:
        self._backend_of_layer = backend_of_layer
        self._distinct = list({id(backend): backend for backend in backend_of_layer}.values())
        self.name = self._distinct[0].name

    @staticmethod
    def unsupported(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
        """Each layer's backend has been asked when it was chosen."""
        return None

    def plan(self, rows: list[AttentionRow]) -> None:
        for backend in self._distinct:
            backend.plan(rows)

    def run(
        self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        return self._backend_of_layer[layer].run(layer, q_THD, k_TGD, v_TGD)
