"""Which processors compute: how many threads, and whether each has one to itself.

The threads of the team wait for each other at every barrier, so one that shares its processor, or
that a quota stops, holds all of them up. Hence never more threads than cores that this process may
use, nor than its control group's quota lets run at once. Needs no torch: `doctor` says the same.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """`cpus` is empty, or the processor of each thread of the team."""

    num_threads: int
    cpus: tuple[int, ...]
    #: What `doctor` says of it.
    reason: str


def choose(
    bind: str,
    num_threads: int | None,
    *,
    allowed: Sequence[int],
    num_cores: int,
    quota: float | None,
) -> Placement:
    """`bind` is auto, none, or processors such as "0-3,8". `num_threads`: None to decide here.

    `num_cores` are the physical cores among the `allowed` processors; `quota` is how many
    processors' time the control group gives. Raises `ConfigError`.
    """
    if bind in ("auto", "none"):
        if num_threads is not None:
            return Placement(num_threads, (), "as asked for")
        count, reason = num_cores, f"a thread for each of {num_cores} cores"
        if quota is not None and quota < num_cores:
            count = max(1, int(quota))
            reason = f"the control group gives {quota:g} of {num_cores} cores"
        return Placement(count, (), reason)
    cpus = parse_cpus(bind)
    if missing := [cpu for cpu in cpus if cpu not in allowed]:
        raise ConfigError(
            f"--cpu-bind {bind}: this process may not use processor {missing[0]} "
            f"(it may use {format_cpus(allowed)})"
        )
    if num_threads is not None and num_threads > len(cpus):
        raise ConfigError(
            f"--num-threads {num_threads} is more than the {len(cpus)} processors of "
            f"--cpu-bind {bind}"
        )
    cpus = cpus[:num_threads]
    return Placement(len(cpus), cpus, f"bound to processors {format_cpus(cpus)}")


def here(bind: str, num_threads: int | None) -> Placement:
    """`choose`, for this process on this machine."""
    allowed = sorted(os.sched_getaffinity(0))
    return choose(
        bind,
        num_threads or _asked_by_environment(bind),
        allowed=allowed,
        num_cores=count_cores(allowed),
        quota=cpu_quota(),
    )


def _asked_by_environment(bind: str) -> int | None:
    """OMP_NUM_THREADS, which everything that computes heeds; a list of processors goes before."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if bind in ("auto", "none") and asked.isdecimal() and int(asked) else None


def parse_cpus(text: str) -> tuple[int, ...]:
    """ "0-2,5" is (0, 1, 2, 5). Raises `ConfigError`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"--cpu-bind {text}: give auto, none, or processors such as 0-3,8")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) < len(found):
        raise ConfigError(f"--cpu-bind {text} names a processor twice")
    return tuple(found)


def format_cpus(cpus: Sequence[int]) -> str:
    """The other way round: (0, 1, 2, 5) is "0-2,5"."""
    parts: list[list[int]] = []
    for cpu in cpus:
        if parts and parts[-1][-1] == cpu - 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def count_cores(cpus: Sequence[int], sys: Path = Path("/sys")) -> int:
    """Physical cores: two threads of one core share the units that compute."""
    seen = set()
    for cpu in cpus:
        file = sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            seen.add(file.read_text().strip())
        except OSError:
            seen.add(str(cpu))
    return len(seen)


def cpu_quota(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> float | None:
    """How many processors' time the narrowest enclosing control group gives, versions 1 and 2."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [sys / "fs/cgroup"]
        elif "cpu" in controllers.split(","):
            roots = [sys / "fs/cgroup" / controllers, sys / "fs/cgroup/cpu"]
        else:
            continue
        for root in roots:
            # Inside a container the path is often not visible and the root carries the limit.
            group = root / path.lstrip("/")
            for folder in [group, *group.parents]:
                found += _quota(folder)
                if folder == root:
                    break
    return min(found, default=None)


def _quota(folder: Path) -> list[float]:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        except OSError:
            return []
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return []
    return [share] if share > 0 else []  # version 1 writes -1 for none


def bind_team(library: ctypes.CDLL | None, cpus: Sequence[int]) -> None:
    """Bind the team of the calling thread, itself included: thread i to cpus[i]. Threads that it
    starts later inherit that, so this comes last. Raises `ConfigError` where it cannot be done.
    """
    if not cpus:
        return
    asked = f"--cpu-bind {format_cpus(cpus)}"
    if library is None:
        raise ConfigError(
            f"{asked} needs the native CPU kernels, and there are none: install g++, or unset "
            "PENSTOCK_NATIVE"
        )
    wanted = (ctypes.c_int * len(cpus))(*cpus)
    library.penstock_bind.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.penstock_bind.restype = ctypes.c_int
    if failed := library.penstock_bind(wanted, len(cpus)):
        raise ConfigError(
            f"{asked}: {failed} of {len(cpus)} threads could not be bound. Are OMP_THREAD_LIMIT or "
            "OMP_DYNAMIC set, or have processors been taken away?"
        )


def leave(cpus: Sequence[int]) -> None:
    """Keep the calling thread off `cpus`, if that leaves it any processor."""
    if cpus and (rest := os.sched_getaffinity(0) - set(cpus)):
        os.sched_setaffinity(0, rest)
