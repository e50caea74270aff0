"""What a model needs of a device. The defaults are plain torch and run anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from penstock.engine.attention import select
from penstock.engine.attention.base import AttentionBackend, AttentionShape
from penstock.engine.attention.reference import ReferenceAttention
from penstock.engine.memory.base import KvMemory
from penstock.engine.memory.keeper import PRIVATE
from penstock.engine.memory.paged import PagedMemory
from penstock.engine.memory.sizing import available_memory_bytes
from penstock.engine.quantization.weight import QuantizedWeight
from penstock.protocol.kv import KvLayout

#: x_TK -> y_TN, for a weight [N, K].
Linear = Callable[[torch.Tensor], torch.Tensor]
#: (input_ids_T, positions_T) -> final hidden states [T, E].
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class CannotCapture(Exception):
    """Why a forward pass has no captured form; the message is for the log and for `doctor`."""


class TiedEmbedding:
    """One matrix [V, E] that is both token embedding and output head, held once."""

    def __init__(self, weight_VE: torch.Tensor) -> None:
        self._weight_VE = weight_VE

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows ids_T of the matrix, [T, E]."""
        return functional.embedding(ids_T, self._weight_VE)

    def head(self, x_TE: torch.Tensor) -> torch.Tensor:
        """x @ matrix.T, [T, V]."""
        return functional.linear(x_TE, self._weight_VE)


@dataclass(frozen=True, slots=True)
class QkNorms:
    """Qwen3's norms of each query and key head."""

    query: torch.Tensor  # [D]
    key: torch.Tensor
    eps: float


class Platform:
    """One device kind: its memory, its kernels, and the choice among them."""

    name = "torch"
    default_dtype = torch.bfloat16
    #: Attention that can work on this platform's memory, fastest first.
    backends: ClassVar[Sequence[type[AttentionBackend]]] = (ReferenceAttention,)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        #: Where the weights of the next model go.
        self.keeper = PRIVATE

    @property
    def packing(self) -> str | None:
        """How weights are packed here: equal where the same weights give the same bytes, so that
        processes can share them. None: they cannot."""
        return None

    def make_linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> Linear:
        """The fastest x @ weight.T + bias for this weight.

        The weight may be re-ordered; the caller drops its reference.
        """
        return lambda x_TK: functional.linear(x_TK, weight_NK, bias_N)

    def make_tied_embedding(self, weight_VE: torch.Tensor) -> TiedEmbedding:
        """Embedding and head over one copy of the weight. The caller drops its reference."""
        return TiedEmbedding(weight_VE)

    def make_quantized_linear(
        self, weight: QuantizedWeight, bias_N: torch.Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """x @ weight.T + bias over activations of `dtype`, the weight kept in its few bits where
        there is a kernel for them; without one it is dequantized once."""
        return self.make_linear(weight.dequantize(dtype).to(self.device), bias_N)

    def make_quantized_embedding(
        self, weight: QuantizedWeight, dtype: torch.dtype
    ) -> TiedEmbedding:
        """The same for a matrix that is both embedding and head."""
        return self.make_tied_embedding(weight.dequantize(dtype).to(self.device))

    def quantized_kernel(
        self, weight: QuantizedWeight, dtype: torch.dtype, *, embedding: bool = False
    ) -> str | None:
        """What will run such a weight (a linear's or an embedding's) in its few bits; None: it will
        be dequantized. Only looks at shapes: the weight may be on the meta device."""
        return None

    def embedding(self, ids_T: torch.Tensor, matrix_VE: torch.Tensor) -> torch.Tensor:
        """Rows ids_T (int64) of a plain matrix, [T, E]."""
        return functional.embedding(ids_T, matrix_VE)

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, in float32, with transformers' order of roundings."""
        x = x_TH.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return weight_H * x.to(x_TH.dtype)

    def add_rms_norm_(
        self,
        hidden_TE: torch.Tensor,
        delta_TE: torch.Tensor,
        weight_E: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """Adds delta to hidden in place; returns the norm of the sum."""
        hidden_TE += delta_TE
        return self.rms_norm(hidden_TE, weight_E, eps)

    def silu_mul(self, gate_up_T2I: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [gate | up], side by side in the last dimension. Returns [T, I]."""
        gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
        return functional.silu(gate_TI) * up_TI

    def rope_(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        norms: QkNorms | None = None,
    ) -> None:
        """Rotate q and k in place, halves against halves ("rotate_half"), in float32; where there
        are `norms`, each head is normed first.

        cos and sin are the tokens' rows [T, D], whose two halves are equal.
        """
        if norms is not None:
            q_THD.copy_(self.rms_norm(q_THD, norms.query, norms.eps))
            k_TGD.copy_(self.rms_norm(k_TGD, norms.key, norms.eps))
        for x_THD in (q_THD, k_TGD):
            self.rotate_(x_THD, cos_TD, sin_TD)

    @staticmethod
    def rotate_(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> None:
        """The rotation of one of the two, in torch."""
        x = x_THD.float()
        left, right = x.chunk(2, dim=-1)
        rotated = torch.cat((-right, left), dim=-1)
        x_THD.copy_(x * cos_TD.float()[:, None] + rotated * sin_TD.float()[:, None])

    def cos_sin(
        self, positions_T: torch.Tensor, inv_freq_F: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `rope_` wants for these positions (int64): scaled cosines and sines, float32
        [T, 2 F], their halves equal."""
        angles_TF = positions_T.float()[:, None] * inv_freq_F
        angles_TD = torch.cat((angles_TF, angles_TF), dim=-1)
        return angles_TD.cos() * scale, angles_TD.sin() * scale

    def kv_memory(
        self, layout: KvLayout, num_blocks: int, num_slots: int, max_blocks_per_slot: int
    ) -> KvMemory:
        return PagedMemory(layout, num_blocks, num_slots, max_blocks_per_slot, device=self.device)

    def attention(
        self, shape: AttentionShape, memory: KvMemory, dtype: torch.dtype, name: str = "auto"
    ) -> AttentionBackend:
        """The backend called `name`, or the fastest that can. Raises `ConfigError`."""
        return select.choose(shape, dtype, self.device, name, self.backends)(shape, memory)

    def capture(self, forward: Forward, max_tokens: int) -> Forward:
        """The same computation in a form that starts faster, for up to `max_tokens` tokens. Its
        result is overwritten by the next call. Raises `CannotCapture`."""
        raise CannotCapture(f"the platform {self.name} has no captured form")

    def cut(self, piece: Callable[[int], None]) -> None:
        """While capturing: call `piece(num_tokens)` at this place whenever the form is run."""
        raise CannotCapture(f"the platform {self.name} has no captured form")

    def available_bytes(self) -> int:
        """What the KV pool may be sized against."""
        return available_memory_bytes()

    def kernels(self) -> dict[str, str]:
        """Operation -> what runs it, for `penstock doctor` and `/metrics`."""
        return dict.fromkeys(("linear", "rms_norm", "silu_mul", "rope"), "torch")
