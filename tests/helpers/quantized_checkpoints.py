"""Checkpoints in quantized formats, from a plain one, with what their weights mean in float32.

    formats["awq"].write(plain, folder)   # the quantized checkpoint
    formats["awq"].write(plain, folder, dequantized=True)   # the same values as plain float32

compressed-tensors' files are written by its own package. AWQ's and GPTQ's packings are written out
here number by number, with numpy, after AutoAWQ's WQLinear_GEMM.from_linear and AutoGPTQ's
QuantLinear.pack: nothing is shared with the code that reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

#: Stored tensors by suffix, and the weight they stand for.
Written = tuple[dict[str, torch.Tensor], torch.Tensor]
Write = Callable[[torch.Tensor], Written]


@dataclass
class FormatWriter:
    """`config` is config.json's quantization_config; `plain` are modules that stay as they are."""

    config: dict[str, Any]
    quantize: Write
    plain: tuple[str, ...] = ("lm_head", "embed_tokens", "norm")
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, source: Path, folder: Path, *, dequantized: bool = False) -> Path:
        shutil.copytree(source, folder)
        tensors = safetensors.torch.load_file(source / "model.safetensors")
        out: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if module == name or tensor.dim() != 2 or any(p in module for p in self.plain):
                out[name] = tensor
                continue
            stored, meant = self.quantize(tensor)
            if dequantized:
                out[name] = meant
            else:
                out |= {f"{module}.{suffix}": part.contiguous() for suffix, part in stored.items()}
        safetensors.torch.save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
        if not dequantized:
            config = json.loads((folder / "config.json").read_text())
            if self.config:
                config["quantization_config"] = self.config
            (folder / "config.json").write_text(json.dumps(config))
            for name, content in self.files.items():
                (folder / name).write_text(json.dumps(content))
        return folder


# --- AWQ and GPTQ ----------------------------------------------------------------------------


