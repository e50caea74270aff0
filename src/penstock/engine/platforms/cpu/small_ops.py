"""The small operations on a CPU: our kernels where they apply, else `None` for torch's.

At decode they would cost torch several calls apiece, which together rival the reading of weights.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from penstock.engine.platforms.base import QkNorms
from penstock.engine.platforms.cpu.ops import Ops

_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
#: Below this many elements, waking the other threads costs more than they save.
_SERIAL_ELEMENTS = 1 << 15


def _struct(name: str, pointers: str, integers: str, reals: str = "") -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(each, ctypes.c_void_p) for each in pointers.split()]
    fields += [(each, ctypes.c_int64) for each in integers.split()]
    fields += [(each, ctypes.c_float) for each in reals.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [("num_tokens", ctypes.c_void_p), *fields]})


# Mirrors of the structs in small_ops.cpp.
_RmsNorm = _struct("_RmsNorm", "out x weight", "num_inner token_stride inner_stride dim", "eps")
_AddRmsNorm = _struct("_AddRmsNorm", "out hidden delta weight", "dim", "eps")
_SiluMul = _struct("_SiluMul", "out gate_up", "dim stride")
_QueryKey = _struct(
    "_QueryKey",
    "q k q_norm k_norm cos sin",
    "num_heads num_kv_heads q_token_stride q_head_stride k_token_stride k_head_stride dim",
    "eps",
)
_GatherRows = _struct("_GatherRows", "out ids matrix", "row_bytes")
_CosSin = _struct("_CosSin", "cos sin positions inv_freq", "half", "scale")


class SmallOps:
    """Each returns None (or False) for what the kernels do not cover: other dtypes or strides."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._addresses = {
            (name, dtype): ops.address(f"{name}_{suffix}")
            for name in ("rms_norm", "add_rms_norm", "silu_mul", "rope")
            for dtype, suffix in _SUFFIX.items()
        }
        self._cos_sin = ops.address("cos_sin")
        self._gather_rows = ops.address("gather_rows")

    def rms_norm(
        self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        operation = self._addresses.get(("rms_norm", x_TH.dtype))
        if operation is None or weight_H.dtype != x_TH.dtype or not 2 <= x_TH.dim() <= 3:
            return None
        if x_TH.stride(-1) != 1 or not weight_H.is_contiguous():
            return None
        out_TH = self._ops.empty(tuple(x_TH.shape), x_TH.dtype)
        heads = x_TH.dim() == 3
        args = _RmsNorm(
            out=out_TH.data_ptr(),
            x=x_TH.data_ptr(),
            weight=weight_H.data_ptr(),
            num_inner=x_TH.shape[1] if heads else 1,
            token_stride=x_TH.stride(0),
            inner_stride=x_TH.stride(1) if heads else 0,
            dim=x_TH.shape[-1],
            eps=eps,
        )
        self._run(operation, args, x_TH, (weight_H,))
        return out_TH

    def add_rms_norm_(
        self,
        hidden_TE: torch.Tensor,
        delta_TE: torch.Tensor,
        weight_E: torch.Tensor,
        eps: float,
    ) -> torch.Tensor | None:
        """See `Platform.add_rms_norm_`."""
        dtype = hidden_TE.dtype
        operation = self._addresses.get(("add_rms_norm", dtype))
        if operation is None or not delta_TE.dtype == weight_E.dtype == dtype:
            return None
        if not all(each.is_contiguous() for each in (hidden_TE, delta_TE, weight_E)):
            return None
        out_TE = self._ops.empty(tuple(hidden_TE.shape), dtype)
        args = _AddRmsNorm(
            out=out_TE.data_ptr(),
            hidden=hidden_TE.data_ptr(),
            delta=delta_TE.data_ptr(),
            weight=weight_E.data_ptr(),
            dim=hidden_TE.shape[1],
            eps=eps,
        )
        self._run(operation, args, hidden_TE, (weight_E,))
        return out_TE

    def silu_mul(self, gate_up_T2I: torch.Tensor) -> torch.Tensor | None:
        operation = self._addresses.get(("silu_mul", gate_up_T2I.dtype))
        if operation is None or gate_up_T2I.dim() != 2 or gate_up_T2I.stride(1) != 1:
            return None
        num_tokens, dim = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
        out_TI = self._ops.empty((num_tokens, dim), gate_up_T2I.dtype)
        args = _SiluMul(
            out=out_TI.data_ptr(),
            gate_up=gate_up_T2I.data_ptr(),
            dim=dim,
            stride=gate_up_T2I.stride(0),
        )
        self._run(operation, args, gate_up_T2I)
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
        operation = self._addresses.get(("rope", q_THD.dtype))
        if operation is None or q_THD.stride(2) != 1 or k_TGD.stride(2) != 1:
            return False
        for table in (cos_TD, sin_TD):
            if table.dtype != torch.float32 or not table.is_contiguous():
                return False
        if norms is not None and not norms.query.dtype == norms.key.dtype == q_THD.dtype:
            return False
        args = _QueryKey(
            q=q_THD.data_ptr(),
            k=k_TGD.data_ptr(),
            q_norm=None if norms is None else norms.query.data_ptr(),
            k_norm=None if norms is None else norms.key.data_ptr(),
            cos=cos_TD.data_ptr(),
            sin=sin_TD.data_ptr(),
            num_heads=q_THD.shape[1],
            num_kv_heads=k_TGD.shape[1],
            q_token_stride=q_THD.stride(0),
            q_head_stride=q_THD.stride(1),
            k_token_stride=k_TGD.stride(0),
            k_head_stride=k_TGD.stride(1),
            dim=q_THD.shape[2],
            eps=0.0 if norms is None else norms.eps,
        )
        self._run(operation, args, q_THD, (norms,))
        return True

    def cos_sin(
        self, positions_T: torch.Tensor, inv_freq_F: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Platform.cos_sin`."""
        shape = (len(positions_T), 2 * len(inv_freq_F))
        cos_TD, sin_TD = (self._ops.empty(shape, torch.float32) for _ in range(2))
        args = _CosSin(
            cos=cos_TD.data_ptr(),
            sin=sin_TD.data_ptr(),
            positions=positions_T.data_ptr(),
            inv_freq=inv_freq_F.data_ptr(),
            half=len(inv_freq_F),
            scale=scale,
        )
        self._run(self._cos_sin, args, cos_TD, (inv_freq_F,))
        return cos_TD, sin_TD

    def embedding(self, ids_T: torch.Tensor, matrix_VE: torch.Tensor) -> torch.Tensor | None:
        """See `Platform.embedding`. Ids must be valid."""
        if not matrix_VE.is_contiguous() or ids_T.dtype != torch.int64:
            return None
        out_TE = self._ops.empty((len(ids_T), matrix_VE.shape[1]), matrix_VE.dtype)
        args = _GatherRows(
            out=out_TE.data_ptr(),
            ids=ids_T.data_ptr(),
            matrix=matrix_VE.data_ptr(),
            row_bytes=matrix_VE.shape[1] * matrix_VE.element_size(),
        )
        self._run(self._gather_rows, args, out_TE, (matrix_VE,))
        return out_TE

    def _run(
        self, operation: int, args: ctypes.Structure, x: torch.Tensor, keep: tuple[object, ...] = ()
    ) -> None:
        serial = x.numel() < _SERIAL_ELEMENTS
        self._ops.run(operation, args, x.shape[0], serial=serial, keep=keep)
