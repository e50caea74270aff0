"""CUDA with torch's own operations. The interfaces are the CPU's; the kernels come later."""

from __future__ import annotations

import torch

from penstock.engine.platforms.base import Platform
from penstock.protocol.errors import ConfigError


class CudaPlatform(Platform):
    """Raises `ConfigError` when torch finds no such device."""

    name = "cuda"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        if not torch.cuda.is_available():
            raise ConfigError("torch finds no CUDA device here: use --device cpu")
        super().__init__(device)

    def available_bytes(self) -> int:
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        return free_bytes
