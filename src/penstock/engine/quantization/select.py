"""How a checkpoint is quantized, and what is to be made of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from penstock.checkpoint import Checkpoint
from penstock.engine.models.fields import Fields
from penstock.engine.quantization.formats import awq, compressed_tensors, fp8, gguf, gptq
from penstock.engine.quantization.formats.base import PLAIN, Format
from penstock.engine.quantization.schemes import INT8, SCHEMES, Scheme
from penstock.protocol.errors import CheckpointError, ConfigError, UnsupportedModel

logger = logging.getLogger(__name__)

_PARSERS: dict[str, Callable[[Fields], Format]] = {
    "awq": awq.parse,
    "gptq": gptq.parse,
    "compressed-tensors": compressed_tensors.parse,
    "fp8": fp8.parse,
    "gguf": gguf.parse,
}
#: What others call the same checkpoints with another kernel.
_ALIASES = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "gptq_marlin_24": "marlin_24",
    "compressed_tensors": "compressed-tensors",
    "finegrained_fp8": "fp8",
}
#: In config.json, the first as everyone writes it now.
SETTINGS_FIELDS = ("quantization_config", "compression_config")
#: Beside it, as AutoGPTQ and AutoAWQ did before.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

#: Where `penstock quantize` says in config.json how the head is to be loaded, which it leaves as
#: floats in the file because other readers know no quantized embeddings.
HEAD_FIELD = "penstock_head_quantization"

METHODS = ("auto", "none", *SCHEMES, *_PARSERS)


@dataclass(frozen=True, slots=True)
class Quantization:
    """`format` is how the files hold the weights. `scheme` is what becomes of all linears, and
    `head` of the output head alone (tied or not); None leaves it as it is stored. Without
    `keep_bits` what is stored in few bits is dequantized."""

    format: Format = PLAIN
    scheme: Scheme | None = None
    head: Scheme | None = None
    keep_bits: bool = True

    @property
    def label(self) -> str:
        """What tells this apart from the checkpoint as it is stored; "" if nothing does."""
        if self.scheme is not None:
            return self.scheme.name
        return "none" if self.format is not PLAIN and not self.keep_bits else ""

    @property
    def name(self) -> str:
        """What the weights are in memory, as --quantization has it."""
        return self.label or self.format.method

    def describe(self) -> str:
        """For people, of the weights in memory."""
        if self.scheme is not None:
            return f"{self.scheme.name}, quantized while loading"
        if self.format is PLAIN:
            return self.format.describe()
        kept = "" if self.keep_bits else ", dequantized while loading"
        if self.head is not None:
            kept += f"; the output head {self.head.name}"
        return f"{self.format.method}: {self.format.describe()}{kept}"


def quantization_of(checkpoint: Checkpoint, wanted: str = "auto") -> Quantization:
    """What `--quantization wanted` makes of a checkpoint.

    Raises `UnsupportedModel` for a format that is not read here, by its name, `CheckpointError`
    for one whose settings make no sense, `ConfigError` for a wish that does not fit.
    """
    wanted = _ALIASES.get(wanted, wanted)
    if wanted not in METHODS:
        raise ConfigError(f"quantization {wanted!r} is none of {', '.join(METHODS)}")
    stored = stored_format(checkpoint)
    if wanted in SCHEMES:
        return Quantization(stored, SCHEMES[wanted], INT8, keep_bits=False)
    if wanted == "none":
        return Quantization(stored, keep_bits=False)
    if wanted not in ("auto", stored.method):
        raise ConfigError(
            f"--quantization {wanted} does not fit {checkpoint.path}, which is "
            f"{'not quantized' if stored is PLAIN else 'quantized by ' + stored.method}: leave the "
            "flag out, or take int8 or int4"
        )
    return Quantization(stored, head=_head(checkpoint))


def stored_format(checkpoint: Checkpoint) -> Format:
    """The format of config.json's quantization_config. Raises as `quantization_of` does."""
    fields, method = _settings(checkpoint)
    if fields is None:
        return PLAIN
    method = _ALIASES.get(method, method)
    if method not in _PARSERS:
        raise UnsupportedModel(
            f"{checkpoint.path} is quantized by {method or 'no quant_method'}, which is not read "
            f"here: take the model unquantized (--quantization int8 or int4 quantizes it while "
            f"loading) or by {', '.join(_PARSERS)}"
        )
    return _PARSERS[method](fields)


def _settings(checkpoint: Checkpoint) -> tuple[Fields | None, str]:
    top = Fields(checkpoint.config)
    for name in SETTINGS_FIELDS:
        found = top.child(name)
        if found is not None:
            # bitsandbytes' own files lack quant_method: transformers looks for its flags.
            implied = "bitsandbytes" if "load_in_4bit" in found or "load_in_8bit" in found else ""
            implied = "compressed-tensors" if "config_groups" in found else implied
            return found, found.text("quant_method", implied).lower()
    for name, method in SETTINGS_FILES.items():
        values = checkpoint.json(name)
        if values:
            return Fields(values, name), Fields(values, name).text("quant_method", method).lower()
    return None, ""


def _head(checkpoint: Checkpoint) -> Scheme | None:
    name = checkpoint.config.get(HEAD_FIELD)
    if name is None:
        return None
    if not isinstance(name, str) or name not in SCHEMES:
        raise CheckpointError(f"config.json: {HEAD_FIELD} is {name!r}, expected one of "
                              f"{', '.join(SCHEMES)}")  # fmt: skip
    return SCHEMES[name]


def log_remarks(stored: Format) -> None:
    for remark in stored.remarks():
        logger.info("%s checkpoint: %s", stored.method, remark)
