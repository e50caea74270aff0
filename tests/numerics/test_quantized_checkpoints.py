"""Whole models in every quantized format that is read, against transformers running what those
weights mean in float32."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.quantized_checkpoints import WRITERS, FormatWriter
from tests.numerics.test_models import FLOAT32_TOLERANCE, Engine, oracle_of, prompt

from penstock.engine.platforms.base import Platform
from penstock.engine.platforms.cpu.platform import CpuPlatform


class Plain(Platform):
    """No kernels: weights are dequantized, so that their reading alone is judged."""

    def available_bytes(self) -> int:
        return 1 << 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases beside quantized weights, and an output head of its own."""
    return make_checkpoint(tmp_path_factory.mktemp("plain"), "qwen2", seed=5)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    return make_checkpoint(folder, "qwen3", seed=6, tie_word_embeddings=True)


def expected(writer: FormatWriter, source: Path, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    oracle = oracle_of(writer.write(source, folder, dequantized=True))
    with torch.inference_mode():
        found: torch.Tensor = oracle(ids[None]).logits[0].float()
    return found


def logits(folder: Path, ids: torch.Tensor, platform: Platform) -> torch.Tensor:
    return Engine(folder, "reference", platform=platform).step((0, 0, ids))[0]


@pytest.mark.parametrize("name", WRITERS)
def test_as_the_dequantized_model(name: str, source: Path, tmp_path: Path) -> None:
    """To float32's precision without kernels; with those of this machine within what 8-bit
    activations cost."""
    writer, ids = WRITERS[name], prompt()
    exact = expected(writer, source, tmp_path / "float", ids)
    folder = writer.write(source, tmp_path / "quantized")
    found = logits(folder, ids, Plain("cpu"))
    assert (found - exact).abs().max() < FLOAT32_TOLERANCE
    fast = logits(folder, ids, CpuPlatform())
    assert (fast - exact).square().mean().sqrt() < 0.05 * exact.std()


@pytest.mark.parametrize("name", ["awq-32", "ct-packed-4-asym", "fp8-blocks"])
def test_tied_embeddings_stay_plain(name: str, tied: Path, tmp_path: Path) -> None:
    writer, ids = WRITERS[name], prompt()
    exact = expected(writer, tied, tmp_path / "float", ids)
    folder = writer.write(tied, tmp_path / "quantized")
    found = logits(folder, ids, Plain("cpu"))
    assert (found - exact).abs().max() < FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", ["gptq-4-asym", "ct-int8-channel", "fp8-tensor"])
def test_a_quantized_head(name: str, source: Path, tmp_path: Path) -> None:
    writer, ids = copy.deepcopy(WRITERS[name]), prompt()
    writer.plain = ("embed_tokens", "norm")
    if "ignore" in writer.config:
        writer.config["ignore"] = []
    exact = expected(writer, source, tmp_path / "float", ids)
    found = logits(writer.write(source, tmp_path / "quantized"), ids, Plain("cpu"))
    assert (found - exact).abs().max() < FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("awq-32", None),
        ("gptq-8-row", None),
        ("ct-packed-4", "re:.*layers\\.0\\.self_attn\\.q_proj"),
        ("ct-int8-channel", "model.layers.0.self_attn.q_proj"),
        ("fp8-blocks", None),
    ],
)
def test_a_part_of_a_merged_linear_is_plain(
    name: str, ignored: str | None, source: Path, tmp_path: Path
) -> None:
    """q is not quantized, k and v are: they are one linear here."""
    writer, ids = copy.deepcopy(WRITERS[name]), prompt()
    writer.plain += ("layers.0.self_attn.q_proj",)
    if ignored is not None:
        writer.config["ignore"].append(ignored)
    exact = expected(writer, source, tmp_path / "float", ids)
    found = logits(writer.write(source, tmp_path / "quantized"), ids, Plain("cpu"))
    assert (found - exact).abs().max() < FLOAT32_TOLERANCE


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_settings_in_a_file_of_their_own(file: str, source: Path, tmp_path: Path) -> None:
    """As AutoGPTQ and AutoAWQ wrote them once."""
    name = "gptq-4-asym" if file == "quantize_config.json" else "awq-32"
    writer, ids = copy.deepcopy(WRITERS[name]), prompt()
    settings = {k: v for k, v in writer.config.items() if k != "quant_method"}
    writer.config, writer.files = {}, {file: settings}
    exact = expected(writer, source, tmp_path / "float", ids)
    folder = writer.write(source, tmp_path / "quantized")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    found = logits(folder, ids, Plain("cpu"))
    assert (found - exact).abs().max() < FLOAT32_TOLERANCE


def test_groups_of_several_kinds(source: Path, tmp_path: Path) -> None:
    """compressed-tensors' mixed precision: int4 for the MLP, by expression, int8 for the rest."""
    mlp, rest = WRITERS["ct-packed-4"], WRITERS["ct-int8-channel"]
    ids = prompt()
    first = copy.deepcopy(mlp)
    first.plain += ("self_attn",)
    second = copy.deepcopy(rest)
    second.plain += ("mlp",)

    def both(dequantized: bool) -> Path:
        half = tmp_path / f"half{dequantized}"
        whole = tmp_path / f"whole{dequantized}"
        # The MLP's stored tensors have other names, and its scales are no matrices of weights.
        second.plain += ("weight_scale", "weight_packed", "weight_shape")
        return second.write(
            first.write(source, half, dequantized=dequantized), whole, dequantized=dequantized
        )

    exact_folder = both(True)
    oracle: Any = oracle_of(exact_folder)
    with torch.inference_mode():
        exact = oracle(ids[None]).logits[0].float()
    folder = both(False)
    config = json.loads((folder / "config.json").read_text())
    mlp_group = dict(mlp.config["config_groups"]["group_0"])
    mlp_group |= {"targets": ["re:.*mlp\\..*_proj$"], "format": "pack-quantized"}
    rest_group = dict(rest.config["config_groups"]["group_0"]) | {"format": "int-quantized"}
    config["quantization_config"] |= {
        "format": "mixed-precision",
        "config_groups": {"group_0": rest_group, "group_1": mlp_group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    found = logits(folder, ids, Plain("cpu"))
    assert (found - exact).abs().max() < FLOAT32_TOLERANCE
