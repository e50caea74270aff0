"""`--quantization` from flag to memory: what is declared, what fits, what doctor says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.checkpoints import make_checkpoint

from penstock.checkpoint import Checkpoint
from penstock.cli.flags import engine_arguments
from penstock.cli.main import main
from penstock.cli.worker import worker_config
from penstock.engine.config import EngineConfig
from penstock.engine.loading.loader import declare, load_model
from penstock.engine.models.config import ModelConfig
from penstock.engine.platforms.base import Linear, Platform, TiedEmbedding
from penstock.engine.quantization.schemes import INT4, INT8
from penstock.engine.quantization.select import Quantization
from penstock.engine.quantization.weight import QuantizedWeight
from penstock.protocol.errors import NotEnoughMemory


class FewBits(Platform):
    """A machine of a given size with kernels for 4 and 8 bits, if `able`."""

    def __init__(self, free_bytes: int = 1 << 40, *, able: bool = True) -> None:
        super().__init__("cpu")
        self.free_bytes = free_bytes
        self.able = able
        self.few_bits: list[QuantizedWeight] = []

    def available_bytes(self) -> int:
        return self.free_bytes

    def quantized_kernel(
        self, weight: QuantizedWeight, dtype: torch.dtype, *, embedding: bool = False
    ) -> str | None:
        return "ours" if self.able else None

    def make_quantized_linear(
        self, weight: QuantizedWeight, bias_N: torch.Tensor | None, dtype: torch.dtype
    ) -> Linear:
        self.few_bits.append(weight)
        return super().make_quantized_linear(weight, bias_N, dtype)

    def make_quantized_embedding(
        self, weight: QuantizedWeight, dtype: torch.dtype
    ) -> TiedEmbedding:
        self.few_bits.append(weight)
        return super().make_quantized_embedding(weight, dtype)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    return make_checkpoint(folder, "qwen2", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    return make_checkpoint(folder, "qwen3", hidden_size=128, tie_word_embeddings=True)


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig.from_checkpoint(Checkpoint(folder))


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_declared_is_what_is_made(scheme: Any, kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    platform = FewBits()
    wanted = Quantization(scheme=scheme, head=INT8, keep_bits=False)
    declared = declare(config_of(folder), platform, wanted)
    plain = declare(config_of(folder))
    assert declared.shapes == plain.shapes  # all of them are read
    load_model(Checkpoint(folder), platform, "float32", quantization=scheme.name)
    assert declared.counted.kernel_counts == {"ours": len(platform.few_bits)}
    linears = sum(weight.codes_NK.numel() for weight in platform.few_bits)
    kept = sum(weight.num_bytes for weight in platform.few_bits)
    assert declared.num_bytes == plain.num_bytes - 4 * linears + kept
    head = platform.few_bits[0 if kind == "tied" else -1]
    assert head.shape == (384, 128) and head.bits == 8
    assert sum(weight.shape[0] == 384 for weight in platform.few_bits) == 1


def test_without_kernels_floats_are_counted(untied: Path) -> None:
    wanted = Quantization(scheme=INT4, head=INT8, keep_bits=False)
    declared = declare(config_of(untied), FewBits(able=False), wanted)
    assert declared.num_bytes == declare(config_of(untied)).num_bytes
    assert list(declared.counted.kernel_counts) == ["dequantized"]


def test_what_fits_only_in_few_bits(untied: Path) -> None:
    free = declare(config_of(untied)).num_bytes * 9 // 10
    checkpoint = Checkpoint(untied)
    with pytest.raises(NotEnoughMemory, match="GiB are free"):
        load_model(checkpoint, FewBits(free), "float32")
    load_model(checkpoint, FewBits(free), "float32", quantization="int4")
    with pytest.raises(NotEnoughMemory):
        load_model(checkpoint, FewBits(free, able=False), "float32", quantization="int4")


def test_random_weights_in_few_bits(untied: Path) -> None:
    platform = FewBits()
    checkpoint = Checkpoint(untied)
    load_model(checkpoint, platform, "float32", load_format="dummy", quantization="int8")
    assert len(platform.few_bits) == 4 * 2 + 1
    assert all(weight.dequantize().std() == pytest.approx(0.02, rel=0.05)
               for weight in platform.few_bits)  # fmt: skip


def test_progress_ends_at_one(untied: Path) -> None:
    seen: list[float] = []
    load_model(Checkpoint(untied), FewBits(), "float32", quantization="int4", progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_the_flag_reaches_the_worker() -> None:
    config = EngineConfig("toy", quantization="int4")
    words = ["--address", "ipc:///tmp/x", *engine_arguments(config)]
    assert worker_config(words).engine == config
    assert worker_config(["--address", "ipc:///tmp/x", "toy", "-q", "int8"]).engine == (
        EngineConfig("toy", quantization="int8")
    )


class TestDoctor:
    def examine(self, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
        main(["doctor", *words, "--json", "--port=0", "--num-gpu-blocks-override=200"])
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    def test_while_loading(self, capsys: pytest.CaptureFixture[str]) -> None:
        plain, found = self.examine(capsys, "toy"), self.examine(capsys, "toy", "-q", "int4")
        assert found["quantization"]["in_memory"] == "int4, quantized while loading"
        assert sum(found["few_bits"].values()) == 8 * 4 + 1
        texts = [finding["text"] for finding in found["findings"]]
        assert any("33 weights" in text for text in texts)
        if "dequantized" not in " ".join(found["few_bits"]):
            assert found["weights_bytes"] < plain["weights_bytes"] / 2

    def test_a_wish_that_does_not_fit(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = self.examine(capsys, "toy", "--quantization=gptq")
        assert not found["can_serve"]
        assert any("does not fit" in finding["text"] for finding in found["findings"])
