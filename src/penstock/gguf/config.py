"""What a GGUF file's metadata says about the model, as the config.json and generation_config.json
that a checkpoint folder would have. The keys are those of ggml's docs/gguf.md."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.gguf.header import GgufTensor
from penstock.gguf.metadata import Metadata
from penstock.protocol.errors import CheckpointError, UnsupportedModel

#: ggml's name of an architecture -> Hugging Face's. Mistral's models are called "llama" too.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"

#: Of Llama 3.1, 3.2 and 3.3, which differ in `factor`.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def architecture(metadata: Metadata) -> str:
    """Raises `UnsupportedModel` for one that no family here covers."""
    name = metadata.text("general.architecture")
    if name not in ARCHITECTURES:
        raise metadata.unsupported("general.architecture", ", ".join(ARCHITECTURES))
    return name


def model_config(
    metadata: Metadata, tensors: Mapping[str, GgufTensor], rope_factors: Sequence[float]
) -> dict[str, Any]:
    """config.json. `rope_factors`: the file's `rope_freqs.weight`, empty where it has none.

    Raises `CheckpointError` for what is missing, `UnsupportedModel` for what is not supported.
    """
    arch = architecture(metadata)
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{metadata.path} holds no {EMBEDDING}: is it a language model?")
    _refuse_unsupported(metadata, arch)
    num_heads = _same_in_all_layers(metadata, f"{arch}.attention.head_count")
    hidden_size = metadata.integer(f"{arch}.embedding_length")
    window = metadata.integer(f"{arch}.attention.sliding_window", 0)
    hf_name = ARCHITECTURES[arch]
    if arch == "llama" and window:
        hf_name = ARCHITECTURES["mistral"]
    found = {
        "architectures": [hf_name],
        "vocab_size": tensors[EMBEDDING].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": _same_in_all_layers(metadata, f"{arch}.feed_forward_length"),
        "num_hidden_layers": metadata.integer(f"{arch}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _same_in_all_layers(
            metadata, f"{arch}.attention.head_count_kv", num_heads
        ),
        "head_dim": _head_dim(metadata, arch, hidden_size, num_heads),
        "max_position_embeddings": metadata.integer(f"{arch}.context_length"),
        "rms_norm_eps": metadata.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number(f"{arch}.rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(metadata, arch, rope_factors),
        "tie_word_embeddings": HEAD not in tensors,
        "sliding_window": window or None,
        "dtype": _dtype(tensors),
    }
    if arch != "qwen2":  # which has them whatever its config says
        found["attention_bias"] = "blk.0.attn_q.bias" in tensors
        found["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    quantized = Counter(t.type.name for t in tensors.values() if t.type.name not in _FLOATS)
    if quantized:
        found["quantization_config"] = {"quant_method": "gguf", "types": dict(quantized)}
    return found


def generation_config(metadata: Metadata, eos_token_ids: list[int]) -> dict[str, Any]:
    """generation_config.json: what ends an answer, and how the file's maker would sample."""
    found: dict[str, Any] = {"eos_token_id": eos_token_ids}
    for key, name in _SAMPLING.items():
        if key in metadata:
            found[name] = metadata.number(key)
    return found


def _refuse_unsupported(metadata: Metadata, arch: str) -> None:
    if metadata.integer(f"{arch}.expert_count", 0):
        raise metadata.unsupported(f"{arch}.expert_count", "0, models without experts")
    for key in ("rope.scaling.yarn_log_multiplier", "attention.scale", "logit_scale"):
        if metadata.number(f"{arch}.{key}", 0.0):
            raise metadata.unsupported(f"{arch}.{key}", "files without it")


def _same_in_all_layers(metadata: Metadata, key: str, default: int | None = None) -> int:
    """ggml allows a number for each layer; the families here have one for all."""
    if isinstance(metadata.get(key), list):
        found = set(metadata.integers(key))
        if len(found) != 1:
            raise metadata.unsupported(key, "one number for all layers")
        return found.pop()
    return metadata.integer(key, default)


def _head_dim(metadata: Metadata, arch: str, hidden_size: int, num_heads: int) -> int:
    head_dim = metadata.integer(f"{arch}.attention.key_length", hidden_size // max(1, num_heads))
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if metadata.integer(key, head_dim) != head_dim:
            raise metadata.unsupported(key, f"{head_dim}, the length of a key")
    return head_dim


def _rope_scaling(
    metadata: Metadata, arch: str, rope_factors: Sequence[float]
) -> dict[str, Any] | None:
    """Llama 3.1's scaling comes as a divisor for each frequency, `rope_factors`. Meta's own are
    called by their name, so that what is written from here can be read by others."""
    key = f"{arch}.rope.scaling"
    kind = metadata.text(f"{key}.type", "none")
    # How it was written before it had a type.
    factor = metadata.number(f"{arch}.rope.scale_linear", 1.0)
    factor = metadata.number(f"{key}.factor", factor)
    if kind == "none" and f"{key}.type" not in metadata and factor > 1.0:
        kind = "linear"
    found: dict[str, Any] = {"rope_type": "default"}
    if kind == "linear":
        found = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        found = _yarn(metadata, key, factor)
    elif kind != "none":
        raise metadata.unsupported(f"{key}.type", "none, linear, yarn")
    if rope_factors:
        if not all(math.isfinite(f) and f > 0.0 for f in rope_factors):
            raise CheckpointError(f"{metadata.path}: {ROPE_FACTORS} holds no divisors")
        theta = metadata.number(f"{arch}.rope.freq_base", 10_000.0)
        if kind == "none" and theta > 1.0:
            llama3 = _LLAMA3 | {"factor": max(rope_factors)}
            if _close(rope_factors, _llama3_factors(llama3, theta, rope_factors)):
                return llama3
        found["frequency_factors"] = list(rope_factors)
    return found if len(found) > 1 else None


def _llama3_factors(scaling: Mapping[str, Any], theta: float, like: Sequence[float]) -> list[float]:
    """What each frequency is divided by, as transformers has it for rope_type llama3."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    found = []
    for i in range(len(like)):
        wavelength = 2 * math.pi * theta ** (i / len(like))
        kept = (original / wavelength - low) / (high - low)
        kept = min(1.0, max(0.0, kept))  # 1: a wave so short that it is left as it is
        found.append(1 / ((1 - kept) / factor + kept))
    return found


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(a, b, strict=True))


def _yarn(metadata: Metadata, key: str, factor: float) -> dict[str, Any]:
    if metadata.number(f"{key}.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise metadata.unsupported(f"{key}.yarn_ext_factor", "1, all of the extrapolation")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": metadata.number(f"{key}.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number(f"{key}.yarn_beta_slow", 1.0),
    }
    if f"{key}.original_context_length" in metadata:
        found["original_max_position_embeddings"] = metadata.integer(
            f"{key}.original_context_length"
        )
    scale = metadata.number(f"{key}.attn_factor", 1.0)
    scale *= metadata.number(f"{key}.yarn_attn_factor", 1.0)
    if scale != 1.0:
        found["attention_factor"] = scale * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return found


def _dtype(tensors: Mapping[str, GgufTensor]) -> str:
    """Of the matrices. Those in few bits were bfloat16 before, as nearly all models are."""
    values: Counter[str] = Counter()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            values[_FLOATS.get(tensor.type.name, "bfloat16")] += math.prod(tensor.shape)
    if not values:
        raise UnsupportedModel("a GGUF file without matrices")
    return values.most_common(1)[0][0]
