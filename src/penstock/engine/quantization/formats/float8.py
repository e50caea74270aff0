"""Weights in FP8 (e4m3) with float scales, dequantized on the way: no kernel here takes them.

weight[n, k] = scale[n // rows, k // columns] * value[n, k], blocks at the edges may be smaller; a
scale for each tensor or output channel is a block as large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.engine.quantization.formats.base import (
    FLOATS,
    FP8,
    Find,
    Floats,
    Raw,
    Stored,
)
from penstock.engine.quantization.weight import row_slices

#: e8m0: powers of two, as DeepSeek-V3.1 has them.
_SCALES = FLOATS | {"F8_E8M0"}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Weights to a scale; None: all of them."""

    rows: int | None
    columns: int | None

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))


TENSOR = Blocks(None, None)
CHANNEL = Blocks(1, None)


def layout(
    module: str, rows: int, columns: int, find: Find, blocks: Blocks, scale_name: str
) -> Floats:
    shape = blocks.scale_shape(rows, columns)
    found = find(f"{module}.{scale_name}")
    # One scale for all is stored as [], [1] or [1, 1]; one for each channel as [N] or [N, 1].
    spellings = {(1, 1): ((), (1,)), (rows, 1): ((rows,),)}.get(shape, ())
    if found is not None and found.shape in spellings:
        stored = Stored(found.shape, _SCALES)
    else:
        stored = Stored(shape, _SCALES)
    block_rows, block_columns = blocks.rows or rows, blocks.columns or columns

    def fill(raw: Raw, out_NK: torch.Tensor) -> None:
        scale = raw[scale_name].float().view(shape)
        for part in row_slices(rows, columns):
            row_blocks = torch.arange(part.start, part.stop) // block_rows
            scale_part = scale[row_blocks].repeat_interleave(block_columns, dim=1)[:, :columns]
            out_NK[part] = raw["weight"][part].float() * scale_part

    return Floats({"weight": Stored((rows, columns), FP8), scale_name: stored}, fill)
