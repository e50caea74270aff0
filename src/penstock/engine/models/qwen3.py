"""Qwen3 (dense): RMS norms over each head's q and k before the rotary embedding, biases optional,
and a head_dim that is not hidden_size / heads."""

from __future__ import annotations

from dataclasses import replace

from penstock.engine.models.base import Family
from penstock.engine.models.config import ModelConfig, base_config, layer_windows
from penstock.engine.models.fields import Fields


def parse(fields: Fields) -> ModelConfig:
    config = base_config("qwen3", fields, default_head_dim=128)
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        config,
        qk_norm=True,
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        windows=layer_windows(fields, config.num_layers),
    )


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), parse)
