"""Which attention backend runs, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.engine.attention.base import AttentionBackend, AttentionShape
from penstock.engine.attention.cpu_native import NativeCpuAttention
from penstock.engine.attention.reference import ReferenceAttention
from penstock.protocol.errors import ConfigError

#: Fastest first; the last one takes everything.
BACKENDS: Sequence[type[AttentionBackend]] = (NativeCpuAttention, ReferenceAttention)


def refusals(
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    backends: Sequence[type[AttentionBackend]] = BACKENDS,
) -> dict[str, str | None]:
    """What each backend says to this shape, fastest first: None for yes, else its reason."""
    return {each.name: each.unsupported(shape, dtype, device) for each in backends}


def choose(
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    name: str = "auto",
    backends: Sequence[type[AttentionBackend]] = BACKENDS,
) -> type[AttentionBackend]:
    """The backend called `name`, or with "auto" the fastest that can. Raises `ConfigError`."""
    answers = refusals(shape, dtype, device, backends)
    if name == "auto":
        return next(each for each in backends if answers[each.name] is None)
    if name not in answers:
        raise ConfigError(f"no attention backend {name!r}: choose from auto, {', '.join(answers)}")
    if (reason := answers[name]) is not None:
        raise ConfigError(f"the attention backend {name} cannot run here: {reason}")
    return next(each for each in backends if each.name == name)
