"""Linears by oneDNN: weights re-ordered once, and an embedding that shares such a weight.

oneDNN wants a weight in panels of output features, so that a product walks memory in order. torch's
`linear` re-orders (or strides) at every call; doing it once is up to twice as fast at decode and
never slower beyond tiny sizes (docs/design/kernels.md). The row-major original is dropped
then; a tied embedding, which must still find its rows, reads them out of the panels.
"""

from __future__ import annotations

import ctypes
import logging

import torch

from penstock.engine.platforms.base import TiedEmbedding

logger = logging.getLogger(__name__)

_PANEL_ROWS = (64, 48, 32, 16)


def cannot_pack(dtype: torch.dtype) -> str | None:
    """None where oneDNN takes re-ordered weights of this dtype on this machine, else why not."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN needs AVX-512 for bfloat16"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"{dtype} weights are not re-ordered"
    return None


class PackedLinear:
    """x_TK -> y_TN with the weight held in oneDNN's layout alone."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), None)
        self._bias_N = bias_N
        self._call = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        out_TN: torch.Tensor = self._call(x_TK, self.packed, self._bias_N, "none", [], "")
        return out_TN


class PackedTiedEmbedding(TiedEmbedding):
    """One matrix [V, E] for both ends of a model, held once, in oneDNN's layout."""

    def __init__(self, linear: PackedLinear, panels: Panels) -> None:
        self._linear = linear
        self._panels = panels

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        return self._panels.rows(ids_T)

    def head(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self._linear(x_TE)


def make_tied_embedding(weight_VE: torch.Tensor) -> TiedEmbedding:
    """Re-ordered if its rows can be read back bit by bit, else the plain matrix. Ask `cannot_pack`
    first."""
    linear = PackedLinear(weight_VE)
    panels = Panels.find(linear.packed, weight_VE)
    if panels is None:
        logger.info("oneDNN's weight layout is not known here: the tied head stays row-major")
        return TiedEmbedding(weight_VE)
    return PackedTiedEmbedding(linear, panels)


class Panels:
    """Reads single rows out of a re-ordered weight.

    The layout is [N / panel][K / pair][panel][pair]: panels of output features, within them one
    32-bit word (two bfloat16 inputs, or one float32) of each feature after the other. It is
    oneDNN's business and may change, so `find` believes only what it has verified on all rows.
    """

    def __init__(self, packed: torch.Tensor, dtype: torch.dtype, columns: int, panel: int) -> None:
        self._packed = packed  # keeps the memory alive
        self._dtype = dtype
        self._columns = columns
        self._panel = panel
        num_bytes = torch.ops.mkldnn._nbytes(packed)
        address = torch.ops.mkldnn.data_ptr(packed)
        words = torch.frombuffer(
            (ctypes.c_char * num_bytes).from_address(address), dtype=torch.int32
        )
        num_panels = -(-packed.shape[0] // panel)
        self._words = words.view(num_panels, -1, panel)

    @classmethod
    def find(cls, packed: torch.Tensor, weight_NK: torch.Tensor) -> Panels | None:
        for panel in _PANEL_ROWS:
            num_panels = -(-weight_NK.shape[0] // panel)
            words = torch.ops.mkldnn._nbytes(packed) // 4
            row_words = -(-weight_NK.shape[1] * weight_NK.element_size() // 4)
            if words % (num_panels * panel) or words // (num_panels * panel) < row_words:
                continue
            found = cls(packed, weight_NK.dtype, weight_NK.shape[1], panel)
            if found._same(weight_NK):
                return found
        return None

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        words_TW = self._words[ids_T // self._panel, :, ids_T % self._panel]
        return words_TW.view(self._dtype)[:, : self._columns]

    def _same(self, weight_NK: torch.Tensor, rows_at_once: int = 4096) -> bool:
        bits = torch.int16 if self._dtype.itemsize == 2 else torch.int32
        return all(
            torch.equal(
                self.rows(torch.arange(start, start + len(part))).view(bits), part.view(bits)
            )
            for start, part in zip(
                range(0, len(weight_NK), rows_at_once), weight_NK.split(rows_at_once), strict=True
            )
        )
