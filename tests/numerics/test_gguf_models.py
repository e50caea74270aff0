"""Models from GGUF files against transformers with the weights that the `gguf` package reads from
the same files, in float32: names, the order of rows, rotary embeddings and the quantized types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.helpers.checkpoints import LLAMA3, YARN, make_checkpoint
from tests.helpers.gguf_files import ChooseType, dequantized_copy, q4_k_m, write_gguf

from penstock.checkpoint import Checkpoint, resolve
from penstock.engine.attention.base import AttentionRow
from penstock.engine.layers.attention import build_attention
from penstock.engine.loading.loader import load_model
from penstock.engine.platforms.base import Platform
from penstock.engine.platforms.cpu.platform import CpuPlatform

#: Of logits with a standard deviation of about 1.
FLOAT32_TOLERANCE = 3e-5
LENGTH = 40

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}

VARIANTS: dict[str, tuple[str, ChooseType | str, dict[str, Any]]] = {
    "llama-f32": ("llama", "F32", {}),
    "llama-f16": ("llama", "F16", {"num_attention_heads": 8, "head_dim": 16}),
    "llama-bf16": ("llama", "BF16", {"num_key_value_heads": 4}),
    "llama-q8_0": ("llama", "Q8_0", {}),
    "llama-q4_0-tied": ("llama", "Q4_0", {"tie_word_embeddings": True}),
    "llama-q4_1": ("llama", "Q4_1", {}),
    "llama-q5_0": ("llama", "Q5_0", {}),
    "llama-q5_1": ("llama", "Q5_1", {}),
    "llama-q4_k": ("llama", "Q4_K", WIDE),
    "llama-q4_k_m": ("llama", q4_k_m, {**WIDE, "num_hidden_layers": 3}),
    "llama3": ("llama", "Q8_0", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-biases": ("llama", "F32", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", "F32", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "mistral-head-dim": ("mistral", "Q8_0", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", "Q8_0", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", "F16", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    "qwen3": ("qwen3", "Q4_0", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3-q4_k_m": ("qwen3", q4_k_m, {**WIDE, "head_dim": 64}),
}


class Plain(Platform):
    """Weights in few bits become floats here, so that nothing but the weights is rounded."""

    def available_bytes(self) -> int:
        return 1 << 40


def logits(checkpoint: Checkpoint, platform: Platform, ids: torch.Tensor) -> torch.Tensor:
    model, config = load_model(checkpoint, platform, "float32")
    num_blocks = -(-len(ids) // 16)
    memory = platform.kv_memory(config.kv_layout(), num_blocks, 1, num_blocks)
    for block in range(num_blocks):
        memory.map(0, block, block)
    attention = build_attention(
        config, lambda shape: platform.attention(shape, memory, model.dtype, "auto")
    )
    with torch.inference_mode():
        attention.plan([AttentionRow(0, 0, len(ids))])
        return model.logits(model.forward(ids, torch.arange(len(ids)), attention))


def oracle(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return model(ids[None]).logits[0].float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_the_dequantized_model(variant: str, tmp_path: Path) -> None:
    family, kind, overrides = VARIANTS[variant]
    folder = make_checkpoint(tmp_path / "hf", family, **overrides)
    file = write_gguf(folder, tmp_path / "model.gguf", kind)
    same = dequantized_copy(folder, tmp_path / "same", file)
    ids = torch.randint(384, (LENGTH,), generator=torch.Generator().manual_seed(5))
    expected = oracle(same, ids)
    found = logits(resolve(str(file)), Plain(), ids)
    assert expected.std() > 0.3, "logits too flat to tell right from wrong"
    torch.testing.assert_close(found, expected, atol=FLOAT32_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_K", "mixed"])
def test_the_cpu_platform_computes_the_same_model(kind: str, tmp_path: Path) -> None:
    """Its kernels round activations, so this is about being the same model, not the last bits."""
    folder = make_checkpoint(tmp_path / "hf", "llama", **WIDE)
    file = write_gguf(folder, tmp_path / "model.gguf", q4_k_m if kind == "mixed" else kind)
    ids = torch.randint(384, (LENGTH,), generator=torch.Generator().manual_seed(6))
    exact = logits(resolve(str(file)), Plain(), ids)
    found = logits(resolve(str(file)), CpuPlatform(), ids)
    assert (found - exact).abs().max() < 0.25 * exact.std()
    assert (found - exact).abs().mean() < 0.03 * exact.std()


def test_a_type_that_only_the_package_reads_is_dequantized(tmp_path: Path) -> None:
    """TQ2_0 has no code here: the gguf package turns it into floats."""
    folder = make_checkpoint(tmp_path / "hf", "qwen3", **WIDE, head_dim=64)
    file = write_gguf(folder, tmp_path / "model.gguf", "TQ2_0")
    same = dequantized_copy(folder, tmp_path / "same", file)
    ids = torch.arange(20)
    torch.testing.assert_close(
        logits(resolve(str(file)), Plain(), ids), oracle(same, ids), atol=1e-4, rtol=1e-4
    )
