"""What all quantized checkpoint formats are: for each module, the tensors that stand in the files
in place of `.weight`, and how they are read.

A module is a linear or an embedding by its name in the checkpoint, such as
"model.layers.0.mlp.up_proj".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from penstock.engine.quantization.weight import QuantizedWeight
from penstock.protocol.errors import CheckpointError

FLOATS = frozenset({"F16", "BF16", "F32"})
INT32 = frozenset({"I32"})
FP8 = frozenset({"F8_E4M3"})


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file must hold it; dtypes by their names in safetensors."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]


#: A module's tensors by what follows the module's name: "qweight", "scales".
Raw = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class FewBits:
    """A module whose weight stays in few bits. `declared` is on the meta device: what `decode` will
    return, without its data."""

    tensors: Mapping[str, Stored]
    declared: QuantizedWeight
    decode: Callable[[Raw], QuantizedWeight]


@dataclass(frozen=True, slots=True)
class Floats:
    """A module whose weight is dequantized in any case: `fill(raw, out_NK)` writes it."""

    tensors: Mapping[str, Stored]
    fill: Callable[[Raw, torch.Tensor], None]


Layout = FewBits | Floats

#: Name of a tensor -> how the files hold it, or None.
Find = Callable[[str], Stored | None]


class Format:
    """Plain weights: the null object, and the interface."""

    #: As config.json and `--quantization` call it.
    method = "none"

    def describe(self) -> str:
        """For people: "4 bits in groups of 128, asymmetric"."""
        return "not quantized"

    def layout(self, module: str, rows: int, columns: int, find: Find) -> Layout | None:
        """How a module's weight [rows, columns] is stored; None: as a plain `.weight`.

        Raises `CheckpointError` or `UnsupportedModel`, naming the module."""
        return None

    def ignores(self, name: str) -> bool:
        """Whether a tensor that no module asks for may be in the files."""
        return False

    def remarks(self) -> tuple[str, ...]:
        """What the checkpoint asks for and this engine does in another way; for the log."""
        return ()


PLAIN = Format()


def holds_any(find: Find, module: str, suffixes: tuple[str, ...]) -> bool:
    return any(find(f"{module}.{suffix}") is not None for suffix in suffixes)


def require_multiple(module: str, what: str, count: int, divisor: int) -> None:
    if count % divisor:
        raise CheckpointError(
            f"{module} cannot be stored like that: {count} {what} are no multiple of {divisor}"
        )


def require(module: str, holds: bool, fault: str) -> None:
    """Of data that was read, rather than of its shape."""
    if not holds:
        raise CheckpointError(f"{module}: {fault}: is the checkpoint damaged?")
