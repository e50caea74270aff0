"""What this machine has: cores, CPU features, memory, a compiler. Read, never guessed."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

#: CPU features that kernels here profit from, as /proc/cpuinfo calls them (x86-64, then arm64).
WANTED_FEATURES = (
    "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8",
    "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    architecture: str
    cores: int
    features: tuple[str, ...]
    memory_total_bytes: int
    memory_available_bytes: int
    #: Transparent huge pages, the setting in brackets: always, madvise or never.
    transparent_hugepages: str
    shared_hugepages: str
    compiler: str | None


def read_machine() -> Machine:
    from penstock.engine.memory.sizing import available_memory_bytes

    cpuinfo = _text(Path("/proc/cpuinfo"))
    flags = set(_field(cpuinfo, r"(?:flags|Features)").split())
    return Machine(
        cpu=_field(cpuinfo, "model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        features=tuple(name for name in WANTED_FEATURES if name in flags),
        memory_total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_available_bytes=available_memory_bytes(),
        transparent_hugepages=_chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        shared_hugepages=_chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        compiler=shutil.which(os.environ.get("CXX", "g++")),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _chosen(path: str) -> str:
    found = re.search(r"\[(\w+)\]", _text(Path(path)))
    return found[1] if found else "unknown"
