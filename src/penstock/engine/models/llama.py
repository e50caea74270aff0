"""Llama 2, 3, 3.1, 3.2 and what has their layout: the plain decoder, with optional biases."""

from __future__ import annotations

from dataclasses import replace

from penstock.engine.models.base import Family
from penstock.engine.models.config import ModelConfig, base_config
from penstock.engine.models.fields import Fields


def parse(fields: Fields) -> ModelConfig:
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        base_config("llama", fields, kv_heads_required=False),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


FAMILY = Family("llama", ("LlamaForCausalLM",), parse)
