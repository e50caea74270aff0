"""From floats to few bits: what a scheme promises of its codes, scales and errors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.quantization.schemes import INT4, INT8, Scheme, half, scheme_named
from penstock.engine.quantization.weight import QuantizedWeight, row_slices
from penstock.protocol.errors import CheckpointError, ConfigError


def random(rows: int, columns: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * scale


def error(weight: torch.Tensor, quantized: torch.Tensor) -> float:
    return float((quantized - weight).norm() / weight.norm())


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    rows = draw(st.integers(1, 9))
    columns = draw(st.sampled_from([1, 7, 32, 64, 96, 128, 200, 256]))
    weight = random(rows, columns, draw(st.integers(0, 99)), 10.0 ** draw(st.integers(-4, 2)))
    if draw(st.booleans()):
        weight += draw(st.sampled_from([-3.0, 3.0])) * weight.abs().max()  # all of one sign
    if draw(st.booleans()):
        weight[draw(st.integers(0, rows - 1))] = 0.0
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


class TestInt8:
    @settings(max_examples=80)
    @given(weights())
    def test_no_weight_is_further_than_half_a_step(self, weight: torch.Tensor) -> None:
        found = INT8.quantize(weight)
        assert (found.bits, found.group_size) == (8, weight.shape[1])
        assert found.offsets_NG is None and found.codes_NK.min() >= 1
        step = found.scales_NG
        assert ((found.dequantize() - weight.float()).abs() <= 0.501 * step + 1e-30).all()
        # And the step is no wider than it must be.
        tight = weight.float().abs().amax(1, keepdim=True) / 127
        assert (step <= tight * 1.01 + 2.0**-23).all()

    def test_as_good_as_min_max_of_compressed_tensors(self) -> None:
        weight = random(64, 300, 1)
        args = QuantizationArgs(num_bits=8, strategy="channel")
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        theirs = fake_quantize(weight, *calculate_qparams(low, high, args), args)
        ours = INT8.quantize(weight).dequantize()
        assert error(weight, ours) < 1.02 * error(weight, theirs)


class TestInt4:
    @settings(max_examples=80)
    @given(weights())
    def test_integer_zero_points_and_zero_is_exact(self, weight: torch.Tensor) -> None:
        """What formats can store; and a weight of zero stays zero."""
        found = INT4.quantize(weight)
        if found.bits == 8:
            return
        assert found.offsets_NG is not None and found.codes_NK.max() <= 15
        zeros = -found.offsets_NG / found.scales_NG
        assert torch.equal(zeros, zeros.round()) and zeros.min() >= 0 and zeros.max() <= 15
        assert (found.dequantize()[weight == 0] == 0).all()

    @settings(max_examples=40)
    @given(weights())
    def test_never_worse_than_min_max(self, weight: torch.Tensor) -> None:
        """The search begins with the whole range."""
        found = INT4.quantize(weight)
        if found.bits == 8:
            return
        size = found.group_size
        exact = weight.float().unflatten(1, (-1, size))
        low, high = exact.amin(-1).clamp(max=0), exact.amax(-1).clamp(min=0)
        scale = half((high - low) / 15)[..., None]
        zero = (-low[..., None] / scale).round().clamp(0, 15)
        plain = (((exact / scale).round() + zero).clamp(0, 15) - zero) * scale
        ours = found.dequantize().unflatten(1, (-1, size))
        theirs = (plain - exact).square().sum(-1)
        assert ((ours - exact).square().sum(-1) <= theirs * 1.0001 + 1e-30).all()

    def test_better_than_compressed_tensors_symmetric_min_max(self) -> None:
        weight = random(64, 512, 2)
        args = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
        groups = weight.unflatten(1, (-1, 128))
        theirs = fake_quantize(
            weight, *calculate_qparams(groups.amin(-1), groups.amax(-1), args), args
        )
        ours = INT4.quantize(weight).dequantize()
        assert error(weight, ours) < 0.9 * error(weight, theirs)

    def test_outliers_do_not_ruin_their_group(self) -> None:
        """An outlier costs the others a few steps at most of what it costs by min-max."""
        weight = random(8, 128, 3)
        weight[:, 5] = 6.0
        args = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        theirs = fake_quantize(weight, *calculate_qparams(low, high, args), args)
        ours = INT4.quantize(weight).dequantize()
        assert error(weight, ours) < 0.8 * error(weight, theirs)

    @pytest.mark.parametrize(
        ("columns", "bits", "group_size"),
        [(256, 4, 128), (192, 4, 64), (96, 4, 32), (100, 8, 100), (31, 8, 31)],
    )
    def test_falls_back_to_what_divides(self, columns: int, bits: int, group_size: int) -> None:
        found = INT4.quantize(random(4, columns))
        assert (found.bits, found.group_size) == (bits, group_size)

    def test_a_smaller_group_is_better(self) -> None:
        weight = random(32, 512, 4)
        errors = [
            error(weight, scheme_named("int4", size).quantize(weight).dequantize())
            for size in (128, 64, 32)
        ]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("scheme", [INT8, INT4])
class TestBoth:
    def test_scales_are_exact_in_both_half_types(self, scheme: Scheme) -> None:
        for scale in (1e-3, 1.0, 100.0):
            scales = scheme.quantize(random(32, 256, 5, scale)).scales_NG
            assert torch.equal(scales.bfloat16().float(), scales)
            assert torch.equal(scales.half().float(), scales)

    def test_declared_as_made(self, scheme: Scheme) -> None:
        for columns in (256, 192, 100):
            declared, made = scheme.declare(4, columns), scheme.quantize(random(4, columns))
            assert declared.shape == made.shape and declared.num_bytes == made.num_bytes
            assert (declared.bits, declared.group_size) == (made.bits, made.group_size)
            assert (declared.offsets_NG is None) == (made.offsets_NG is None)
            meta = scheme.quantize(torch.empty(4, columns, device="meta"))
            assert meta.codes_NK.is_meta and meta.num_bytes == made.num_bytes

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_is_refused(self, scheme: Scheme, value: float) -> None:
        weight = random(300, 512)
        weight[299, 511] = value
        with pytest.raises(CheckpointError, match=r"layers\.0\.q_proj holds values"):
            scheme.quantize(weight, "layers.0.q_proj")

    def test_zeros_and_specks(self, scheme: Scheme) -> None:
        assert (scheme.quantize(torch.zeros(3, 256)).dequantize() == 0).all()
        tiny = random(3, 256, 6, 1e-9)
        assert (scheme.quantize(tiny).dequantize() - tiny).abs().max() < 1e-7

    def test_rows_do_not_matter_to_each_other(self, scheme: Scheme) -> None:
        """Work goes in slices of rows; where they end must not show."""
        weight = random(1100, 256, 7)
        assert len(list(row_slices(1100, 256))) > 2
        whole, part = scheme.quantize(weight), scheme.quantize(weight[700:])
        assert torch.equal(whole.codes_NK[700:], part.codes_NK)
        assert torch.equal(whole.scales_NG[700:], part.scales_NG)


def test_scheme_names() -> None:
    assert scheme_named("int4") is INT4 and scheme_named("int4", 64).group_size == 64
    for name, size, message in (
        ("int5", None, "no scheme 'int5': choose one of int8, int4"),
        ("int8", 128, "leave --group-size out"),
        ("int4", 48, "--group-size 48 is none of 32, 64, 128"),
    ):
        with pytest.raises(ConfigError, match=message):
            scheme_named(name, size)


@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    size=st.sampled_from([8, 32]),
    seed=st.integers(0, 99),
    asymmetric=st.booleans(),
    ordered=st.booleans(),
)
def test_dequantize(
    rows: int, groups: int, size: int, seed: int, asymmetric: bool, ordered: bool
) -> None:
    """Against the definition, in float64, number by number."""
    generator = torch.Generator().manual_seed(seed)
    columns = groups * size
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator)
    offsets = torch.randn(rows, groups, generator=generator) if asymmetric else None
    order = torch.randperm(columns, generator=generator) if ordered else None
    found = QuantizedWeight(4, size, codes, scales, offsets, order).dequantize()
    for k in range(columns):
        g = k // size
        offset = -8.0 * scales[:, g] if offsets is None else offsets[:, g]
        expected = scales[:, g].double() * codes[:, k].double() + offset.double()
        column = k if order is None else int(order[k])
        assert torch.allclose(found[:, column].double(), expected, atol=1e-6)
