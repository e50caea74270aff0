"""Linears, tied embeddings and the small operations of the CPU platform against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from penstock.engine.platforms.base import Platform, QkNorms, TiedEmbedding
from penstock.engine.platforms.cpu import kernels, linear, onednn
from penstock.engine.platforms.cpu.ops import Ops
from penstock.engine.platforms.cpu.platform import CpuPlatform
from penstock.engine.platforms.cpu.small_ops import SmallOps
from penstock.engine.platforms.select import platform_for
from penstock.protocol.errors import ConfigError

DTYPES = [torch.bfloat16, torch.float32]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}

can_pack = pytest.mark.skipif(
    onednn.cannot_pack(torch.bfloat16) is not None, reason="oneDNN needs AVX-512 for bfloat16"
)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest value: sums of products may cancel."""
    assert found.dtype == dtype
    error = (found.double() - expected.double()).abs().max() / expected.abs().max()
    assert error.item() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(96, 64), (100, 37), (513, 300), (1024, 256)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(dtype, shape, with_bias):
    gen = torch.Generator().manual_seed(sum(shape))
    outputs, inputs = shape
    weight_NK = torch.randn(outputs, inputs, generator=gen).to(dtype)
    bias_N = torch.randn(outputs, generator=gen).to(dtype) if with_bias else None
    apply = CpuPlatform().make_linear(weight_NK.clone(), bias_N)
    for tokens in (1, 2, 16, 33):
        x_TK = torch.randn(tokens, inputs, generator=gen).to(dtype)
        expected = x_TK.double() @ weight_NK.double().T
        if bias_N is not None:
            expected = expected + bias_N.double()
        tolerance = torch.bfloat16 if dtype == torch.float16 else dtype
        assert_near(apply(x_TK).to(tolerance), expected, tolerance)
        assert apply(x_TK).dtype == dtype
        wide_TK = torch.cat((x_TK, x_TK), dim=1)  # a slice, as of a fused projection
        assert_near(apply(wide_TK[:, :inputs]).to(tolerance), expected, tolerance)


@can_pack
def test_a_packed_linear_needs_its_weight_no_longer():
    weight_NK = torch.randn(256, 128).bfloat16()
    x_TK = torch.randn(3, 128).bfloat16()
    expected = functional.linear(x_TK, weight_NK)
    apply = onednn.PackedLinear(weight_NK)
    weight_NK.fill_(float("nan"))
    assert_near(apply(x_TK), expected, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (1000, 96), (5000, 320), (261, 100), (130, 33)])
def test_tied_embedding_gives_rows_bit_by_bit_and_logits(dtype, shape):
    gen = torch.Generator().manual_seed(sum(shape))
    weight_VE = torch.randn(shape, generator=gen).to(dtype)
    kept_VE = weight_VE.clone()
    tied = CpuPlatform().make_tied_embedding(weight_VE)
    ids_T = torch.cat((torch.tensor([0, shape[0] - 1]), torch.randint(0, shape[0], (40,))))
    assert torch.equal(tied.embed(ids_T), kept_VE[ids_T])
    x_TE = torch.randn(5, shape[1], generator=gen).to(dtype)
    assert_near(tied.head(x_TE), x_TE.double() @ kept_VE.double().T, dtype)


@can_pack
def test_a_tied_embedding_is_held_once():
    weight_VE = torch.randn(2000, 128).bfloat16()
    kept_VE = weight_VE.clone()
    tied = onednn.make_tied_embedding(weight_VE)
    assert isinstance(tied, onednn.PackedTiedEmbedding)
    weight_VE.fill_(float("nan"))
    assert torch.equal(tied.embed(torch.arange(2000)), kept_VE)
    assert not tied.head(kept_VE[:1]).isnan().any()


