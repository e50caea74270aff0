"""From the --device flag to a platform."""

from __future__ import annotations

import torch

from penstock.engine.platforms.base import Platform
from penstock.engine.platforms.cpu.platform import CpuPlatform
from penstock.engine.platforms.cuda.platform import CudaPlatform
from penstock.protocol.errors import ConfigError


def platform_for(device: str = "auto") -> Platform:
    """`auto` takes CUDA where torch finds it. Raises `ConfigError` for what cannot run here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return CpuPlatform()
    if device == "cuda" or device.startswith("cuda:"):
        return CudaPlatform(device)
    raise ConfigError(f"unknown device {device!r}: choose auto, cpu or cuda")
