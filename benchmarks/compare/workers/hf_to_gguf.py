"""A Qwen3 checkpoint as a bf16 GGUF file, and that quantized by llama.cpp's own quantizer.

    PYTHON hf_to_gguf.py MODEL OUT.gguf              (bf16)
    PYTHON hf_to_gguf.py BF16.gguf OUT.gguf q8_0     (or q4_0)

llama-cpp-python does not bring llama.cpp's converter. This one writes what `llama.cpp` reads of the
architecture `qwen3` (tensor names: the `gguf` package's constants) and no vocabulary: token ids are
all that a benchmark has. Needs numpy, gguf and, for quantizing, llama_cpp.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER[rest.removesuffix('.weight')]}.weight"


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Names and float32 values; the file is read by hand, since numpy has no bfloat16."""
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, dtype=np.uint8, mode="r")
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        for name, what in header.items():
            if what["dtype"] != "BF16":
                raise SystemExit(f"{name} is {what['dtype']}; only BF16 is converted")
            start, end = (8 + length + offset for offset in what["data_offsets"])
            bits = np.frombuffer(data[start:end].tobytes(), dtype=np.uint16)
            values = (bits.astype(np.uint32) << 16).view(np.float32)
            yield name, values.reshape(what["shape"])


def convert(folder: Path, out: Path) -> None:
    import gguf
    from gguf.quants import quantize

    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config
    kind = gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(out, "qwen3")
    writer.add_name("random weights")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, values in tensors(folder):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_file(source: Path, out: Path, scheme: str) -> None:
    """As `llama-quantize` does it: the output head is kept in more bits where it sees fit."""
    import llama_cpp as llama

    types = {"q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0}
    params = llama.llama_model_quantize_default_params()
    params.ftype = types[scheme]
    params.nthread = 2
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        raise SystemExit(f"llama.cpp does not quantize to {scheme}")


def main() -> None:
    source, out, *scheme = sys.argv[1:]
    if scheme:
        quantize_file(Path(source), Path(out), scheme[0])
    else:
        convert(Path(source), Path(out))


if __name__ == "__main__":
    main()
