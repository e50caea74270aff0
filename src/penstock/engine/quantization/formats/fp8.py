"""quant_method "fp8": DeepSeek's blocks of 128 x 128 (weight_scale_inv) or a scale for each tensor
(weight_scale, AutoFP8). The two names mean the same: what the stored value is multiplied by."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.models.fields import Fields
from penstock.engine.quantization.formats import float8
from penstock.engine.quantization.formats.base import FP8, Find, Format, Layout

_SCALES = ("weight_scale_inv", "weight_scale")
#: Of static activations and of an FP8 KV cache.
_IGNORED = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".kv_scale")


@dataclass(frozen=True, slots=True)
class Fp8(Format):
    blocks: float8.Blocks
    static_activations: bool
    method = "fp8"

    def describe(self) -> str:
        if self.blocks == float8.TENSOR:
            return "FP8, a scale for each tensor"
        return f"FP8, a scale for each {self.blocks.rows} x {self.blocks.columns}"

    def ignores(self, name: str) -> bool:
        return name.endswith(_IGNORED)

    def remarks(self) -> tuple[str, ...]:
        if not self.static_activations:
            return ()
        return ("activations are not quantized, their stored scales are not used",)

    def layout(self, module: str, rows: int, columns: int, find: Find) -> Layout | None:
        weight = find(f"{module}.weight")
        scales = [name for name in _SCALES if find(f"{module}.{name}") is not None]
        if not scales and (weight is None or not weight.dtypes & FP8):
            return None
        name = scales[0] if scales else _SCALES[0]
        return float8.layout(module, rows, columns, find, self.blocks, name)


def parse(fields: Fields) -> Format:
    kind = fields.text("fmt", "e4m3").lower()
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise fields.unsupported("fmt", kind, "e4m3")
    scheme = fields.text("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise fields.unsupported("activation_scheme", scheme, "dynamic, static")
    size = fields.integers("weight_block_size", 2)
    blocks = float8.TENSOR if size is None else float8.Blocks(size[0], size[1])
    return Fp8(blocks, scheme == "static")
