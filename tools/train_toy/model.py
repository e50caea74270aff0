"""Qwen3 in plain torch, laid out for fast training on few cores.

Attention is written out rather than left to `scaled_dot_product_attention`: compiled, and at the
short sequences trained on here, that is about half as fast again on a CPU, and the mask that
keeps packed documents apart costs nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from tools.train_toy.shape import Shape, write_configs
from torch import Tensor, nn


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * weight.float()).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q = nn.Linear(shape.hidden, query, bias=False)
        self.k = nn.Linear(shape.hidden, key, bias=False)
        self.v = nn.Linear(shape.hidden, key, bias=False)
        self.o = nn.Linear(query, shape.hidden, bias=False)
        self.gate = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.up = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.hidden, bias=False)
        self.norm_in = nn.Parameter(torch.ones(shape.hidden))
        self.norm_mid = nn.Parameter(torch.ones(shape.hidden))
        self.norm_q = nn.Parameter(torch.ones(shape.head_dim))
        self.norm_k = nn.Parameter(torch.ones(shape.head_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        s, (rows, length, _) = self.shape, x.shape
        groups = s.heads // s.kv_heads
        y = _norm(x, self.norm_in, s.epsilon)
        q = _norm(self.q(y).view(rows, length, s.heads, s.head_dim), self.norm_q, s.epsilon)
        k = _norm(self.k(y).view(rows, length, s.kv_heads, s.head_dim), self.norm_k, s.epsilon)
        v = self.v(y).view(rows, length, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin).transpose(1, 2), _rotate(k, cos, sin).transpose(1, 2)
        # Query heads that share a key head are stacked along the sequence: one product for all.
        q = q.reshape(rows, s.kv_heads, groups * length, s.head_dim)
        scores = (q @ k.transpose(-1, -2)).view(rows, s.kv_heads, groups, length, length)
        weights = (scores.float() * s.head_dim**-0.5 + bias).softmax(-1).to(v.dtype)
        mixed = weights.view(rows, s.kv_heads, groups * length, length) @ v
        mixed = mixed.view(rows, s.heads, length, s.head_dim).transpose(1, 2)
        x = x + self.o(mixed.reshape(rows, length, -1))
        y = _norm(x, self.norm_mid, s.epsilon)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Toy(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        frequency = shape.theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.arange(shape.context)[:, None, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
                if name.endswith(("o.weight", "down.weight")):
                    # Residual branches start small, so that depth does not inflate the stream.
                    parameter.data.mul_((2 * self.shape.layers) ** -0.5)

    def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Logits. `documents` numbers the document of each token; others are not attended to."""
        length = tokens.shape[1]
        # The embedding stays in float32, where the many small gradients of a frequent token add up
        # without loss; everything between it and the logits runs in the type of the layers.
        kind = self.layers[0].q.weight.dtype
        x = self.embed(tokens).to(kind)
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        same = documents[:, :, None] == documents[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        bias = torch.where(same & causal, 0.0, -1e9)[:, None, None]
        for layer in self.layers:
            x = layer(x, cos, sin, bias)
        return F.linear(_norm(x, self.norm, self.shape.epsilon), self.embed.weight.to(kind))


def loss_sum(model: Toy, tokens: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of next-token losses; `weights` are those of the tokens to predict."""
    logits = model(tokens[:, :-1], documents[:, :-1])
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights[:, 1:].flatten()).sum()


_LAYER_NAMES = {
    "q.weight": "self_attn.q_proj.weight",
    "k.weight": "self_attn.k_proj.weight",
    "v.weight": "self_attn.v_proj.weight",
    "o.weight": "self_attn.o_proj.weight",
    "norm_q": "self_attn.q_norm.weight",
    "norm_k": "self_attn.k_norm.weight",
    "gate.weight": "mlp.gate_proj.weight",
    "up.weight": "mlp.up_proj.weight",
    "down.weight": "mlp.down_proj.weight",
    "norm_in": "input_layernorm.weight",
    "norm_mid": "post_attention_layernorm.weight",
}


def _names(shape: Shape) -> dict[str, str]:
    """Our parameter names and the Hugging Face ones. The output head is the embedding."""
    names = {"embed.weight": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    for i in range(shape.layers):
        for ours, theirs in _LAYER_NAMES.items():
            names[f"layers.{i}.{ours}"] = f"model.layers.{i}.{theirs}"
    return names


def export(state: dict[str, Tensor], shape: Shape, folder: Path) -> None:
    """Write weights (bf16) and configs; the weights appear whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    names = _names(shape)
    weights = {
        names[ours]: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for ours, tensor in state.items()
    }
    write_configs(shape, folder)
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")


def load_exported(shape: Shape, folder: Path) -> dict[str, Tensor]:
    weights = load_file(folder / "model.safetensors")
    return {ours: weights[theirs] for ours, theirs in _names(shape).items()}
