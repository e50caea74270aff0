"""GGUF files from checkpoints in Hugging Face layout, written with the `gguf` package: its writer,
its names of tensors and, where it has them, its quantizers. What llama.cpp's converter does beyond
that (the order of Llama's rows, Llama 3.1's rope factors) is done here in its words: as reshapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.constants import TokenType
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: ggml's name of a tensor, its shape -> ggml's name of the type to store it in.
ChooseType = Callable[[str, tuple[int, ...]], str]


def write_gguf(
    folder: Path,
    path: Path,
    kind: str | ChooseType = "F32",
    *,
    metadata: Mapping[str, Any] | None = None,
    pre: str = "gpt-2",
    leave_out: tuple[str, ...] = (),
    split_max_tensors: int = 0,
) -> Path:
    """The checkpoint in `folder` as `path`, matrices in `kind`, vectors in F32.

    `metadata` replaces entries (None: leaves them out); strings, ints, floats and bools only.
    `leave_out`: tensors, by ggml's names. With `split_max_tensors` the file is split as llama.cpp
    splits, and `path` must be named for that ("x.gguf" becomes "x-00001-of-00003.gguf").
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    found = {**_model_metadata(config, arch), **_tokenizer_metadata(folder, pre)}
    found |= metadata or {}
    for key, value in found.items():
        _add(writer, key, value)
    choose = kind if callable(kind) else lambda name, shape: kind
    for name, values in _tensors(folder, config, arch).items():
        if name in leave_out:
            continue
        chosen = choose(name, values.shape) if values.ndim > 1 else "F32"
        data, qtype = encode(values, chosen)
        writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized_copy(folder: Path, out: Path, gguf_path: Path) -> Path:
    """The checkpoint in `folder` with the weights that the GGUF file holds, in float32, as the
    `gguf` package reads them: what transformers computes with is then the oracle's."""
    from safetensors.torch import save_file

    config = transformers.AutoConfig.from_pretrained(folder)
    arch = ARCHITECTURES[config.model_type]
    read = {t.name: t for t in gguf.GGUFReader(gguf_path).tensors}
    tensors = {}
    for name, like in load_file(folder / "model.safetensors").items():
        tensor = read[_ggml_name(name, config, arch)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = _interleaved_heads(name, config, arch)
        values = values.reshape(like.shape)
        if heads:
            values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values).reshape(like.shape))
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.json"):
        (out / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def encode(values: np.ndarray, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """float32 values as raw data of a ggml type."""
    qtype = gguf.GGMLQuantizationType[kind]
    if kind in _K_QUANTS:
        return _K_QUANTS[kind](values), qtype
    return gguf.quants.quantize(np.ascontiguousarray(values), qtype), qtype


def q4_k_m(name: str, shape: tuple[int, ...]) -> str:
    """As llama.cpp mixes: Q6_K for the head and, in some layers, for v and down."""
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    if name in ("output.weight", "token_embd.weight"):
        return "Q6_K"
    more = ("attn_v" in name or "ffn_down" in name) and layer % 2 == 0
    return "Q6_K" if more else "Q4_K"


# --- what the gguf package can read but not write ---


def _pack_q4_k(values: np.ndarray) -> np.ndarray:
    """Plainly: each group's range, its scale and minimum in 6 bits of the block's largest."""
    x = values.reshape(-1, 8, 32)
    low = np.minimum(x.min(-1), 0.0)
    scale = (x.max(-1) - low) / 15
    d = (scale.max(-1, keepdims=True) / 63).astype(np.float16)
    dmin = (-low.min(-1, keepdims=True) / 63).astype(np.float16)
    sc = np.rint(scale / np.maximum(d.astype(np.float32), 1e-12)).clip(0, 63).astype(np.uint8)
    m = np.rint(-low / np.maximum(dmin.astype(np.float32), 1e-12)).clip(0, 63).astype(np.uint8)
    step = (d.astype(np.float32) * sc)[..., None]
    codes = np.rint((x + (dmin.astype(np.float32) * m)[..., None]) / np.maximum(step, 1e-12))
    codes = codes.clip(0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    packed = np.empty((len(x), 12), np.uint8)
    packed[:, :4] = sc[:, :4] | ((sc[:, 4:] >> 4) << 6)
    packed[:, 4:8] = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    packed[:, 8:] = (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    qs = (codes[:, :, 0] | (codes[:, :, 1] << 4)).reshape(len(x), 128)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, qs], axis=1)
    return blocks.reshape(*values.shape[:-1], -1)


def _pack_q6_k(values: np.ndarray) -> np.ndarray:
    x = values.reshape(-1, 16, 16)
    scale = np.abs(x).max(-1) / 31
    d = (scale.max(-1, keepdims=True) / 127).astype(np.float16)
    sc = np.rint(scale / np.maximum(d.astype(np.float32), 1e-12)).clip(-128, 127).astype(np.int8)
    step = np.maximum((d.astype(np.float32) * sc)[..., None], 1e-12)
    codes = (np.rint(x / step).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (codes[:, :, :2] & 15) | ((codes[:, :, 2:] & 15) << 4)
    high = codes >> 4
    high = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), sc.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, axis=1).reshape(*values.shape[:-1], -1)


_K_QUANTS = {"Q4_K": _pack_q4_k, "Q6_K": _pack_q6_k}


# --- tensors ---


def _ggml_name(name: str, config: Any, arch: str) -> str:
    number = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}[arch]
    found = gguf.get_tensor_name_map(number, config.num_hidden_layers).get_name(
        name, (".weight", ".bias")
    )
    assert found is not None, name
    return found


