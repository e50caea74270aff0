"""Linears in few bits on a CPU: the packed weight, the product, the embedding. See quantized.h.

The weight is packed once, panel by panel, and the caller's codes are let go. A product is two
operations: `quantize_rows` turns the activations into signed 8-bit codes (a scale for each token,
or for each token and group of inputs where the weight has groups), then `linear_int8` or
`linear_int4` multiplies.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch.nn import functional

from penstock.engine.memory.keeper import PRIVATE, Keeper
from penstock.engine.platforms.base import TiedEmbedding
from penstock.engine.platforms.cpu import onednn_int8
from penstock.engine.platforms.cpu.ops import Ops
from penstock.engine.quantization.weight import QuantizedWeight

PANEL_OUTPUTS = 64
_WORD_INPUTS = 4
#: Inputs in a step of the kernels, by the weight's bits.
_STEP_INPUTS = {8: 4, 4: 8}
#: Longer groups could overflow an int32 sum of 8-bit products.
_MAX_GROUP_LENGTH = 1 << 16
#: How far float16 scales may move a weight, in steps between its codes.
_MAX_SHIFT_STEPS = 1 / 64
#: Panels packed at a time: temporaries stay at a few MiB.
_PANELS_AT_ONCE = 16
#: Below this many activations, quantizing them is not worth waking the other threads.
_SERIAL_ELEMENTS = 1 << 15


def cannot_pack(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """None where the kernels take this weight and activations of `dtype`, else why not."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"activations in {dtype}"
    if weight.group_size > _MAX_GROUP_LENGTH:
        return f"groups of more than {_MAX_GROUP_LENGTH} inputs"
    return None


def kind(ops: Ops | None, bits: int) -> str:
    """What runs linears in so many bits, for `penstock doctor`."""
    if ops is not None:
        return f"native ({ops.library.penstock_dot_unit().decode()})"
    if bits == 8 and onednn_int8.refusal() is None:
        return "onednn by output channel, else dequantized"
    return "dequantized (the native kernels could not be compiled)"


class _Layout(ctypes.Structure):
    """Mirrors `PanelLayout` in quantized.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_outputs", "num_groups", "group_length")),
        *((name, ctypes.c_int32) for name in ("half_scales", "has_offsets")),
    )


class _LinearArgs(ctypes.Structure):
    """Mirrors `FewBitsLinear` in quantized.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "num_tokens",
                "codes_TK",
                "scales_TG",
                "sums_TG",
                "panels",
                "bias_N",
                "out_TN",
            )
        ),
        ("is_bf16", ctypes.c_int64),
        ("layout", _Layout),
    )


