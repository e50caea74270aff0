"""Qwen2 and Qwen2.5: biases on q, k and v whatever the config says; upper layers may slide."""

from __future__ import annotations

from dataclasses import replace

from penstock.engine.models.base import Family
from penstock.engine.models.config import ModelConfig, base_config, layer_windows
from penstock.engine.models.fields import Fields


def parse(fields: Fields) -> ModelConfig:
    config = base_config("qwen2", fields)
    return replace(config, qkv_bias=True, windows=layer_windows(fields, config.num_layers))


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), parse)
