"""What a result was measured on: no names of hosts, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
         "amx_tile", "amx_bf16", "amx_int8")  # fmt: skip
_ROOT = Path(__file__).parents[2]


def describe() -> dict[str, Any]:
    import torch

    cpu = _fields(Path("/proc/cpuinfo"))
    flags = set(cpu.get("flags", "").split())
    return {
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src", "benchmarks")),
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_family": cpu.get("cpu family", ""),
        "cpu_model": cpu.get("model", ""),
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes("MemTotal") / 2**30, 1),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def memory_bytes(name: str) -> int:
    """A line of /proc/meminfo: MemTotal, MemAvailable."""
    return 1024 * int(_fields(Path("/proc/meminfo"))[name].split()[0])


def _fields(file: Path) -> dict[str, str]:
    """The first value of each name: /proc/cpuinfo repeats itself for each CPU."""
    found: dict[str, str] = {}
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
