"""compressed-tensors, what llm-compressor writes: groups of modules, each with a scheme and a way
to store it.

int-quantized, naive-quantized and float-quantized keep a value in a byte (`weight`, int8 or FP8);
pack-quantized keeps `weight_packed`, int32 along the inputs, with codes moved up by half their
range. Beside it stand `weight_scale`, and `weight_zero_point` where there is one. Format:
https://github.com/vllm-project/compressed-tensors, compressors and quant_args.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.models.fields import Fields
from penstock.engine.quantization.formats import ct_integers, float8
from penstock.engine.quantization.formats.base import Find, Format, Layout
from penstock.engine.quantization.formats.targets import Targets
from penstock.protocol.errors import CheckpointError

_FORMATS = ("int-quantized", "pack-quantized", "naive-quantized", "float-quantized")
_IGNORED = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point",
    ".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that are stored alike. `integers` or `blocks`, the latter for FP8."""

    targets: Targets
    integers: ct_integers.Integers | None
    blocks: float8.Blocks | None

    def describe(self) -> str:
        if self.integers is not None:
            return self.integers.describe()
        if self.blocks == float8.TENSOR:
            return "FP8, a scale for each tensor"
        if self.blocks == float8.CHANNEL:
            return "FP8, a scale for each output channel"
        assert self.blocks is not None
        return f"FP8, a scale for each {self.blocks.rows} x {self.blocks.columns}"


@dataclass(frozen=True, slots=True)
class CompressedTensors(Format):
    groups: tuple[Group, ...]
    ignore: Targets
    notes: tuple[str, ...]
    method = "compressed-tensors"

    def describe(self) -> str:
        return "; ".join(dict.fromkeys(group.describe() for group in self.groups))

    def remarks(self) -> tuple[str, ...]:
        return self.notes

    def ignores(self, name: str) -> bool:
        return name.endswith(_IGNORED)

    def layout(self, module: str, rows: int, columns: int, find: Find) -> Layout | None:
        if self.ignore.match(module):
            return None
        group = max(self.groups, key=lambda group: group.targets.match(module), default=None)
        if group is None or not group.targets.match(module):
            return None
        if group.integers is not None:
            return group.integers.layout(module, rows, columns, find)
        assert group.blocks is not None
        return float8.layout(module, rows, columns, find, group.blocks, "weight_scale")


def parse(fields: Fields) -> Format:
    _refuse_transformed(fields)
    default = fields.get("format")
    found = fields.child("config_groups")
    if found is None or not found.names():
        raise fields.wrong("config_groups", fields.get("config_groups"), "an object of groups")
    status = fields.text("quantization_status", "compressed")
    if status != "compressed":
        raise fields.unsupported("quantization_status", status, "compressed")
    notes: list[str] = []
    groups = tuple(_group(found, name, default, notes) for name in found.names())
    if fields.get("kv_cache_scheme") is not None:
        notes.append("its kv_cache_scheme is not used: --kv-cache-dtype decides")
    ignore = Targets.parse(fields, "ignore")
    return CompressedTensors(groups, ignore, tuple(dict.fromkeys(notes)))


def _group(groups: Fields, name: str, default_format: object, notes: list[str]) -> Group:
    if not isinstance(groups.get(name), dict):
        raise groups.unsupported(name, groups.get(name), "groups that are written out")
    group = groups.child(name)
    assert group is not None
    weights = group.child("weights")
    if weights is None:
        raise group.unsupported("weights", None, "groups that quantize weights")
    stored = group.get("format") or default_format
    if stored is None:
        raise CheckpointError(
            f"{group.where}: format is missing, here and beside config_groups: expected one of "
            f"{', '.join(_FORMATS)}"
        )
    if stored not in _FORMATS:
        raise group.unsupported("format", stored, ", ".join(_FORMATS))
    _note_activations(group, notes)
    targets = Targets.parse(group, "targets")
    kind = weights.text("type", "int").lower()
    if kind == "int":
        integers = ct_integers.parse(weights, packed=stored == "pack-quantized")
        return Group(targets, integers, None)
    bits = weights.integer("num_bits", 8)
    if kind != "float" or bits != 8 or stored == "pack-quantized":
        raise weights.unsupported("type", f"{kind}, {bits} bits, {stored}", "int, or float of 8")
    if not weights.flag("symmetric", True):
        raise weights.unsupported("symmetric", False, "true for float")
    return Group(targets, None, _blocks(weights))


def _blocks(weights: Fields) -> float8.Blocks:
    strategy = weights.text("strategy", "tensor").lower()
    if strategy == "tensor":
        return float8.TENSOR
    if strategy == "channel":
        return float8.CHANNEL
    if strategy == "group":
        return float8.Blocks(1, weights.integer("group_size"))
    if strategy == "block":
        size = weights.integers("block_structure", 2)
        if size is None:
            raise weights.wrong("block_structure", None, "two numbers")
        return float8.Blocks(size[0], size[1])
    raise weights.unsupported("strategy", strategy, "tensor, channel, group, block")


def _note_activations(group: Fields, notes: list[str]) -> None:
    inputs = group.child("input_activations")
    if inputs is None:
        return
    if inputs.text("type", "int").lower() == "float" or inputs.integer("num_bits", 8) != 8:
        notes.append("activations stay in the model's dtype or are quantized as the kernel does it")
    elif inputs.get("dynamic") is not True:
        notes.append("activations are quantized by what they are (dynamic), not by stored scales")


def _refuse_transformed(fields: Fields) -> None:
    """What changes the network itself rather than its weights."""
    transforms = fields.child("transform_config")
    if transforms is not None and transforms.get("config_groups"):
        raise fields.unsupported("transform_config", "rotated weights", "none")
    sparsity = fields.child("sparsity_config")
    if sparsity is not None:
        kind = sparsity.text("format", "dense")
        if kind != "dense":
            raise sparsity.unsupported("format", kind, "dense")
