"""Linears in 8 bits through oneDNN, for machines on which our kernels cannot be compiled.

torch's `qlinear` takes one scale for all activations, so it gets none: the scales of the tokens are
multiplied in afterwards.
"""

from __future__ import annotations

import functools

import torch

from penstock.engine.quantization.weight import QuantizedWeight

_PROBE_INPUTS = 256


def cannot_run(weight: QuantizedWeight) -> str | None:
    """None where `OneDnnInt8Linear` takes this weight and is exact on this machine, else why."""
    if weight.bits != 8 or not weight.per_channel or weight.offsets_NG is not None:
        return "not symmetric 8-bit weights with a scale for each output"
    return refusal()


@functools.cache
def refusal() -> str | None:
    """Why oneDNN's 8-bit product is not used on this machine; None: it is exact."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    extremes = torch.tensor([-128, 127], dtype=torch.int8)
    weight_NK = extremes[torch.arange(32) % 2][:, None].repeat(1, _PROBE_INPUTS)
    codes_TK = torch.tensor([[-127], [127]], dtype=torch.int8).repeat(1, _PROBE_INPUTS)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight_NK, None)
        found_TN = _multiply(codes_TK, packed, torch.ones(32), torch.zeros(32, dtype=torch.int32))
    except (AttributeError, RuntimeError) as exc:
        return f"oneDNN's 8-bit product fails: {exc}"
    # Without VNNI, pairs of products can saturate at 16 bits.
    exact = torch.equal(found_TN.double(), codes_TK.double() @ weight_NK.double().T)
    return None if exact else "oneDNN's 8-bit product is not exact on this CPU"


class OneDnnInt8Linear:
    """x_TK -> y_TN of x's dtype, the activations quantized to 8 bits token by token."""

    def __init__(self, weight: QuantizedWeight, bias_N: torch.Tensor | None = None) -> None:
        signed_NK = (weight.codes_NK ^ 128).view(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(signed_NK, None)
        self._num_outputs = weight.shape[0]
        self._scales_N = weight.scales_NG[:, 0].float().contiguous()
        self._zeros_N = torch.zeros(self._num_outputs, dtype=torch.int32)
        self._bias_N = None if bias_N is None else bias_N.float()
        self._order_K = weight.input_order_K

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        if len(x_TK) == 0:
            return x_TK.new_empty((0, self._num_outputs))
        x = x_TK.float() if self._order_K is None else x_TK[:, self._order_K].float()
        scales_T1 = x.abs().amax(dim=1, keepdim=True) / 127
        codes_TK = (x / scales_T1.clamp(min=1e-35)).round_().to(torch.int8)
        out_TN = _multiply(codes_TK, self._packed, self._scales_N, self._zeros_N) * scales_T1
        if self._bias_N is not None:
            out_TN += self._bias_N
        return out_TN.to(x_TK.dtype)


def _multiply(
    codes_TK: torch.Tensor, packed: torch.Tensor, scales_N: torch.Tensor, zeros_N: torch.Tensor
) -> torch.Tensor:
    """float32 [T, N]. The codes go in unsigned, with 128 as their zero: for signed ones oneDNN has
    nothing but its reference implementation on some machines, a thousand times slower."""
    unsigned_TK = codes_TK.view(torch.uint8) ^ 128
    out_TN: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        *(unsigned_TK, 1.0, 128, packed, scales_N, zeros_N),
        *(None, 1.0, 0, torch.float32, "none", [], ""),
    )
    return out_TN