@can_pack
def test_an_unknown_weight_layout_falls_back_to_the_plain_matrix(monkeypatch):
    monkeypatch.setattr(onednn, "_PANEL_ROWS", (24,))
    weight_VE = torch.randn(480, 64).bfloat16()
    tied = onednn.make_tied_embedding(weight_VE)
    assert type(tied) is TiedEmbedding
    assert torch.equal(tied.embed(torch.tensor([479, 3])), weight_VE[[479, 3]])


@can_pack
def test_one_wrong_value_is_enough_to_distrust_a_layout():
    weight_VE = torch.randn(5000, 64).bfloat16()
    packed = onednn.PackedLinear(weight_VE).packed
    assert onednn.Panels.find(packed, weight_VE) is not None
    weight_VE[4999, 63] += 1
    assert onednn.Panels.find(packed, weight_VE) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("build", ["native", "haswell", "x86-64"])
@settings(max_examples=25, deadline=None)
@given(
    outputs=st.integers(1, 400),
    words=st.integers(1, 150),
    tokens=st.integers(0, 40),
    gap=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_native_linears_are_exact_sums(build, threads, dtype, outputs, words, tokens, gap, seed):
    """Against float64; outputs poisoned, inputs strided, every token the same in any company."""
    if kernels.load() is None:
        pytest.skip("needs a C++ compiler")
    gen = torch.Generator().manual_seed(seed)
    inputs = words * (4 // dtype.itemsize)
    weight_NK = torch.randn(outputs, inputs, generator=gen).to(dtype)
    bias_N = torch.randn(outputs, generator=gen).to(dtype) if seed % 2 else None
    wide_TK = torch.randn(tokens, inputs + gap, generator=gen).to(dtype)
    x_TK = wide_TK[:, :inputs]
    apply = linear.NativeLinear(PoisonedOps(build, threads), weight_NK, bias_N)
    found_TN = apply(x_TK)
    expected_TN = x_TK.double() @ weight_NK.double().T + (0 if bias_N is None else bias_N.double())
    scale = x_TK.double().abs() @ weight_NK.double().abs().T + 1.0
    scale = scale + (0 if bias_N is None else bias_N.double().abs())
    error = (found_TN.double() - expected_TN).abs() / scale
    assert found_TN.shape == (tokens, outputs)
    assert torch.all(error <= (2**-8 if dtype == torch.bfloat16 else 2**-18))
    if tokens:
        alone_1N = apply(x_TK[tokens // 2 : tokens // 2 + 1])
        assert torch.equal(alone_1N[0], found_TN[tokens // 2])


class PoisonedOps(Ops):
    """Operations of one build on so many threads; what they leave out shows up as NaN."""

    def __init__(self, build: str, threads: int) -> None:
        super().__init__(kernels.open_library(kernels.build(build)))
        self._threads = threads

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    def run(self, *args: Any, **options: Any) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            super().run(*args, **options)
        finally:
            torch.set_num_threads(before)


@pytest.fixture(params=["native", "haswell", "x86-64"])
def native(request):
    """The small operations in every build, and torch's to compare with."""
    if kernels.load() is None:
        pytest.skip("needs a C++ compiler")
    platform = CpuPlatform()
    platform.ops = Ops(kernels.open_library(kernels.build(request.param)))
    platform._small_ops = SmallOps(platform.ops)
    return platform


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_as_torch_does(native, dtype):
    for tokens, heads, dim in ((1, 1, 1024), (5, 3, 100), (40, 2, 128)):
        x = (torch.randn(tokens, heads + 2, dim) * 3).to(dtype)[:, :heads]
        weight = torch.randn(dim).to(dtype)
        for each in (x, x[:, 0]):
            expected = Platform().rms_norm(each, weight, 1e-6)
            found = native.rms_norm(each, weight, 1e-6)
            # A last bit of the factor may push one rounding over: rare, and one step at most.
            assert found.dtype == dtype and found.shape == each.shape
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
            if dtype == torch.bfloat16:
                assert (found != expected).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(native, dtype):
    for tokens, dim in ((1, 3072), (7, 33), (300, 128)):
        gate_up = (torch.randn(tokens, 2 * dim) * 30).to(dtype)
        gate_up[0, :4] = torch.tensor([0.0, -1e4, 1e4, -88.0])
        found, expected = native.silu_mul(gate_up), Platform().silu_mul(gate_up)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=1e-6)
        if dtype == torch.bfloat16:
            assert (found != expected).float().mean() < 0.02


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(native, dtype, normed):
    for tokens, dim in ((1, 128), (9, 24), (300, 64)):
        norms = None
        if normed:
            norms = QkNorms(torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), 1e-6)
        qkv = torch.randn(tokens, 8, dim).to(dtype)
        angles = torch.rand(tokens, dim // 2) * 9
        cos, sin = (torch.cat((x, x), -1) for x in (angles.cos(), angles.sin()))
        mine, theirs = qkv.clone(), qkv.clone()
        native.rope_(mine[:, :4], mine[:, 4:6], cos, sin, norms)
        Platform().rope_(theirs[:, :4], theirs[:, 4:6], cos, sin, norms)
        assert torch.equal(mine[:, 6:], qkv[:, 6:])
        # A rotation may cancel, so what the norm has rounded shows as an absolute error, too.
        half_ulp = 2**-7 if dtype == torch.bfloat16 else 1e-5
        atol = half_ulp * float(theirs.abs().max()) if normed else 1e-6
        torch.testing.assert_close(mine, theirs, rtol=half_ulp, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_default_is_what_transformers_computes(dtype):
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    q_THD, k_TGD = torch.randn(6, 4, 32).to(dtype), torch.randn(6, 2, 32).to(dtype)
    angles = torch.rand(6, 16) * 9
    cos, sin = (torch.cat((x, x), -1) for x in (angles.cos(), angles.sin()))
    q, k = (x.float().transpose(0, 1)[None] for x in (q_THD, k_TGD))
    expected = qwen3.apply_rotary_pos_emb(q, k, cos[None], sin[None])
    Platform().rope_(q_THD, k_TGD, cos, sin)
    for found, wanted in zip((q_THD, k_TGD), expected, strict=True):
        torch.testing.assert_close(found, wanted[0].transpose(0, 1).to(dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_default_is_what_transformers_computes(dtype):
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    norm = qwen3.Qwen3RMSNorm(48, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 48).to(dtype)
    with torch.no_grad():
        assert torch.equal(Platform().rms_norm(x, norm.weight, 1e-5), norm(x))


def test_what_the_kernels_do_not_cover_goes_to_torch(native):
    x = torch.randn(3, 32, dtype=torch.float16)
    weight = torch.randn(32, dtype=torch.float16)
    assert torch.equal(native.rms_norm(x, weight, 1e-6), Platform().rms_norm(x, weight, 1e-6))
    assert torch.equal(native.silu_mul(x), Platform().silu_mul(x))
    q = torch.randn(3, 2, 32, dtype=torch.float64)
    cos, sin = torch.rand(3, 32), torch.rand(3, 32)
    mine, theirs = q.clone(), q.clone()
    native.rope_(mine, mine.clone(), cos, sin)
    Platform().rope_(theirs, theirs.clone(), cos, sin)
    assert torch.equal(mine, theirs)
    transposed = torch.randn(32, 4).T  # last dimension strided
    assert torch.equal(
        native.rms_norm(transposed, torch.ones(32), 1e-6),
        Platform().rms_norm(transposed, torch.ones(32), 1e-6),
    )


def test_platform_for():
    assert platform_for("cpu").name == "cpu"
    with pytest.raises(ConfigError, match="choose auto, cpu or cuda"):
        platform_for("tpu")
    if not torch.cuda.is_available():
        assert platform_for("auto").name == "cpu"
        with pytest.raises(ConfigError, match="no CUDA device"):
            platform_for("cuda")
