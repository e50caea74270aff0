"""The small operations on a CPU: our kernels where they apply, else `None` for torch's."""

from __future__ import annotations

import ctypes

import torch

from penstock.engine.platforms.base import QkNorms

_DTYPES = (torch.bfloat16, torch.float32)


class _QueryKey(ctypes.Structure):
    """Mirrors `QueryKey` in small_ops.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "q_norm", "k_norm", "cos", "sin")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_tokens",
                "num_heads",
                "num_kv_heads",
                "q_token_stride",
                "q_head_stride",
                "k_token_stride",
                "k_head_stride",
                "dim",
            )
        ),
        ("eps", ctypes.c_float),
    )


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

    def rope_(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        norms: QkNorms | None,
    ) -> bool:
        """See `Platform.rope_`. cos and sin must be float32 and contiguous."""
        dtype, dim = q_THD.dtype, q_THD.shape[2]
        if dtype not in _DTYPES or q_THD.stride(2) != 1 or k_TGD.stride(2) != 1:
            return False
        for table in (cos_TD, sin_TD):
            if table.dtype != torch.float32 or not table.is_contiguous():
                return False
        if norms is not None and not (norms.query.dtype == norms.key.dtype == dtype):
            return False
        call = _QueryKey(
            q=q_THD.data_ptr(),
            k=k_TGD.data_ptr(),
            q_norm=None if norms is None else norms.query.data_ptr(),
            k_norm=None if norms is None else norms.key.data_ptr(),
            cos=cos_TD.data_ptr(),
            sin=sin_TD.data_ptr(),
            num_tokens=q_THD.shape[0],
            num_heads=q_THD.shape[1],
            num_kv_heads=k_TGD.shape[1],
            q_token_stride=q_THD.stride(0),
            q_head_stride=q_THD.stride(1),
            k_token_stride=k_TGD.stride(0),
            k_head_stride=k_TGD.stride(1),
            dim=dim,
            eps=0.0 if norms is None else norms.eps,
        )
        self._rope(ctypes.byref(call), torch.get_num_threads(), dtype == torch.bfloat16)
        return True
