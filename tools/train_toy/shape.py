"""The toy's shape, and the Hugging Face configuration files that describe it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.train_toy.tokenizer import CONTEXT, CONTROL, VOCAB


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense Qwen3. All are multiples of 128, so that they split and quantize evenly."""

    vocab: int = VOCAB
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    inner: int = 1024
    context: int = CONTEXT
    theta: float = 10000.0
    epsilon: float = 1e-6


def model_config(shape: Shape) -> dict[str, Any]:
    end_of_text, _, end_of_turn = range(VOCAB - 9, VOCAB - 6)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rope_theta": shape.theta,
        "rms_norm_eps": shape.epsilon,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": end_of_turn,
        "pad_token_id": end_of_text,
        "torch_dtype": "bfloat16",
    }


def generation_config() -> dict[str, Any]:
    end_of_text, _, end_of_turn = range(VOCAB - 9, VOCAB - 6)
    return {
        "do_sample": False,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": end_of_text,
    }


def write_configs(shape: Shape, folder: Path) -> None:
    for name, content in (
        ("config.json", model_config(shape)),
        ("generation_config.json", generation_config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


assert CONTROL == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