class _QuantizeArgs(ctypes.Structure):
    """Mirrors `QuantizeRows` in quantize_rows.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("num_tokens", "x_TK", "codes_TK", "scales_TG", "sums_TG", "order_K")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("x_stride", "num_groups", "group_length", "padded_length", "is_bf16")
        ),
    )


class _EmbedArgs(ctypes.Structure):
    """Mirrors `EmbedRows` in quantize_rows.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("num_tokens", "ids_T", "panels", "order_K", "out_TK")
        ),
        *((name, ctypes.c_int64) for name in ("bits", "group_length", "is_bf16")),
        ("layout", _Layout),
    )


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations as the products take them: x[t, k] is about scales[t, g] * codes[t, k]."""

    codes_TK: torch.Tensor  # int8, each group padded with zeros to `padded_length`
    scales_TG: torch.Tensor  # float32
    sums_TG: torch.Tensor  # int32: of each group's codes


class PackedWeight:
    """A weight [N, K] in the layout of quantized.h. Nothing of `weight` is kept."""

    def __init__(self, weight: QuantizedWeight, keeper: Keeper = PRIVATE) -> None:
        self.bits = weight.bits
        self.num_outputs, self.num_inputs = weight.shape
        self.group_size = weight.group_size
        step = _STEP_INPUTS[self.bits]
        self.padded_length = -(-self.group_size // step) * step
        self.num_groups = self.num_inputs // self.group_size
        noted = keeper.note(lambda: str(_scale_dtype(weight)))
        self.scale_dtype = torch.float16 if noted == str(torch.float16) else torch.float32
        order_K = weight.input_order_K
        self.order_K = (
            None
            if order_K is None
            else keeper.keep(tuple(order_K.shape), torch.int32, lambda out: out.copy_(order_K))
        )
        self.layout = _Layout(
            num_outputs=self.num_outputs,
            num_groups=self.num_groups,
            group_length=self.padded_length,
            half_scales=self.scale_dtype == torch.float16,
            has_offsets=weight.offsets_NG is not None,
        )
        self.panels = self._pack(weight, keeper)  # uint8 [panels, G, bytes of a group]

    @property
    def order_address(self) -> int | None:
        return None if self.order_K is None else self.order_K.data_ptr()

    def _pack(self, weight: QuantizedWeight, keeper: Keeper) -> torch.Tensor:
        num_panels = -(-self.num_outputs // PANEL_OUTPUTS)
        tables = [weight.scales_NG]
        if weight.offsets_NG is not None:
            tables.append(weight.offsets_NG)
        header = len(tables) * PANEL_OUTPUTS * self.scale_dtype.itemsize
        code_bytes = PANEL_OUTPUTS * self.padded_length * self.bits // 8
        shape = (num_panels, self.num_groups, header + code_bytes)
        return keeper.keep(
            shape, torch.uint8, lambda panels: self._fill(panels, header, weight, tables)
        )

    def _fill(
        self,
        panels: torch.Tensor,
        header: int,
        weight: QuantizedWeight,
        tables: list[torch.Tensor],
    ) -> None:
        num_panels = len(panels)
        codes = panels[..., header:].view(torch.int32)
        scales = panels[..., :header].view(self.scale_dtype)
        for first in range(0, num_panels, _PANELS_AT_ONCE):
            here = slice(first, min(first + _PANELS_AT_ONCE, num_panels))
            rows = slice(here.start * PANEL_OUTPUTS, here.stop * PANEL_OUTPUTS)
            words = self._words(_padded(weight.codes_NK[rows]))
            codes[here].view(*words.shape).copy_(words)
            for index, table_NG in enumerate(tables):
                table = _padded(table_NG[rows]).view(-1, PANEL_OUTPUTS, self.num_groups)
                part = slice(index * PANEL_OUTPUTS, (index + 1) * PANEL_OUTPUTS)
                scales[here, :, part].copy_(table.transpose(1, 2))

    def _words(self, codes_NK: torch.Tensor) -> torch.Tensor:
        """int32 [panels, G, steps, 64], one word of each output after the other."""
        groups = codes_NK.view(-1, self.num_groups, self.group_size)
        groups = functional.pad(groups, (0, self.padded_length - self.group_size))
        if self.bits == 4:
            steps = groups.view(*groups.shape[:2], -1, 2, _WORD_INPUTS)
            groups = (steps[..., 0, :] | (steps[..., 1, :] << 4)).flatten(2)
        words = groups.contiguous().view(torch.int32)  # [N, G, steps]
        return words.view(-1, PANEL_OUTPUTS, *words.shape[1:]).permute(0, 2, 3, 1)


class FewBitsLinear:
    """x_TK -> y_TN for bfloat16 or float32 x, y of the same dtype. A token's result depends on
    nothing but the token."""

    def __init__(
        self,
        ops: Ops,
        weight: QuantizedWeight,
        bias_N: torch.Tensor | None = None,
        keeper: Keeper = PRIVATE,
    ) -> None:
        self.weight = PackedWeight(weight, keeper)
        self._ops = ops
        self._bias_N = None if bias_N is None else _padded(bias_N.float()[:, None])
        self._quantize = ops.address("quantize_rows")
        self._multiply = ops.address(f"linear_int{weight.bits}")

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.multiply(self.quantize(x_TK), x_TK.dtype)

    def quantize(self, x_TK: torch.Tensor) -> QuantizedRows:
        """The activations' codes, in the weight's order of inputs."""
        weight, num_tokens = self.weight, len(x_TK)
        assert x_TK.shape[1] == weight.num_inputs, (x_TK.shape, weight.num_inputs)
        if x_TK.stride(1) != 1:
            x_TK = x_TK.contiguous()
        groups, length = weight.num_groups, weight.padded_length
        rows = QuantizedRows(
            self._ops.empty((num_tokens, groups * length), torch.int8),
            self._ops.empty((num_tokens, groups), torch.float32),
            self._ops.empty((num_tokens, groups), torch.int32),
        )
        args = _QuantizeArgs(
            x_TK=x_TK.data_ptr(),
            codes_TK=rows.codes_TK.data_ptr(),
            scales_TG=rows.scales_TG.data_ptr(),
            sums_TG=rows.sums_TG.data_ptr(),
            order_K=weight.order_address,
            x_stride=x_TK.stride(0),
            num_groups=groups,
            group_length=weight.group_size,
            padded_length=length,
            is_bf16=_is_bf16(x_TK.dtype),
        )
        serial = x_TK.numel() < _SERIAL_ELEMENTS
        self._ops.run(self._quantize, args, num_tokens, serial=serial, keep=(weight,))
        return rows

    def multiply(self, rows: QuantizedRows, dtype: torch.dtype) -> torch.Tensor:
        """y_TN for activations of `quantize`."""
        num_tokens = len(rows.codes_TK)
        out_TN = self._ops.empty((num_tokens, self.weight.num_outputs), dtype)
        args = _LinearArgs(
            codes_TK=rows.codes_TK.data_ptr(),
            scales_TG=rows.scales_TG.data_ptr(),
            sums_TG=rows.sums_TG.data_ptr(),
            panels=self.weight.panels.data_ptr(),
            bias_N=None if self._bias_N is None else self._bias_N.data_ptr(),
            out_TN=out_TN.data_ptr(),
            is_bf16=_is_bf16(dtype),
            layout=self.weight.layout,
        )
        self._ops.run(self._multiply, args, num_tokens, keep=(self,))
        return out_TN


class FewBitsEmbedding(TiedEmbedding):
    """One matrix [V, E] for both ends of a model, in few bits, held once."""

    def __init__(
        self, ops: Ops, weight: QuantizedWeight, dtype: torch.dtype, keeper: Keeper = PRIVATE
    ) -> None:
        self.linear = FewBitsLinear(ops, weight, keeper=keeper)
        self._ops = ops
        self._dtype = dtype
        self._embed = ops.address("embed_few_bits")

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight
        assert ids_T.dtype == torch.int64 and ids_T.is_contiguous(), ids_T.dtype
        out_TE = self._ops.empty((len(ids_T), weight.num_inputs), self._dtype)
        args = _EmbedArgs(
            ids_T=ids_T.data_ptr(),
            panels=weight.panels.data_ptr(),
            order_K=weight.order_address,
            out_TK=out_TE.data_ptr(),
            bits=weight.bits,
            group_length=weight.group_size,
            is_bf16=_is_bf16(self._dtype),
            layout=weight.layout,
        )
        serial = out_TE.numel() < _SERIAL_ELEMENTS
        self._ops.run(self._embed, args, len(ids_T), serial=serial, keep=(weight,))
        return out_TE

    def head(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self.linear(x_TE)


def _is_bf16(dtype: torch.dtype) -> bool:
    assert dtype in (torch.bfloat16, torch.float32), dtype
    return dtype == torch.bfloat16


def _padded(table: torch.Tensor) -> torch.Tensor:
    """Contiguous, with rows of zeros up to a whole panel."""
    missing = -len(table) % PANEL_OUTPUTS
    return functional.pad(table, (0, 0, 0, missing)) if missing else table.contiguous()


def _scale_dtype(weight: QuantizedWeight) -> torch.dtype:
    """float16 halves what scales of small groups cost in bandwidth, and is what most checkpoints
    store. float32 where float16 would move a weight noticeably, or be 0 or infinite."""
    if weight.per_channel:
        return torch.float32
    scales_NG = weight.scales_NG.float()
    shift_NG = (scales_NG.half().float() - scales_NG).abs() * _largest_factor(weight)
    if weight.offsets_NG is not None:
        offsets_NG = weight.offsets_NG.float()
        shift_NG = shift_NG + (offsets_NG.half().float() - offsets_NG).abs()
    exact = bool((shift_NG <= scales_NG.abs() * _MAX_SHIFT_STEPS).all())
    return torch.float16 if exact else torch.float32


def _largest_factor(weight: QuantizedWeight) -> int:
    """What a scale is multiplied by at most: 6-bit codes held in 8 bits do not reach far."""
    low, high = (int(code) for code in weight.codes_NK.aminmax())
    middle = 0 if weight.offsets_NG is not None else 1 << (weight.bits - 1)
    return max(high - middle, middle - low)
