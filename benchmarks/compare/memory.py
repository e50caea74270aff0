"""What processes take of memory, from what workers say of themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_TORCH_ALONE = "import torch; print(next(l for l in open('/proc/self/status') if 'VmHWM' in l))"


def most_of(said: Mapping[str, Any], before: Mapping[str, int]) -> dict[str, int]:
    """The most of each kind of memory so far, in bytes, and of `private_bytes`: without what is
    shared, which our KV pool is. The peak includes shared memory; less what is shared by then it is
    one lower bound for the rest, and what is resident another."""
    now = {k: v for k, v in said.items() if k.endswith("_bytes") and k != "weight_bytes"}
    now["private_bytes"] = max(
        now["anon_bytes"] + now["file_bytes"], now["peak_bytes"] - now["shared_bytes"]
    )
    return {key: max(value, before.get(key, 0)) for key, value in now.items()}


def torch_alone_bytes() -> int:
    """The peak of a process of this Python that has only imported torch."""
    command = [sys.executable, "-c", _TORCH_ALONE]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(said.split()[1]) * 1024
