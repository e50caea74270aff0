"""ggml's quantized types against the `gguf` package, over random bytes; and what becomes of types
that stand beside each other in one linear."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.gguf_files import encode, q4_k_m, write_gguf

from penstock.checkpoint import resolve
from penstock.engine.loading.sources import FromCheckpoint
from penstock.engine.loading.tensors import CheckpointTensors
from penstock.engine.platforms.base import Platform
from penstock.engine.quantization.formats.base import FewBits, Stored
from penstock.engine.quantization.formats.gguf import GgufFormat
from penstock.engine.quantization.formats.gguf_blocks import AFFINE
from penstock.engine.quantization.select import quantization_of
from penstock.engine.quantization.weight import QuantizedWeight, stack
from penstock.gguf.types import TYPES
from penstock.protocol.errors import CheckpointError

TYPES_BY_NAME = {kind.name: kind for kind in TYPES.values()}
BLOCK_BYTES = {kind.name: kind.block_bytes for kind in TYPES.values()}


def decoded(kind: str, raw: np.ndarray, columns: int) -> QuantizedWeight:
    """As the loader does it: layout, then decode."""
    found = Stored((len(raw), columns), frozenset({kind}))
    layout = GgufFormat(Counter({kind: 1})).layout("m", len(raw), columns, lambda name: found)
    assert isinstance(layout, FewBits)
    weight = layout.decode({"weight": torch.from_numpy(raw)})
    declared = layout.declared
    assert declared.codes_NK.is_meta and declared.shape == weight.shape
    assert (declared.bits, declared.group_size) == (weight.bits, weight.group_size)
    assert (declared.offsets_NG is None) == (weight.offsets_NG is None)
    return weight


def blocks(kind: str, rows: int, blocks_per_row: int, seed: int) -> np.ndarray:
    """Random bytes, in rows; the float16 among them neither infinite nor huge."""
    found = np.empty((0, BLOCK_BYTES[kind]), np.uint8)
    rng = np.random.default_rng(seed)
    while len(found) < rows * blocks_per_row:
        more = rng.integers(0, 256, (2 * rows * blocks_per_row, BLOCK_BYTES[kind]), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(more, gguf.GGMLQuantizationType[kind])
            usable = np.isfinite(values).all(-1) & (np.abs(values).max(-1) < 1e3)
        found = np.concatenate([found, more[usable]])
    return found[: rows * blocks_per_row].reshape(rows, -1)


@pytest.mark.parametrize("kind", AFFINE)
def test_values_are_those_of_the_package(kind: str) -> None:
    raw = blocks(kind, rows=60, blocks_per_row=3, seed=3)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    weight = decoded(kind, raw, expected.shape[1])
    # Codes and scales are exact; codes that were moved to the middle may round the last bit.
    largest = np.abs(expected).reshape(len(raw), -1, 32).max(-1).repeat(32, axis=-1)
    found = weight.dequantize().numpy()
    assert (np.abs(found - expected) <= largest * 1e-5).all()
    assert int(weight.codes_NK.max()) < 1 << weight.bits


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K"])
def test_scales_that_are_not_finite_are_damage(kind: str) -> None:
    raw = blocks(kind, rows=4, blocks_per_row=2, seed=1)
    for start in (0, 2) if kind != "Q8_0" else (0,):
        broken = raw.copy()
        broken[2, start : start + 2] = np.array([np.inf], np.float16).view(np.uint8)
        if kind == "Q4_K":  # 0 x inf is nan, and anything else inf
            broken[2, 4:16] = 0
        with pytest.raises(CheckpointError, match="m: its scales are not all finite"):
            decoded(kind, broken, 2 * TYPES_BY_NAME[kind].block_values)


@pytest.mark.parametrize("kinds", [("Q4_K", "Q4_K", "Q6_K"), ("Q4_0", "Q8_0"), ("Q6_K", "Q5_0"),
                                   ("Q3_K", "Q2_K"), ("Q8_0", "Q8_0")])  # fmt: skip
def test_types_beside_each_other_keep_their_values(kinds: tuple[str, ...]) -> None:
    rng = np.random.default_rng(1)
    parts = []
    for n, kind in enumerate(kinds):
        values = rng.standard_normal((16 + 8 * n, 512)).astype(np.float32)
        raw = encode(values, kind)[0] if kind not in ("Q2_K", "Q3_K", "Q5_K") else blocks(
            kind, 16 + 8 * n, 2, n)  # fmt: skip
        parts.append(decoded(kind, raw, 512))
    whole = stack(parts)
    assert whole is not None
    expected = torch.cat([part.dequantize() for part in parts])
    torch.testing.assert_close(whole.dequantize(), expected, rtol=0, atol=1e-5)
    assert whole.bits == max(part.bits for part in parts)

    declared = stack([part.to(torch.device("meta")) for part in parts])
    assert declared is not None and declared.shape == whole.shape
    assert declared.scales_NG.shape == whole.scales_NG.shape
    assert (declared.offsets_NG is None) == (whole.offsets_NG is None)


def test_weights_are_decoded_on_the_cpu_and_go_to_the_device(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "llama")
    checkpoint = resolve(str(write_gguf(folder, tmp_path / "m.gguf", "Q4_1")))
    with CheckpointTensors(checkpoint) as tensors:
        weights = FromCheckpoint(
            Platform("meta"), torch.float32, tensors, 1, None, quantization_of(checkpoint)
        )
        found = weights.read_quantized("model.layers.0.mlp.up_proj", 96, 64)
    assert found is not None and found.offsets_NG is not None
    assert {t.device.type for t in (found.codes_NK, found.scales_NG, found.offsets_NG)} == {"meta"}


def test_groups_with_too_little_in_common_are_not_stacked() -> None:
    def part(group_size: int) -> QuantizedWeight:
        groups = 96 // group_size
        return QuantizedWeight(
            8, group_size, torch.zeros(2, 96, dtype=torch.uint8), torch.ones(2, groups)
        )

    assert stack([part(32), part(24)]) is None
    assert stack([part(24), part(24)]) is not None


def test_loading_does_not_import_the_compiler_of_torch(tmp_path: Path) -> None:
    """It takes seconds, and torch does so for the sake of shapes on the meta device."""
    folder = make_checkpoint(tmp_path / "hf", "llama", hidden_size=256, intermediate_size=256)
    file = write_gguf(folder, tmp_path / "m.gguf", q4_k_m)
    program = (
        "import sys; from penstock.checkpoint import resolve;"
        "from penstock.engine.loading.loader import load_model;"
        "from penstock.engine.platforms.cpu.platform import CpuPlatform;"
        f"load_model(resolve({str(file)!r}), CpuPlatform());"
        "assert 'torch._dynamo' not in sys.modules"
    )
    environment = {**os.environ, "PENSTOCK_NATIVE": "0"}  # kernels may have to be compiled first
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100, env=environment)
