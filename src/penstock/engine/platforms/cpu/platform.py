"""The CPU as a platform: mapped KV memory, re-ordered weights, kernels made for this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from penstock.engine.attention import select
from penstock.engine.attention.base import AttentionBackend, AttentionShape
from penstock.engine.attention.cpu_native import NativeCpuAttention
from penstock.engine.memory.base import KvMemory
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.platforms.base import (
    CannotCapture,
    Forward,
    Linear,
    Platform,
    QkNorms,
    TiedEmbedding,
)
from penstock.engine.platforms.cpu import graph, kernels, linear, onednn_int8, quantized
from penstock.engine.platforms.cpu.ops import Ops
from penstock.engine.platforms.cpu.small_ops import SmallOps
from penstock.engine.quantization.weight import QuantizedWeight
from penstock.protocol.kv import KvLayout


class CpuPlatform(Platform):
    """The native kernels are compiled (or found in the cache) when the platform is made."""

    name = "cpu"
    backends = select.BACKENDS

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        library = kernels.load()
        #: None where the kernels cannot be compiled.
        self.ops = Ops(library) if library is not None else None
        self._small_ops = SmallOps(self.ops) if self.ops is not None else None

    @property
    def packing(self) -> str | None:
        return None if self.ops is None else Path(self.ops.library._name).name

    def make_linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> Linear:
        return linear.make_linear(self.ops, weight_NK, bias_N, self.keeper)

    def make_tied_embedding(self, weight_VE: torch.Tensor) -> TiedEmbedding:
        return linear.make_tied_embedding(self.ops, weight_VE, self.keeper)

    def make_quantized_linear(
        self, weight: QuantizedWeight, bias_N: torch.Tensor | None, dtype: torch.dtype
    ) -> Linear:
        if self.ops is not None and quantized.cannot_pack(weight, dtype) is None:
            return quantized.FewBitsLinear(self.ops, weight, bias_N, self.keeper)
        if onednn_int8.cannot_run(weight) is None:
            self.keeper.leaves_out("oneDNN packs them in a form of its own")
            return onednn_int8.OneDnnInt8Linear(weight, bias_N)
        return super().make_quantized_linear(weight, bias_N, dtype)

    def make_quantized_embedding(
        self, weight: QuantizedWeight, dtype: torch.dtype
    ) -> TiedEmbedding:
        if self.ops is not None and quantized.cannot_pack(weight, dtype) is None:
            return quantized.FewBitsEmbedding(self.ops, weight, dtype, self.keeper)
        return super().make_quantized_embedding(weight, dtype)

    def quantized_kernel(
        self, weight: QuantizedWeight, dtype: torch.dtype, *, embedding: bool = False
    ) -> str | None:
        if self.ops is not None and quantized.cannot_pack(weight, dtype) is None:
            return quantized.kind(self.ops, weight.bits)
        if not embedding and onednn_int8.cannot_run(weight) is None:
            return "onednn"
        return None

    def embedding(self, ids_T: torch.Tensor, matrix_VE: torch.Tensor) -> torch.Tensor:
        if self._small_ops is not None:
            out_TE = self._small_ops.embedding(ids_T, matrix_VE)
            if out_TE is not None:
                return out_TE
        return super().embedding(ids_T, matrix_VE)

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        if self._small_ops is not None:
            out_TH = self._small_ops.rms_norm(x_TH, weight_H, eps)
            if out_TH is not None:
                return out_TH
        return super().rms_norm(x_TH, weight_H, eps)

    def add_rms_norm_(
        self,
        hidden_TE: torch.Tensor,
        delta_TE: torch.Tensor,
        weight_E: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        if self._small_ops is not None:
            out_TE = self._small_ops.add_rms_norm_(hidden_TE, delta_TE, weight_E, eps)
            if out_TE is not None:
                return out_TE
        return super().add_rms_norm_(hidden_TE, delta_TE, weight_E, eps)

    def silu_mul(self, gate_up_T2I: torch.Tensor) -> torch.Tensor:
        if self._small_ops is not None:
            out_TI = self._small_ops.silu_mul(gate_up_T2I)
            if out_TI is not None:
                return out_TI
        return super().silu_mul(gate_up_T2I)

    def rope_(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        norms: QkNorms | None = None,
    ) -> None:
        if self._small_ops is None or not self._small_ops.rope_(
            q_THD, k_TGD, cos_TD, sin_TD, norms
        ):
            super().rope_(q_THD, k_TGD, cos_TD, sin_TD, norms)

    def cos_sin(
        self, positions_T: torch.Tensor, inv_freq_F: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._small_ops is None:
            return super().cos_sin(positions_T, inv_freq_F, scale)
        return self._small_ops.cos_sin(positions_T, inv_freq_F, scale)

    def kv_memory(
        self, layout: KvLayout, num_blocks: int, num_slots: int, max_blocks_per_slot: int
    ) -> KvMemory:
        return XTensorMemory(layout, num_blocks, num_slots, max_blocks_per_slot)

    def attention(
        self, shape: AttentionShape, memory: KvMemory, dtype: torch.dtype, name: str = "auto"
    ) -> AttentionBackend:
        chosen = select.choose(shape, dtype, self.device, name, self.backends)
        if chosen is NativeCpuAttention:
            return NativeCpuAttention(shape, memory, self.ops)
        return chosen(shape, memory)

    def capture(self, forward: Forward, max_tokens: int) -> Forward:
        if self.ops is None:
            raise CannotCapture("there are no native kernels")
        return graph.capture(self.ops, forward, max_tokens)

    def cut(self, piece: Callable[[int], None]) -> None:
        recorder = None if self.ops is None else self.ops.recorder
        assert recorder is not None, "nothing is being captured"
        recorder.cut(piece)

    def kernels(self) -> dict[str, str]:
        small = "torch" if self._small_ops is None else "native"
        return {
            "linear": linear.kind(self.ops, self.default_dtype),
            "linear_int8": quantized.kind(self.ops, 8),
            "linear_int4": quantized.kind(self.ops, 4),
            **dict.fromkeys(("rms_norm", "silu_mul", "rope"), small),
        }
