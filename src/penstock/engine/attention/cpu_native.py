"""Attention on a CPU by our own kernels, straight from the slots' address ranges.

Rows with few queries (decode) are cut along the context, so that one long sequence keeps all
threads busy and each byte of KV is read once; rows with many queries (prefill) are cut into tiles
of queries. One operation stores the step's keys and values and computes both.
"""

from __future__ import annotations

import ctypes
import weakref

import torch

from penstock.engine.attention.base import AttentionRow, AttentionShape
from penstock.engine.memory.base import KvMemory
from penstock.engine.platforms.cpu import kernels
from penstock.engine.platforms.cpu.ops import Ops

#: What attention.cpp is compiled for, one at a time.
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 256)

#: Below this many products of a query and a key, waking the other threads costs more than it saves.
_SERIAL_PRODUCTS = 256


class _Args(ctypes.Structure):
    """Mirrors `Call` in attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("num_tokens", "plan", "out", "q", "k", "v")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "q_token_stride",
                "k_token_stride",
                "v_token_stride",
                "out_token_stride",
                "block_stride_bytes",
                "layer_offset_bytes",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "block_tokens",
                "sliding_window",
                "is_bf16",
                "kv_is_int8",
                "kv_is_bf16",
            )
        ),
        ("scale", ctypes.c_float),
    )


class _Row(ctypes.Structure):
    """Mirrors `Row` in attention.h."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("base", "start", "num_tokens", "first"))


class NativeCpuAttention:
    """See `AttentionBackend`. Needs memory whose slots are contiguous address ranges.

    A recorded call knows the address of the plan, which stays the same from step to step.
    """

    name = "cpu_native"

    @staticmethod
    def unsupported(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it reads host memory, not {device.type}"
        if dtype not in (torch.bfloat16, torch.float32):
            return f"{dtype} is not compiled in"
        if shape.head_dim not in HEAD_DIMS:
            return f"head_dim {shape.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
        if kernels.load_attention(shape.head_dim) is None:
            return "the native kernels could not be compiled"
        return None

    def __init__(self, shape: AttentionShape, memory: KvMemory, ops: Ops | None = None) -> None:
        library = kernels.load_attention(shape.head_dim)
        core = kernels.load()
        assert library is not None and core is not None, "ask `unsupported` first"
        ops = ops or Ops(core)
        layout = memory.layout
        self._ops = ops
        self._memory = memory
        self._layer_bytes = layout.block_bytes // layout.num_layers
        self._library = library
        self._attend = ops.address("attend", library)
        self._plan = library.penstock_plan_new()
        # Not at exit: a step may still be running then.
        weakref.finalize(self, library.penstock_plan_free, self._plan).atexit = False
        self._rows = (_Row * 1)()
        self._serial = False
        self._args = _Args(
            plan=self._plan,
            block_stride_bytes=memory.block_stride_bytes,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_tokens=layout.block_tokens,
            sliding_window=shape.sliding_window or 0,
            kv_is_int8=layout.dtype == "int8",
            kv_is_bf16=layout.dtype == "bfloat16",
            scale=shape.scale,
        )

    def plan(self, rows: list[AttentionRow]) -> None:
        if len(rows) > len(self._rows):
            self._rows = (_Row * (2 * len(rows)))()
        base, block_tokens, into = self._memory.base, self._args.block_tokens, self._rows
        first = products = 0
        for i, row in enumerate(rows):
            start, num_tokens = row.start, row.num_tokens
            end = start + num_tokens
            # ctypes makes a structure of a tuple; its stubs want the structure.
            into[i] = (base(row.slot, -(-end // block_tokens)), start, num_tokens, first)  # type: ignore[call-overload]
            first += num_tokens
            products += num_tokens * end
        self._serial = products * self._args.num_heads < _SERIAL_PRODUCTS
        self._library.penstock_plan(
            self._plan, ctypes.byref(self._args), into, len(rows), torch.get_num_threads()
        )

    def run(
        self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        q_THD, k_TGD, v_TGD = (_heads_together(x) for x in (q_THD, k_TGD, v_TGD))
        out_THD = self._ops.empty(tuple(q_THD.shape), q_THD.dtype)
        args = _Args.from_buffer_copy(self._args)
        args.is_bf16 = q_THD.dtype == torch.bfloat16
        args.out, args.out_token_stride = out_THD.data_ptr(), out_THD.stride(0)
        args.q, args.q_token_stride = q_THD.data_ptr(), q_THD.stride(0)
        args.k, args.k_token_stride = k_TGD.data_ptr(), k_TGD.stride(0)
        args.v, args.v_token_stride = v_TGD.data_ptr(), v_TGD.stride(0)
        args.layer_offset_bytes = layer * self._layer_bytes
        self._ops.run(self._attend, args, len(q_THD), serial=self._serial, keep=(self,))
        return out_THD


def _heads_together(x_THD: torch.Tensor) -> torch.Tensor:
    """A token's heads must lie one after the other; tokens may lie apart, as in a fused qkv."""
    _, num_heads, dim = x_THD.shape
    if x_THD.stride(2) == 1 and (num_heads == 1 or x_THD.stride(1) == dim):
        return x_THD
    return x_THD.contiguous()
