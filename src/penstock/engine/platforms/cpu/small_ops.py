"""The small operations on a CPU: our kernels where they apply, else `None` for torch's."""

from __future__ import annotations

import ctypes

import torch

_DTYPES = (torch.bfloat16, torch.float32)


class SmallOps:
    """Each returns None (or False) for what the kernels do not cover: other dtypes or strides."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._rms_norm = library.penstock_rms_norm
        self._silu_mul = library.penstock_silu_mul
        self._rope = library.penstock_rope

    def rms_norm(
        self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        dtype = x_TH.dtype
        if dtype not in _DTYPES or weight_H.dtype != dtype or not 2 <= x_TH.dim() <= 3:
            return None
        *outer, dim = x_TH.shape
        *strides, unit = x_TH.stride()
        if unit != 1 or not weight_H.is_contiguous():
            return None
        if len(outer) == 1:
            outer, strides = [outer[0], 1], [strides[0], 0]
        out_TH = torch.empty(x_TH.shape, dtype=dtype)
        self._rms_norm(
            out_TH.data_ptr(),
            x_TH.data_ptr(),
            weight_H.data_ptr(),
            *outer,
            *strides,
            dim,
            eps,
            torch.get_num_threads(),
            dtype == torch.bfloat16,
        )
        return out_TH

    def silu_mul(self, gate_up_T2I: torch.Tensor) -> torch.Tensor | None:
        dtype = gate_up_T2I.dtype
        if dtype not in _DTYPES or gate_up_T2I.dim() != 2 or gate_up_T2I.stride(1) != 1:
            return None
        num_tokens, dim = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
        out_TI = torch.empty((num_tokens, dim), dtype=dtype)
        self._silu_mul(
            out_TI.data_ptr(),
            gate_up_T2I.data_ptr(),
            num_tokens,
            dim,
            gate_up_T2I.stride(0),
            torch.get_num_threads(),
            dtype == torch.bfloat16,
        )
        return out_TI

    def rope_(self, x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> bool:
        """Rotates x in place; cos and sin must be float32 and contiguous."""
        for table in (cos_TD, sin_TD):
            if table.dtype != torch.float32 or not table.is_contiguous():
                return False
        if x_THD.dtype not in _DTYPES or x_THD.stride(2) != 1:
            return False
        num_tokens, num_heads, dim = x_THD.shape
        self._rope(
            x_THD.data_ptr(),
            num_tokens,
            num_heads,
            x_THD.stride(0),
            x_THD.stride(1),
            dim,
            cos_TD.data_ptr(),
            sin_TD.data_ptr(),
            torch.get_num_threads(),
            x_THD.dtype == torch.bfloat16,
        )
        return True
