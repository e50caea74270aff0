"""Attention on a CPU by our own kernels, straight from the slots' address ranges.

Rows with few queries (decode) are cut along the context, so that one long sequence keeps all
threads busy and each byte of KV is read once; rows with many queries (prefill) are cut into tiles
of queries. One parallel region computes both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from penstock.engine.attention.base import AttentionRow, AttentionShape
from penstock.engine.memory.base import KvMemory
from penstock.engine.platforms.cpu import kernels

#: Compiled into the kernels (`attend_dim` in attention.cpp).
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 256)

#: Up to this many queries of one kv head, reading the keys costs more than the arithmetic.
_FEW_QUERIES = 8
#: The shortest stretch of context worth an item of its own.
_MIN_STRETCH_TOKENS = 256
_ITEMS_PER_THREAD = 4


class _Call(ctypes.Structure):
    """Mirrors `Call` in attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("rows", "tiles", "items", "joins", "partials")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_rows",
                "num_tiles",
                "num_items",
                "num_joins",
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
                "num_threads",
            )
        ),
        ("scale", ctypes.c_float),
    )


class NativeCpuAttention:
    """See `AttentionBackend`. Needs memory whose slots are contiguous address ranges."""

    name = "cpu_native"

    @staticmethod
    def unsupported(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it reads host memory, not {device.type}"
        if dtype not in (torch.bfloat16, torch.float32):
            return f"{dtype} is not compiled in"
        if shape.head_dim not in HEAD_DIMS:
            return f"head_dim {shape.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
        if kernels.load() is None:
            return "the native kernels could not be compiled"
        return None

    def __init__(self, shape: AttentionShape, memory: KvMemory) -> None:
        library = kernels.load()
        assert library is not None, "ask `unsupported` first"
        layout = memory.layout
        self._library = library
        self._memory = memory
        self._is_bf16 = int(layout.dtype == "bfloat16")
        self._layer_bytes = layout.block_bytes // layout.num_layers
        self._group = shape.num_heads // shape.num_kv_heads
        self._tile_queries = library.penstock_tile_queries()
        self._window = shape.sliding_window or 0
        self._call = _Call(
            block_stride_bytes=memory.block_stride_bytes,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_tokens=layout.block_tokens,
            sliding_window=self._window,
            scale=shape.scale,
        )
        self._partials = torch.empty(0)

    def plan(self, rows: list[AttentionRow]) -> None:
        self._call.num_threads = torch.get_num_threads()
        addresses, tiles, items, joins = [], [], [], []
        stretch = self._stretch_tokens(rows)
        first = num_partials = 0
        for i, row in enumerate(rows):
            num_blocks = -(-(row.start + row.num_tokens) // self._call.block_tokens)
            base = self._memory.base(row.slot, num_blocks)
            addresses.append((base, row.start, row.num_tokens, first))
            first += row.num_tokens
            if not self._few_queries(row):
                tiles += self._tiles(i, row)
                continue
            starts = range(self._first_key(row), row.start + row.num_tokens, stretch)
            num_queries = row.num_tokens * self._group
            for head in range(self._call.num_kv_heads):
                joins.append((i, head, num_partials, len(starts)))
                for start in starts:
                    end = min(start + stretch, row.start + row.num_tokens)
                    items.append((i, head, start, end, num_partials))
                    num_partials += num_queries
        self._keep(rows=addresses, tiles=tiles, items=items, joins=joins)
        width = 2 + self._call.head_dim
        if len(self._partials) < num_partials * width:
            self._partials = torch.empty(num_partials * width, dtype=torch.float32)
        self._call.partials = self._partials.data_ptr()

    def run(
        self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        q_THD, k_TGD, v_TGD = (_heads_together(x) for x in (q_THD, k_TGD, v_TGD))
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
        call = self._call
        call.out, call.out_token_stride = out_THD.data_ptr(), out_THD.stride(0)
        call.q, call.q_token_stride = q_THD.data_ptr(), q_THD.stride(0)
        call.k, call.k_token_stride = k_TGD.data_ptr(), k_TGD.stride(0)
        call.v, call.v_token_stride = v_TGD.data_ptr(), v_TGD.stride(0)
        call.layer_offset_bytes = layer * self._layer_bytes
        self._library.penstock_store_kv(ctypes.byref(call), self._is_bf16)
        refused = self._library.penstock_attend(ctypes.byref(call), self._is_bf16)
        assert not refused, f"head_dim {call.head_dim} is not compiled in"
        return out_THD

    def _few_queries(self, row: AttentionRow) -> bool:
        return row.num_tokens == 1 or row.num_tokens * self._group <= _FEW_QUERIES

    def _first_key(self, row: AttentionRow) -> int:
        """The first position that any query of the row sees."""
        return max(0, row.start - self._window + 1) if self._window else 0

    def _tiles(self, i: int, row: AttentionRow) -> list[tuple[int, int, int]]:
        """Last queries first: they see the most, and a long tile should not start at the end."""
        firsts = range(0, row.num_tokens * self._group, self._tile_queries)
        heads = range(self._call.num_kv_heads)
        return [(i, head, first) for first in reversed(firsts) for head in heads]

    def _stretch_tokens(self, rows: list[AttentionRow]) -> int:
        """How much context one item takes, so that there are a few items for each thread."""
        few = [row for row in rows if self._few_queries(row)]
        tokens = sum(row.start + row.num_tokens - self._first_key(row) for row in few)
        wanted = self._call.num_threads * _ITEMS_PER_THREAD
        return max(_MIN_STRETCH_TOKENS, -(-tokens * self._call.num_kv_heads // wanted))

    def _keep(self, **lists: Sequence[tuple[int, ...]]) -> None:
        """Hand the lists to the kernel as arrays that live until the next plan."""
        self._arrays = {name: np.array(found, dtype=np.int64) for name, found in lists.items()}
        for name, array in self._arrays.items():
            setattr(self._call, name, array.ctypes.data)
            setattr(self._call, f"num_{name}", len(array))


def _heads_together(x_THD: torch.Tensor) -> torch.Tensor:
    """A token's heads must lie one after the other; tokens may lie apart, as in a fused qkv."""
    _, num_heads, dim = x_THD.shape
    if x_THD.stride(2) == 1 and (num_heads == 1 or x_THD.stride(1) == dim):
        return x_THD
    return x_THD.contiguous()
