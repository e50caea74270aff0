"""Linears and embeddings in few bits, in every build, against float64.

Two oracles: exact integer mathematics with the very activation codes that the kernel used (only
float32 rounding may differ), and the dequantized weight, with the error that rounding activations
to 8 bits can make. Outputs and scratch memory are poisoned.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.platforms.base import Platform, TiedEmbedding
from penstock.engine.platforms.cpu import kernels, onednn_int8, quantized
from penstock.engine.platforms.cpu.ops import Ops
from penstock.engine.platforms.cpu.platform import CpuPlatform
from penstock.engine.platforms.cpu.quantized import FewBitsEmbedding, FewBitsLinear
from penstock.engine.quantization.weight import QuantizedWeight

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="needs a C++ compiler")

BUILDS = ["native", "haswell", "x86-64"]
DTYPES = [torch.bfloat16, torch.float32]
#: Half a unit in the last place of an output, and what float32 sums of groups may lose.
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-20}


class PoisonedOps(Ops):
    """Operations of one build on so many threads; what they leave out shows."""

    def __init__(self, build: str, threads: int = 2) -> None:
        super().__init__(kernels.open_library(kernels.build(build)))
        self.threads = threads

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        poison = float("nan") if dtype.is_floating_point else 85
        return torch.full(shape, poison, dtype=dtype)

    def run(self, *args: Any, **options: Any) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            super().run(*args, **options)
        finally:
            torch.set_num_threads(before)


def random_weight(
    seed: int,
    shape: tuple[int, int],
    bits: int = 8,
    group_size: int | None = None,
    *,
    offsets: bool = False,
    ordered: bool = False,
) -> QuantizedWeight:
    gen = torch.Generator().manual_seed(seed)
    rows, columns = shape
    group_size = group_size or columns
    groups = (rows, columns // group_size)
    return QuantizedWeight(
        bits,
        group_size,
        torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=gen),
        torch.rand(groups, generator=gen) * 0.1 + 0.001,
        -torch.rand(groups, generator=gen) if offsets else None,
        torch.randperm(columns, generator=gen) if ordered else None,
    )


def as_stored(weight: QuantizedWeight, linear: FewBitsLinear, *, ordered: bool) -> torch.Tensor:
    """float64 [N, K] of the scales as they are kept; the columns in the order of the codes unless
    `ordered`."""
    dtype = linear.weight.scale_dtype
    offsets_NG = weight.offsets_NG
    kept = QuantizedWeight(
        weight.bits,
        weight.group_size,
        weight.codes_NK,
        weight.scales_NG.to(dtype).double(),
        None if offsets_NG is None else offsets_NG.to(dtype).double(),
        weight.input_order_K if ordered else None,
    )
    codes_NGK = weight.codes_NK.view(weight.shape[0], -1, weight.group_size).double()
    weight_NK = (codes_NGK * kept.scales_NG[..., None] + kept.offsets()[..., None]).flatten(1)
    if kept.input_order_K is None:
        return weight_NK
    return torch.empty_like(weight_NK).index_copy_(1, kept.input_order_K, weight_NK)


weights = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "rows": st.integers(1, 300),
        "groups": st.integers(1, 5),
        "group_size": st.sampled_from([1, 7, 15, 32, 64, 100, 128, 300]),
        "bits": st.sampled_from([4, 8]),
        "offsets": st.booleans(),
        "ordered": st.booleans(),
    }
)


def drawn(case: dict[str, Any]) -> QuantizedWeight:
    case = dict(case)
    rows, groups = case.pop("rows"), case.pop("groups")
    return random_weight(shape=(rows, groups * case["group_size"]), **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", BUILDS)
@settings(max_examples=30, deadline=None)
@given(case=weights, tokens=st.integers(0, 40), gap=st.integers(0, 5), threads=st.integers(1, 9))
def test_products(build, dtype, case, tokens, gap, threads):
    weight = drawn(case)
    (outputs, inputs), gen = weight.shape, torch.Generator().manual_seed(case["seed"])
    x_TK = torch.randn(tokens, inputs + gap, generator=gen).to(dtype)[:, :inputs]
    x_TK *= 10.0 ** torch.randint(-3, 3, (tokens, 1), generator=gen)
    bias_N = torch.randn(outputs, generator=gen).to(dtype) if case["seed"] % 2 else None
    linear = FewBitsLinear(PoisonedOps(build, threads), weight, bias_N)
    rows = linear.quantize(x_TK)
    assert_quantized(weight, x_TK, rows, linear.weight.padded_length)
    found_TN = linear.multiply(rows, dtype)
    assert found_TN.shape == (tokens, outputs) and found_TN.dtype == dtype
    bias = torch.zeros(outputs).double() if bias_N is None else bias_N.double()

    # The same integers, in float64.
    codes_TGK = rows.codes_TK.view(tokens, case["groups"], linear.weight.padded_length)
    a_TK = codes_TGK[..., : weight.group_size].double() * rows.scales_TG.double()[..., None]
    a_TK = a_TK.reshape(tokens, inputs)
    stored_NK = as_stored(weight, linear, ordered=False)
    # Codes and offsets may cancel: what is rounded is their size.
    size_TN = a_TK.abs() @ sizes(weight).T + bias.abs()
    error_TN = (found_TN.double() - (a_TK @ stored_NK.T + bias)).abs()
    assert torch.all(error_TN <= ROUNDING[dtype] * size_TN + 1e-30)

    # The weight as it was, and the activations: each is moved by half a step at most.
    exact_TN = x_TK.double() @ dequantized(weight).T + bias
    groups_NGK = stored_NK.view(outputs, -1, weight.group_size)
    moved_TN = rows.scales_TG.double() / 2 @ groups_NGK.abs().sum(-1).T
    scales_TN = a_TK.abs().double() @ shifts(weight).T
    bound_TN = moved_TN * (1 + 1e-5) + scales_TN + ROUNDING[dtype] * size_TN * 2 + 1e-30
    assert torch.all((found_TN.double() - exact_TN).abs() <= bound_TN)

    if tokens:
        one = tokens // 2
        assert torch.equal(linear(x_TK[one : one + 1])[0], found_TN[one])


def assert_quantized(weight, x_TK, rows, padded_length) -> None:
    """To the nearest of 255 steps of each token and group; zeros beyond a group."""
    order_K = weight.input_order_K
    x = x_TK.float() if order_K is None else x_TK.float()[:, order_K]
    x_TGK = x.reshape(len(x), x.shape[1] // weight.group_size, weight.group_size)
    expected_TG = x_TGK.abs().amax(-1) / 127
    assert torch.allclose(rows.scales_TG, expected_TG, rtol=1e-6, atol=0)
    codes_TGK = rows.codes_TK.view(*x_TGK.shape[:2], padded_length)
    assert not codes_TGK[..., weight.group_size :].any()
    codes_TGK = codes_TGK[..., : weight.group_size]
    assert torch.equal(rows.sums_TG, codes_TGK.sum(-1, dtype=torch.int32))
    scales_TG1 = rows.scales_TG.double()[..., None]
    off = (codes_TGK.double() * scales_TG1 - x_TGK.double()).abs()
    assert torch.all(off <= scales_TG1 * (0.5 + 1e-4))


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    """float64 [N, K], the columns in the order of the inputs."""
    codes_NGK = weight.codes_NK.view(weight.shape[0], -1, weight.group_size).double()
    scales, offsets = weight.scales_NG.double()[..., None], weight.offsets().double()[..., None]
    weight_NK = (codes_NGK * scales + offsets).flatten(1)
    if weight.input_order_K is None:
        return weight_NK
    return torch.empty_like(weight_NK).index_copy_(1, weight.input_order_K, weight_NK)


def sizes(weight: QuantizedWeight) -> torch.Tensor:
    """What the kernel adds up, without signs: float64 [N, K] in the order of the codes."""
    codes_NGK = weight.codes_NK.view(weight.shape[0], -1, weight.group_size).double()
    scales, offsets = weight.scales_NG.double()[..., None], weight.offsets().double()[..., None]
    return (codes_NGK * scales.abs() + offsets.abs()).flatten(1)


def shifts(weight: QuantizedWeight) -> torch.Tensor:
    """By how much float16 scales may move a weight: a 64th of a step."""
    return (weight.scales_NG.double() / 64).repeat_interleave(weight.group_size, dim=1)


@pytest.mark.parametrize("build", BUILDS)
def test_the_greatest_codes_do_not_saturate(build):
    """255 x 127 twice is more than 16 bits hold, and 65,536 of them nearly fill 32."""
    for bits, inputs in ((8, 1 << 16), (8, 2048), (4, 2048)):
        for code in (0, (1 << bits) - 1):
            weight = QuantizedWeight(
                bits,
                inputs,
                torch.full((65, inputs), code, dtype=torch.uint8),
                torch.ones(65, 1),
                torch.zeros(65, 1),
            )
            x_TK = torch.tensor([127.0, -127.0, 1.0])[:, None].repeat(1, inputs)
            found_TN = FewBitsLinear(PoisonedOps(build), weight)(x_TK)
            expected_T1 = x_TK[:, :1].double() * inputs * code
            assert torch.allclose(found_TN.double(), expected_T1, rtol=1e-6, atol=0)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_however_the_work_is_cut_the_result_is_the_same(build, bits):
    """Strips of panels for few tokens, ranges of tokens for many, whole panels for one thread."""
    weight = random_weight(5, (200, 256), bits, 64, offsets=True)
    for tokens in (1, 3, 13, 97, 300):
        x_TK = torch.randn(tokens, 256)
        alone = FewBitsLinear(PoisonedOps(build, 1), weight)(x_TK)
        for threads in (2, 5, 16):
            assert torch.equal(FewBitsLinear(PoisonedOps(build, threads), weight)(x_TK), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", BUILDS)
@settings(max_examples=25, deadline=None)
@given(case=weights)
def test_embedding_rows_are_the_dequantized_ones(build, dtype, case):
    weight = drawn(case)
    tied = FewBitsEmbedding(PoisonedOps(build), weight, dtype)
    last = weight.shape[0] - 1
    ids_T = torch.cat((torch.tensor([0, last]), torch.randint(last + 1, (9,))))
    found_TE = tied.embed(ids_T)
    stored_VE = as_stored(weight, tied.linear, ordered=True)
    assert found_TE.dtype == dtype and found_TE.shape == (11, weight.shape[1])
    # A product and a sum in float32, each rounded once, then the output.
    size = (weight.scales_NG.abs() * (1 << weight.bits) + weight.offsets().abs()).max().double()
    error = (found_TE.double() - stored_VE[ids_T]).abs()
    output = ROUNDING[dtype] * stored_VE[ids_T].abs() if dtype == torch.bfloat16 else 0.0
    assert torch.all(error <= output + 2**-23 * size)
    x_TE = torch.randn(3, weight.shape[1]).to(dtype)
    assert torch.equal(tied.head(x_TE), tied.linear(x_TE))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_rows_of_float16_scales_are_bit_for_bit(build, bits):
    weight = random_weight(1, (130, 128), bits, 32)
    weight = QuantizedWeight(bits, 32, weight.codes_NK, weight.scales_NG.half().float())
    for dtype in DTYPES:
        tied = FewBitsEmbedding(PoisonedOps(build), weight, dtype)
        assert tied.linear.weight.scale_dtype == torch.float16
        expected = weight.dequantize().to(dtype)
        assert torch.equal(tied.embed(torch.arange(130)), expected)


def test_an_id_that_is_none_makes_no_embedding():
    tied = FewBitsEmbedding(PoisonedOps("native"), random_weight(1, (100, 32)), torch.float32)
    found = tied.embed(torch.tensor([-1, 5, 100, 1 << 40]))
    assert found[[0, 2, 3]].isnan().all() and not found[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", BUILDS)
def test_what_is_not_finite_stays_in_its_row(build, dtype):
    weight = random_weight(3, (70, 96), 8, 32)
    bias_N = torch.randn(70).to(dtype)
    linear = FewBitsLinear(PoisonedOps(build), weight, bias_N)
    x_TK = torch.randn(9, 96).to(dtype)
    clean_TN = linear(x_TK)
    x_TK[1, 95], x_TK[3, 0], x_TK[5, 40] = float("nan"), float("inf"), -float("inf")
    x_TK[7] = 0.0
    x_TK[8, :32] = 1e-38  # 127 over it is not a float
    found_TN = linear(x_TK)
    assert not found_TN[[1, 3, 5]].isfinite().any()
    assert torch.equal(found_TN[[0, 2, 4, 6]], clean_TN[[0, 2, 4, 6]])
    assert torch.equal(found_TN[7], bias_N)
    assert found_TN[8].isfinite().all()


def test_scales_are_float16_only_where_that_is_harmless():
    weight = random_weight(4, (64, 256), 4, 32)
    zeros_NG = torch.randint(0, 17, weight.scales_NG.shape)
    ops = PoisonedOps("native")

    def dtype_of(scales: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.dtype:
        changed = QuantizedWeight(4, 32, weight.codes_NK, scales, offsets)
        return FewBitsLinear(ops, changed).weight.scale_dtype

    assert dtype_of(weight.scales_NG, -zeros_NG * weight.scales_NG) == torch.float16
    assert dtype_of(weight.scales_NG.index_fill(0, torch.tensor([3]), 0.0)) == torch.float16
    for odd in (1e-8, 1e-30, 7e4, float("inf"), float("nan")):
        scales = weight.scales_NG.clone()
        scales[63, 7] = odd
        assert dtype_of(scales) == torch.float32
        offsets = weight.offsets().clone()
        offsets[0, 0] = 7e4
        assert dtype_of(weight.scales_NG, offsets) == torch.float32
    scales = weight.scales_NG * 1e-8
    tiny = QuantizedWeight(4, 32, weight.codes_NK, scales)
    x_TK = torch.randn(4, 256)
    expected = x_TK.double() @ dequantized(tiny).T
    assert (FewBitsLinear(ops, tiny)(x_TK).double() - expected).abs().max() < 0.02 * expected.max()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_weight_is_small_and_needs_its_codes_no_longer(bits):
    weight = random_weight(6, (640, 512), bits, 128, offsets=True, ordered=True)
    linear = FewBitsLinear(PoisonedOps("native"), weight)
    x_TK = torch.randn(5, 512)
    before = linear(x_TK)
    for tensor in (weight.codes_NK, weight.scales_NG, weight.offsets_NG, weight.input_order_K):
        tensor.zero_()
    assert torch.equal(linear(x_TK), before)
    scale_bytes = linear.weight.scale_dtype.itemsize
    assert linear.weight.panels.nbytes == 640 * 512 * bits // 8 + 640 * 4 * 2 * scale_bytes


def test_inputs_of_any_stride():
    linear = FewBitsLinear(PoisonedOps("native"), random_weight(7, (96, 64)))
    x_KT = torch.randn(64, 5)
    assert torch.equal(linear(x_KT.T), linear(x_KT.T.contiguous()))
    one = torch.randn(1, 64)
    assert torch.equal(linear(one.expand(4, 64)), linear(one).expand(4, 96))


# --- the platform ---------------------------------------------------------------------------------


def test_the_platform_takes_the_kernels():
    platform = CpuPlatform()
    weight = random_weight(8, (100, 64), 4, 32)
    apply = platform.make_quantized_linear(weight, None, torch.bfloat16)
    assert isinstance(apply, FewBitsLinear)
    tied = platform.make_quantized_embedding(weight, torch.bfloat16)
    assert isinstance(tied, FewBitsEmbedding)
    expected = weight.dequantize().bfloat16()[7:8]
    assert torch.allclose(tied.embed(torch.tensor([7])), expected, rtol=2**-7)
    for name in ("linear_int8", "linear_int4"):
        assert platform.kernels()[name].startswith("native")


def test_what_the_kernels_do_not_take_is_dequantized(monkeypatch):
    platform, weight = CpuPlatform(), random_weight(9, (100, 64), 4, 32)
    x_TK = torch.randn(3, 64)
    half = platform.make_quantized_linear(weight, None, torch.float16)
    assert half(x_TK.half()).dtype == torch.float16
    monkeypatch.setattr(quantized, "_MAX_GROUP_LENGTH", 16)
    bias_N = torch.randn(100)
    apply = platform.make_quantized_linear(weight, bias_N, torch.float32)
    expected = Platform().make_quantized_linear(weight, bias_N, torch.float32)(x_TK)
    assert torch.allclose(apply(x_TK), expected, rtol=1e-4, atol=1e-4)
    tied = platform.make_quantized_embedding(weight, torch.float32)
    assert torch.equal(tied.embed(torch.tensor([7])), weight.dequantize()[7:8])


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: None)
    return CpuPlatform()


@pytest.mark.skipif(onednn_int8.refusal() is not None, reason="oneDNN's 8-bit product is not exact")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ordered", [False, True])
def test_onednn_without_native_kernels(without_native, dtype, ordered):
    weight = random_weight(10, (130, 100), ordered=ordered)
    bias_N = torch.randn(130).to(dtype)
    apply = without_native.make_quantized_linear(weight, bias_N, dtype)
    assert isinstance(apply, onednn_int8.OneDnnInt8Linear)
    assert "onednn" in without_native.kernels()["linear_int8"]
    ours = FewBitsLinear(PoisonedOps("native"), weight, bias_N)
    for tokens in (0, 1, 5, 33):
        x_TK = torch.randn(tokens, 100).to(dtype)
        x_TK[tokens // 2 :] = 0.0
        found_TN, expected_TN = apply(x_TK), ours(x_TK)
        assert found_TN.dtype == dtype and found_TN.shape == (tokens, 130)
        # A code may be rounded the other way where the scale differs in its last bit.
        step_NK = x_TK.float().abs().amax() / 127 if tokens else 0.0
        atol = float(step_NK * dequantized(weight).abs().max()) + 1e-5
        assert torch.allclose(found_TN.float(), expected_TN.float(), rtol=2**-6, atol=atol)


def test_without_native_kernels_the_rest_is_dequantized(without_native, monkeypatch):
    assert "dequantized" in without_native.kernels()["linear_int4"]
    grouped = random_weight(11, (130, 96), 4, 32)
    x_TK = torch.randn(5, 96)
    apply = without_native.make_quantized_linear(grouped, None, torch.float32)
    assert torch.allclose(apply(x_TK).double(), x_TK.double() @ dequantized(grouped).T, atol=1e-3)
    tied = without_native.make_quantized_embedding(grouped, torch.float32)
    assert isinstance(tied, TiedEmbedding) and not isinstance(tied, FewBitsEmbedding)
    assert torch.equal(tied.embed(torch.tensor([129])), grouped.dequantize()[129:])

    monkeypatch.setattr(onednn_int8, "refusal", lambda: "not exact")
    per_channel = random_weight(12, (130, 96))
    apply = without_native.make_quantized_linear(per_channel, None, torch.float32)
    expected = x_TK.double() @ dequantized(per_channel).T
    assert torch.allclose(apply(x_TK).double(), expected, atol=1e-3)
    assert without_native.kernels()["linear_int8"].startswith("dequantized")