def _interleaved_heads(name: str, config: Any, arch: str) -> int:
    if arch == "llama" and ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if arch == "llama" and ".k_proj." in name else 0


def _tensors(folder: Path, config: Any, arch: str) -> dict[str, np.ndarray]:
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        if heads := _interleaved_heads(name, config, arch):
            halves = values.reshape(heads, 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        found[_ggml_name(name, config, arch)] = values
    if _rope(config).get("rope_type") == "llama3":
        found["rope_freqs.weight"] = _llama3_factors(config)
    return found


def _llama3_factors(config: Any) -> np.ndarray:
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / (_rope(config)["rope_theta"] ** exponents)
    return (plain / stretched).numpy()


# --- metadata ---


def _rope(config: Any) -> dict[str, Any]:
    return config.rope_parameters or {}


def _model_metadata(config: Any, arch: str) -> dict[str, Any]:
    rope = _rope(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    found: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
        f"{arch}.vocab_size": config.vocab_size,
    }
    if arch == "llama":
        found["llama.rope.dimension_count"] = head_dim
    if rope.get("rope_type") in ("linear", "yarn"):
        found[f"{arch}.rope.scaling.type"] = rope["rope_type"]
        found[f"{arch}.rope.scaling.factor"] = float(rope["factor"])
    if rope.get("rope_type") == "yarn":
        original = rope["original_max_position_embeddings"]
        found[f"{arch}.rope.scaling.original_context_length"] = original
    return found


def _tokenizer_metadata(folder: Path, pre: str) -> dict[str, Any]:
    """Of a byte-level tokenizer.json. Ids that have no text become tokens that are not used."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = text, int(TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in tokenizer["model"]["merges"]
        ],
        "tokenizer.ggml.add_bos_token": False,
    }
    for name in ("bos_token", "eos_token", "pad_token"):
        if settings.get(name):
            key = "padding" if name == "pad_token" else name.removesuffix("_token")
            found[f"tokenizer.ggml.{key}_token_id"] = tokens.index(settings[name])
    if settings.get("chat_template"):
        found["tokenizer.chat_template"] = settings["chat_template"]
    return found


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def sentencepiece_metadata(tokenizer_json: str) -> dict[str, Any]:
    """Of a tokenizer.json in Llama 2's form, scores by the rank of the merge that makes a piece, as
    SentencePiece's BPE has them."""
    tokenizer = json.loads(tokenizer_json)
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in tokenizer["model"]["merges"]]
    score = {left + right: -float(rank) for rank, (left, right) in enumerate(pairs)}
    kinds = {"<unk>": TokenType.UNKNOWN} | dict.fromkeys(special - {"<unk>"}, TokenType.CONTROL)
    types = [
        TokenType.BYTE if t.startswith("<0x") else kinds.get(t, TokenType.NORMAL) for t in tokens
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [score.get(t, -1e6) if t not in special else 0.0 for t in tokens],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.bos_token_id": vocab["<s>"],
        "tokenizer.ggml.eos_token_id": vocab["</s>"],
        "tokenizer.ggml.unknown_token_id": vocab["<unk>"],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": None,
    }
