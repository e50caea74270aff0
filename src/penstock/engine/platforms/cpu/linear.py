"""Linears on a CPU, by what this machine does best.

`NativeLinear` is our kernel over a packed weight (linear.h): it reads weights at the speed of
memory for a few tokens and computes at the rate of the vector units for many. oneDNN (onednn.py)
has the matrix units of AMX, and the narrower machines' float32; torch's `linear` takes all else.
The row-major original is dropped once it is packed.
"""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional

from penstock.engine.memory.keeper import PRIVATE, Keeper
from penstock.engine.platforms.base import Linear, TiedEmbedding
from penstock.engine.platforms.cpu import onednn
from penstock.engine.platforms.cpu.ops import Ops

_PANEL = 64  # kPanel in linear.h
#: Below this many weights, a float32 call costs more in oneDNN's dispatch than in arithmetic.
_SMALL_WEIGHTS = 1 << 16
_AVX512_LANES = 16
_NOT_OURS = "linears here are oneDNN's or torch's, which hold weights in a form of their own"


class _Linear(ctypes.Structure):
    """Mirrors `Linear` in linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("num_tokens", "out", "x", "weight", "bias")),
        *(
            (name, ctypes.c_int64)
            for name in ("x_stride", "out_stride", "num_outputs", "words", "parts")
        ),
    )


class _Pack(ctypes.Structure):
    """Mirrors `Pack` in linear.h; `num_tokens` counts panels."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("num_tokens", "out", "weight")),
        *((name, ctypes.c_int64) for name in ("rows", "words")),
    )


class _Embed(ctypes.Structure):
    """Mirrors `Embed` in linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("num_tokens", "out", "ids", "weight")),
        *((name, ctypes.c_int64) for name in ("words", "columns")),
    )


def cannot_run(ops: Ops | None, dtype: torch.dtype) -> str | None:
    """None where `NativeLinear` is the fastest for this dtype on this machine, else why not."""
    if ops is None:
        return "the native kernels could not be compiled"
    if dtype == torch.bfloat16:
        return "oneDNN uses AMX" if torch.cpu._is_amx_tile_supported() else None
    if dtype == torch.float32:
        wide = ops.library.penstock_lanes() == _AVX512_LANES
        return None if wide else "oneDNN is faster without AVX-512"
    return f"{dtype} is not compiled in"


def kind(ops: Ops | None, dtype: torch.dtype) -> str:
    """What runs linears of this dtype, for `penstock doctor`."""
    if cannot_run(ops, dtype) is None:
        return "native"
    refusal = onednn.cannot_pack(dtype)
    return "onednn re-ordered" if refusal is None else f"torch ({refusal})"


def make_linear(
    ops: Ops | None,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    keeper: Keeper = PRIVATE,
) -> Linear:
    """The fastest that can take this weight."""
    dtype = weight_NK.dtype
    if ops is not None and cannot_run(ops, dtype) is None and packable(weight_NK):
        return NativeLinear(ops, weight_NK, bias_N, keeper)
    keeper.leaves_out(_NOT_OURS)
    tiny = dtype == torch.float32 and weight_NK.numel() < _SMALL_WEIGHTS
    if tiny or onednn.cannot_pack(dtype) is not None:
        return lambda x_TK: functional.linear(x_TK, weight_NK, bias_N)
    return onednn.PackedLinear(weight_NK, bias_N)


def make_tied_embedding(
    ops: Ops | None, weight_VE: torch.Tensor, keeper: Keeper = PRIVATE
) -> TiedEmbedding:
    if ops is not None and cannot_run(ops, weight_VE.dtype) is None and packable(weight_VE):
        return NativeTiedEmbedding(NativeLinear(ops, weight_VE, keeper=keeper))
    keeper.leaves_out(_NOT_OURS)
    if onednn.cannot_pack(weight_VE.dtype) is not None:
        return TiedEmbedding(weight_VE)
    return onednn.make_tied_embedding(weight_VE)


def packable(weight_NK: torch.Tensor) -> bool:
    """Rows of whole 32-bit words."""
    return weight_NK.shape[1] * weight_NK.element_size() % 4 == 0


class NativeLinear:
    """x_TK -> y_TN with the weight held in panels [N / 64][K / pair][64][pair] alone; pair is two
    for bfloat16, one for float32. A token's result depends on nothing but the token."""

    def __init__(
        self,
        ops: Ops,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        keeper: Keeper = PRIVATE,
    ) -> None:
        self.ops = ops
        self.dtype = weight_NK.dtype
        self.num_outputs, self.num_inputs = weight_NK.shape
        self.words_PWN = pack(ops, weight_NK, keeper)
        self._bias_N = bias_N
        is_bf16 = self.dtype == torch.bfloat16
        self._operation = ops.address("linear_bf16" if is_bf16 else "linear_f32")
        # Held by every recorded call as well.
        self._keep = (self.words_PWN, bias_N)

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        if x_TK.stride(1) != 1 or x_TK.dtype != self.dtype:
            x_TK = x_TK.to(self.dtype).contiguous()
        num_tokens, num_inputs = x_TK.shape
        assert num_inputs == self.num_inputs, (num_inputs, self.num_inputs)
        out_TN = self.ops.empty((num_tokens, self.num_outputs), self.dtype)
        num_panels, words, _ = self.words_PWN.shape
        args = _Linear(
            out=out_TN.data_ptr(),
            x=x_TK.data_ptr(),
            weight=self.words_PWN.data_ptr(),
            bias=None if self._bias_N is None else self._bias_N.data_ptr(),
            x_stride=x_TK.stride(0),
            out_stride=self.num_outputs,
            num_outputs=self.num_outputs,
            words=words,
            parts=_parts(num_panels, torch.get_num_threads()),
        )
        self.ops.run(self._operation, args, num_tokens, keep=self._keep)
        return out_TN


