"""The checkpoint that all engines run: random weights in a published model's dimensions."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QWEN3_0_6B = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Sizes:
    vocab_size: int
    kv_bytes_per_token: int  # bf16
    #: Elements of matrices, of which there are 2 bytes each in bf16, and rows of them.
    matrix_elements: int
    matrix_rows: int
    head_elements: int  # of them, in the tied embedding
    other_elements: int

    @property
    def bf16_bytes(self) -> int:
        return 2 * (self.matrix_elements + self.other_elements)

    @property
    def int8_bytes(self) -> int:
        """All matrices in 8 bits with a float32 scale for each output."""
        return self.matrix_elements + 4 * self.matrix_rows + 2 * self.other_elements

    def int4_bytes(self, group_size: int) -> int:
        """Linears in 4 bits with 4 bytes for each group of inputs (a scale and an offset in
        float16); the tied embedding in 8, as our scheme has it."""
        linears = self.matrix_elements - self.head_elements
        head = self.head_elements + 4 * self.vocab_size
        return linears // 2 + 4 * (linears // group_size) + head + 2 * self.other_elements


def make_model(folder: Path, dimensions: dict[str, Any] = QWEN3_0_6B) -> Path:
    """A checkpoint of random weights; kept, since writing 1.2 GB takes a while."""
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config

        torch.manual_seed(0)
        config = Qwen3Config(**dimensions, eos_token_id=dimensions["vocab_size"] - 1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        _make_tokenizer(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
    return folder


def _make_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word for every id: engines want a tokenizer, and a token without text is a chunk that a
    client cannot see."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def sizes(folder: Path) -> Sizes:
    """From the configuration and the headers of the weights' files."""
    config = json.loads((folder / "config.json").read_text())
    shapes = [shape for file in folder.glob("*.safetensors") for shape in _shapes(file)]
    matrices = [shape for shape in shapes if len(shape) == 2]
    kv_values = 2 * config["num_key_value_heads"] * config["head_dim"]
    return Sizes(
        vocab_size=config["vocab_size"],
        kv_bytes_per_token=2 * kv_values * config["num_hidden_layers"],
        matrix_elements=sum(rows * columns for rows, columns in matrices),
        matrix_rows=sum(rows for rows, _ in matrices),
        head_elements=sum(
            rows * columns for rows, columns in matrices if rows == config["vocab_size"]
        ),
        other_elements=sum(shape[0] for shape in shapes if len(shape) == 1),
    )


def _shapes(file: Path) -> list[list[int]]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return [what["shape"] for name, what in header.items() if name != "__metadata__"]
