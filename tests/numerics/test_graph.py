"""Captured forms of a step against the eager calls, bit for bit."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.checkpoints import make_checkpoint

from penstock.checkpoint import Checkpoint
from penstock.engine.attention.base import AttentionRow
from penstock.engine.layers.attention import build_attention
from penstock.engine.loading.loader import load_model
from penstock.engine.platforms.base import CannotCapture, Platform
from penstock.engine.platforms.cpu import kernels
from penstock.engine.platforms.cpu.graph import Arena, capture
from penstock.engine.platforms.cpu.platform import CpuPlatform
from penstock.engine.runtime.forms import Forms, FormsConfig

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="needs a C++ compiler")

SLOTS, BLOCKS_PER_SLOT = 6, 8
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),  # untied
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),  # biases
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 4}),
    "layer-types": (
        "qwen3",
        {
            "num_hidden_layers": 3,
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


class Engine:
    """One model over one memory, stepped in any form."""

    def __init__(self, folder: Path, dtype: str, backend: str = "auto", mode: str = "auto") -> None:
        self.platform = CpuPlatform()
        self.model, config = load_model(Checkpoint(folder), self.platform, dtype)
        memory = self.platform.kv_memory(
            config.kv_layout(), SLOTS * BLOCKS_PER_SLOT, SLOTS, BLOCKS_PER_SLOT
        )
        self.attention = build_attention(
            config,
            lambda shape: self.platform.attention(shape, memory, self.model.dtype, backend),
        )
        for slot in range(SLOTS):
            for index in range(BLOCKS_PER_SLOT):
                memory.map(slot, index, slot * BLOCKS_PER_SLOT + index)
        self.forms = Forms(
            self.model, self.attention, self.platform, FormsConfig(mode, max_tokens=48)
        )

    def step(self, rows: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
        ids_T = torch.cat([ids for _, _, ids in rows])
        positions_T = torch.cat([torch.arange(at, at + len(ids)) for _, at, ids in rows])
        with torch.inference_mode():
            self.attention.plan([AttentionRow(slot, at, len(ids)) for slot, at, ids in rows])
            hidden_TE = self.forms.forward(ids_T, positions_T)
            return torch.cat((hidden_TE, self.model.logits(hidden_TE).to(hidden_TE.dtype)), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            family, overrides = VARIANTS[variant]
            made[variant] = make_checkpoint(tmp_path_factory.mktemp(variant), family, **overrides)
        return made[variant]

    return make


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_captured_is_eager_bit_for_bit(folder, variant, dtype, data):
    eager, captured = (Engine(folder(variant), dtype, mode=mode) for mode in ("eager", "auto"))
    ends = [0] * SLOTS
    forms = set()
    for _ in range(8):
        rows = []
        for slot in data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, unique=True)):
            count = data.draw(st.sampled_from([1, 1, 1, 2, 9, 30]))
            count = min(count, BLOCKS_PER_SLOT * 16 - ends[slot])
            if count == 0:
                continue
            rows.append((slot, ends[slot], torch.randint(0, 384, (count,))))
            ends[slot] += count
        if rows:
            assert torch.equal(captured.step(rows), eager.step(rows))
            forms.add(captured.forms.last)
    assert forms <= {"eager", "captured"} and captured.forms.reason is None
    assert eager.forms.last == "eager"


@pytest.mark.parametrize("backend", ["cpu_native", "reference"])
def test_piecewise_is_eager_bit_for_bit(folder, backend):
    eager = Engine(folder("qwen3"), "float32", backend, "eager")
    pieces = Engine(folder("qwen3"), "float32", backend, "piecewise")
    for at in range(0, 40, 4):
        rows = [(slot, at, torch.randint(0, 384, (4,))) for slot in (1, 4)]
        assert torch.equal(pieces.step(rows), eager.step(rows))
    assert pieces.forms.last == "piecewise"


def test_a_backend_that_cannot_be_written_down_is_cut_out(folder):
    engine = Engine(folder("qwen3"), "float32", "reference")
    for at in range(3):
        engine.step([(0, at, torch.tensor([at]))])
    assert engine.forms.last == "piecewise"


def test_capturing_is_lazy_and_large_steps_stay_eager(folder):
    engine = Engine(folder("qwen3"), "bfloat16")
    last = []
    for at, count in ((0, 60), (60, 1), (61, 1), (62, 50), (112, 1)):
        engine.step([(0, at, torch.randint(0, 384, (count,)))])
        last.append(engine.forms.last)
    assert last == ["eager", "eager", "captured", "eager", "captured"]


def test_what_torch_computes_is_not_captured(folder):
    engine = Engine(folder("qwen3"), "float16", "reference")  # float16 has no kernels of ours
    for at in range(4):
        engine.step([(0, at, torch.tensor([at]))])
    assert engine.forms.last == "eager"
    assert engine.forms.reason is not None and "computed by torch" in engine.forms.reason
    assert engine.platform.ops is not None and engine.platform.ops.recorder is None


def test_a_platform_without_captured_forms_is_eager(folder):
    engine = Engine(folder("qwen3"), "float32", "reference")
    engine.forms = Forms(engine.model, engine.attention, Platform(), FormsConfig())
    for at in range(3):
        engine.step([(0, at, torch.tensor([at]))])
    assert engine.forms.last == "eager" and engine.forms.reason is not None


def test_a_refused_capture_leaves_eager_calls_working():
    platform = CpuPlatform()
    assert platform.ops is not None
    with pytest.raises(CannotCapture, match="aten"):
        capture(platform.ops, lambda ids_T, positions_T: ids_T + positions_T, 8)
    x_TE, weight_E = torch.randn(3, 64), torch.ones(64)
    found = platform.rms_norm(x_TE, weight_E, 1e-6)
    torch.testing.assert_close(found, Platform().rms_norm(x_TE, weight_E, 1e-6))


def test_arena_reuses_what_is_let_go_and_nothing_else():
    arena = Arena()
    first = arena.empty((4, 16), torch.float32)
    address, view = first.data_ptr(), first[1:]
    assert address % 64 == 0
    del first
    gc.collect()
    other = arena.empty((4, 16), torch.float32)
    assert other.data_ptr() != address, "a view still looks at it"
    del view
    gc.collect()
    again = arena.empty((2, 64), torch.bfloat16)  # as many bytes
    assert again.data_ptr() == address and arena.num_bytes == 2 * 256


def test_a_program_outlives_what_python_knows_of_its_weights():
    """Recorded calls keep weights, scratch and plans alive by themselves."""
    platform = CpuPlatform()
    gen = torch.Generator().manual_seed(0)
    made = [torch.randn(100, 64, generator=gen).bfloat16() for _ in range(8)]

    def forward(ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        x_TE = platform.embedding(ids_T, made[0])
        for linear in linears:
            x_TE = linear(x_TE)
        return x_TE

    linears = [platform.make_linear(each[:64].clone()) for each in made[1:]]
    ids_T = torch.arange(5)
    expected = forward(ids_T, ids_T).clone()
    program = platform.capture(forward, 8)
    linears.clear()
    made.clear()
    gc.collect()
    junk = [torch.full((100, 64), float("nan"), dtype=torch.bfloat16) for _ in range(50)]
    assert torch.equal(program(ids_T, ids_T), expected)
    assert len(junk) == 50


def test_capturing_does_not_import_torchs_compiler():
    """It would cost 150 MB and more than a second at the first request."""
    code = (
        "import sys, torch; from penstock.engine.platforms.cpu.platform import CpuPlatform\n"
        "p = CpuPlatform(); m = torch.ones(8, 64).bfloat16()\n"
        "ids = torch.arange(2); p.capture(lambda ids, _: p.embedding(ids, m), 4)(ids, ids)\n"
        "assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