class NativeTiedEmbedding(TiedEmbedding):
    """One matrix [V, E] for both ends of a model, held once, in panels."""

    def __init__(self, linear: NativeLinear) -> None:
        self._linear = linear
        is_bf16 = linear.dtype == torch.bfloat16
        self._operation = linear.ops.address("embed_bf16" if is_bf16 else "embed_f32")

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        assert ids_T.dtype == torch.int64, ids_T.dtype
        linear = self._linear
        out_TE = linear.ops.empty((len(ids_T), linear.num_inputs), linear.dtype)
        args = _Embed(
            out=out_TE.data_ptr(),
            ids=ids_T.data_ptr(),
            weight=linear.words_PWN.data_ptr(),
            words=linear.words_PWN.shape[1],
            columns=linear.num_inputs,
        )
        serial = len(ids_T) < 16
        linear.ops.run(self._operation, args, len(ids_T), serial=serial, keep=(linear.words_PWN,))
        return out_TE

    def head(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self._linear(x_TE)


def pack(ops: Ops, weight_NK: torch.Tensor, keeper: Keeper = PRIVATE) -> torch.Tensor:
    """int32 words [panels, K / pair, 64]; outputs beyond the last are zeros."""
    rows, columns = weight_NK.shape
    words = columns * weight_NK.element_size() // 4
    num_panels = -(-rows // _PANEL)

    def fill(out_PWN: torch.Tensor) -> None:
        words_NW = weight_NK.detach().contiguous().view(torch.int32)
        args = _Pack(out=out_PWN.data_ptr(), weight=words_NW.data_ptr(), rows=rows, words=words)
        ops.run(ops.address("pack"), args, num_panels)

    return keeper.keep((num_panels, words, _PANEL), torch.int32, fill)


def _parts(num_panels: int, num_threads: int) -> int:
    """Into how many pieces to cut a panel, so that no thread of a large machine is idle."""
    parts = 1
    while parts < 4 and num_panels * parts < 2 * num_threads:
        parts *= 2
    return parts
