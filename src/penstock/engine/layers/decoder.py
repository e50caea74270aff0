"""The decoder-only transformer that all families here are: pre-norm attention and gated MLP blocks
between a token embedding and an output head. What differs is in `ModelConfig`.

Shapes: T flat tokens of all sequences of a step, E hidden size, I intermediate size, V vocabulary,
R rows whose logits are wanted. Tensor names are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from penstock.engine.attention.base import AttentionBackend
from penstock.engine.layers.attention import SelfAttention, Step
from penstock.engine.layers.rotary import Rotary
from penstock.engine.layers.weights import Weights
from penstock.engine.models.config import ModelConfig
from penstock.engine.platforms.base import Linear


class GatedMlp:
    """down(silu(gate(x)) * up(x)), gate and up in one linear."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self._platform = weights.platform
        self._gate_up = weights.linear(
            hidden,
            {f"{prefix}.gate_proj": inner, f"{prefix}.up_proj": inner},
            bias=config.mlp_bias,
        )
        self._down = weights.linear(inner, {f"{prefix}.down_proj": hidden}, bias=config.mlp_bias)

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self._down(self._platform.silu_mul(self._gate_up(x_TE)))


class DecoderLayer:
    """Norms come before attention and MLP; the one of the next layer is the caller's to apply,
    together with the addition to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        prefix = f"model.layers.{layer}"
        self._platform = weights.platform
        self._eps = config.rms_norm_eps
        hidden = config.hidden_size
        self.input_norm_E = weights.vector(f"{prefix}.input_layernorm.weight", hidden)
        self._attention = SelfAttention(config, layer, weights, f"{prefix}.self_attn")
        self._mlp_norm_E = weights.vector(f"{prefix}.post_attention_layernorm.weight", hidden)
        self._mlp = GatedMlp(config, weights, f"{prefix}.mlp")

    def __call__(
        self, hidden_TE: torch.Tensor, normed_TE: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """Adds the attention's share to hidden in place; returns the MLP's, still to be added."""
        share_TE = self._attention(normed_TE, step)
        normed_TE = self._platform.add_rms_norm_(hidden_TE, share_TE, self._mlp_norm_E, self._eps)
        return self._mlp(normed_TE)


class Decoder:
    """Takes its tensors from `weights` in the order in which they are used.

    With tied embeddings one matrix serves both ends.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.dtype = weights.dtype
        self._platform = weights.platform
        self._rotary = Rotary(config.rope, config.head_dim, config.max_model_len, weights.platform)
        vocab, hidden = config.vocab_size, config.hidden_size
        self._embed: Callable[[torch.Tensor], torch.Tensor]
        self._head: Linear
        if config.tie_word_embeddings:
            tied = weights.tied_embedding("model.embed_tokens", vocab, hidden)
            self._embed, self._head = tied.embed, tied.head
        else:
            embedding_VE = weights.embedding("model.embed_tokens", vocab, hidden)
            self._embed = partial(self._platform.embedding, matrix_VE=embedding_VE)
        self._layers = [DecoderLayer(config, i, weights) for i in range(config.num_layers)]
        #: Of each layer's input, and of the whole's output.
        self._norms_E = [layer.input_norm_E for layer in self._layers]
        self._norms_E.append(weights.vector("model.norm.weight", hidden))
        if not config.tie_word_embeddings:
            self._head = weights.linear(hidden, {"lm_head": vocab}, bias=False)

    def forward(
        self,
        input_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        """Final hidden states [T, E], normed. `attention` has been planned for these tokens, made
        by `build_attention`; positions are int64 and count from the start of each sequence."""
        cos_TD, sin_TD = self._rotary.cos_sin(positions_T)
        step = Step(cos_TD, sin_TD, attention)
        hidden_TE, eps = self._embed(input_ids_T), self.config.rms_norm_eps
        normed_TE = self._platform.rms_norm(hidden_TE, self._norms_E[0], eps)
        for layer, norm_E in zip(self._layers, self._norms_E[1:], strict=True):
            share_TE = layer(hidden_TE, normed_TE, step)
            normed_TE = self._platform.add_rms_norm_(hidden_TE, share_TE, norm_E, eps)
        return normed_TE

    def logits(self, hidden_RE: torch.Tensor) -> torch.Tensor:
        """float32 [R, V] for the rows asked for, which is usually one a sequence."""
        return self._head(hidden_RE).float()
