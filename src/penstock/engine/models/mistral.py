"""Mistral and Mistral Nemo: one sliding window for all layers (null: none), and never a bias."""

from __future__ import annotations

from dataclasses import replace

from penstock.engine.models.base import Family
from penstock.engine.models.config import ModelConfig, base_config
from penstock.engine.models.fields import Fields


def parse(fields: Fields) -> ModelConfig:
    config = base_config("mistral", fields)
    window = fields.optional_integer("sliding_window", 4096)
    return replace(config, windows=(window,) * config.num_layers)


FAMILY = Family("mistral", ("MistralForCausalLM",), parse)