def _grid(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(codes [N, K], scales [N, G] as float16 holds them, zeros [N, G], values [N, K]), the groups
    made of the columns in `order`."""
    w = weight.double().numpy()
    rows, columns = w.shape
    order = np.arange(columns) if order is None else order
    codes = np.zeros((rows, columns), dtype=np.int64)
    scales = np.zeros((rows, columns // group))
    zeros = np.zeros((rows, columns // group), dtype=np.int64)
    values = np.zeros_like(w)
    top = 2**bits - 1
    for g in range(columns // group):
        here = order[g * group : (g + 1) * group]
        part = w[:, here]
        if symmetric:
            scale = np.abs(part).max(1) * 2 / top
            zero = np.full(rows, (top + 1) // 2)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / top
            zero = np.rint(-low / scale).astype(np.int64)
        scale = scale.astype(np.float16).astype(np.float64)
        code = np.clip(np.rint(part / scale[:, None]) + zero[:, None], 0, top).astype(np.int64)
        codes[:, here] = code
        scales[:, g], zeros[:, g] = scale, zero
        values[:, here] = (code - zero[:, None]) * scale[:, None]
    return codes, scales, zeros, values


def _int32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32))


def awq(group: int) -> Write:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(table: np.ndarray) -> torch.Tensor:  # [A, N] -> [A, N / 8]
        words = np.zeros((table.shape[0], table.shape[1] // 8), dtype=np.int64)
        for word in range(words.shape[1]):
            for i, column in enumerate(order):
                words[:, word] |= table[:, word * 8 + column] << (4 * i)
        return _int32(words)

    def write(weight: torch.Tensor) -> Written:
        size = weight.shape[1] if group == -1 else group
        codes, scales, zeros, values = _grid(weight, 4, size, symmetric=False)
        stored = {
            "qweight": pack(codes.T),
            "qzeros": pack(zeros.T),
            "scales": torch.from_numpy(scales.T.astype(np.float16)),
        }
        return stored, torch.from_numpy(values).float()

    return write


def gptq(
    bits: int, group: int, *, symmetric: bool, version: int = 1, desc_act: bool = False
) -> Write:
    per_word = 32 // bits

    def write(weight: torch.Tensor) -> Written:
        rows, columns = weight.shape
        size = columns if group == -1 else group
        order = np.random.default_rng(columns).permutation(columns) if desc_act else None
        codes, scales, zeros, values = _grid(weight, bits, size, symmetric, order)
        qweight = np.zeros((columns // per_word, rows), dtype=np.int64)
        for k in range(columns):
            qweight[k // per_word] |= codes[:, k] << (bits * (k % per_word))
        stored_zeros = (zeros.T - (1 if version == 1 else 0)) & (2**bits - 1)
        qzeros = np.zeros((columns // size, rows // per_word), dtype=np.int64)
        for n in range(rows):
            qzeros[:, n // per_word] |= stored_zeros[:, n] << (bits * (n % per_word))
        group_of = np.arange(columns) // size
        g_idx = np.zeros(columns, dtype=np.int32)
        g_idx[np.arange(columns) if order is None else order] = group_of
        stored = {
            "qweight": _int32(qweight),
            "qzeros": _int32(qzeros),
            "scales": torch.from_numpy(scales.T.astype(np.float16)),
            "g_idx": torch.from_numpy(g_idx),
        }
        return stored, torch.from_numpy(values).float()

    return write


# --- compressed-tensors ----------------------------------------------------------------------


def compressed(stored_as: str, *, by_token: bool = False, **weights: Any) -> FormatWriter:
    """As the package of that name does it, with min-max scales."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(stored_as)

    def quantize(weight: torch.Tensor) -> Written:
        low, high = _ranges(weight, args)
        scale, zero = calculate_qparams(low, high, args)
        module = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = compressor.compress(module, scheme)
        return stored, compressor.decompress(stored, scheme)["weight"].float()

    inputs = {"num_bits": 8, "type": args.type, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": json.loads(args.model_dump_json()),
        "input_activations": inputs if by_token else None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return FormatWriter(config, quantize)


def _ranges(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    if args.strategy == "tensor":
        return weight.amin().view(1), weight.amax().view(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "group":
        groups = weight.unflatten(1, (-1, args.group_size))
        return groups.amin(-1), groups.amax(-1)
    blocks = _blocks(weight, *args.block_structure)
    return blocks.amin(-1), blocks.amax(-1)


def _blocks(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[row blocks, column blocks, values of a block], filled up with zeros."""
    padded = torch.nn.functional.pad(
        weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
    )
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return blocks.transpose(1, 2).flatten(2)


# --- fp8 -------------------------------------------------------------------------------------


def fp8(block: int | None) -> Write:
    def write(weight: torch.Tensor) -> Written:
        if block is None:
            scale = (weight.abs().amax() / 448).reshape(())
            spread = scale.expand_as(weight)
        else:
            scale = _blocks(weight, block, block).abs().amax(-1) / 448
            spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
            spread = spread[: weight.shape[0], : weight.shape[1]]
        values = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        name = "weight_scale" if block is None else "weight_scale_inv"
        return {"weight": values, name: scale}, values.float() * spread

    return write


# --- all of them -----------------------------------------------------------------------------


def _awq(group: int) -> FormatWriter:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
              "zero_point": True, "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    return FormatWriter(config, awq(group))


def _gptq(bits: int, group: int, *, symmetric: bool, version: int = 1, desc_act: bool = False,
          ) -> FormatWriter:  # fmt: skip
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
              "desc_act": desc_act,
              "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}  # fmt: skip
    write = gptq(bits, group, symmetric=symmetric, version=version, desc_act=desc_act)
    return FormatWriter(config, write)


def _fp8(block: int | None) -> FormatWriter:
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if block is not None:
        config["weight_block_size"] = [block, block]
    return FormatWriter(config, fp8(block))


WRITERS: dict[str, FormatWriter] = {
    "awq-32": _awq(32),
    "awq-row": _awq(-1),
    "gptq-4-sym": _gptq(4, 32, symmetric=True),
    "gptq-4-asym": _gptq(4, 32, symmetric=False),
    "gptq-4-asym-v2": _gptq(4, 32, symmetric=False, version=2),
    "gptq-4-act-order": _gptq(4, 32, symmetric=True, desc_act=True),
    "gptq-8-row": _gptq(8, -1, symmetric=True),
    "gptq-8-asym-act-order": _gptq(8, 16, symmetric=False, desc_act=True),
    "ct-int8-channel": compressed("int-quantized", num_bits=8, strategy="channel", by_token=True),
    "ct-int8-asym": compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
    "ct-int8-tensor": compressed("int-quantized", num_bits=8, strategy="tensor"),
    "ct-naive-4": compressed("naive-quantized", num_bits=4, strategy="group", group_size=32),
    "ct-packed-4": compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "ct-packed-4-asym": compressed(
        "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
    "ct-packed-4-channel": compressed("pack-quantized", num_bits=4, strategy="channel"),
    "ct-packed-8": compressed("pack-quantized", num_bits=8, strategy="group", group_size=32),
    "ct-float-tensor": compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "ct-float-channel": compressed(
        "float-quantized", num_bits=8, type="float", strategy="channel", by_token=True
    ),
    "ct-float-block": compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[20, 32]
    ),
    "fp8-blocks": _fp8(20),
    "fp8-tensor": _fp8(None),
}
