"""Compiles the C++ kernels for this machine at first use and keeps them in a cache.

A plain C interface called by ctypes, which releases the interpreter lock during calls. The library
links against the OpenMP runtime that torch brings, so that both share one pool of threads. Without
a compiler there is one warning, and everything runs on torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_HEADERS = (
    *("common.h", "attention.h", "decode.h", "prefill.h", "plan.h", "ops.h", "linear.h"),
    "quantized.h",
)


@dataclass(frozen=True, slots=True)
class Part:
    """What is compiled and loaded as one library."""

    name: str
    sources: tuple[str, ...]
    defines: tuple[str, ...] = ()


CORE = Part(
    "core",
    (
        *("small_ops.cpp", "ops.cpp", "linear.cpp", "placement.cpp"),
        *("gemm_int8.cpp", "gemm_int4.cpp", "quantize_rows.cpp"),
    ),
)


def attention(head_dim: int) -> Part:
    """For one head_dim: all of them together would take a quarter of a minute to compile."""
    return Part(f"attention-{head_dim}", ("attention.cpp",), (f"-DPENSTOCK_HEAD_DIM={head_dim}",))


#: Compiled with an installation: what most models have.
_COMMON_HEAD_DIMS = (64, 128)
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
)
_COMPILE_TIMEOUT_S = 120
#: Held while compiling, so that nobody compiles what another thread is about to have.
_building = threading.Lock()


class CompileFailed(Exception):
    """Why there are no native kernels; the message is for the log and for `doctor`."""


class CacheUnusable(CompileFailed):
    """Nothing is wrong with the kernels, but they cannot be kept."""


def load() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None (after one warning) where that is impossible.

    PENSTOCK_NATIVE=0 asks for torch's operations alone. Where the cache cannot be used (a full
    disk, a read-only home) this process compiles for itself.
    """
    return load_part(CORE)


def load_attention(head_dim: int) -> ctypes.CDLL | None:
    """The same for attention, whose kernels are made for one head_dim, a multiple of 16."""
    return load_part(attention(head_dim)) if load() is not None else None


@functools.cache
def load_part(part: Part) -> ctypes.CDLL | None:
    if os.environ.get("PENSTOCK_NATIVE") == "0":
        return None
    try:
        with _building:
            try:
                return open_library(build(part=part))
            except CacheUnusable as exc:
                logger.warning("native CPU kernels are compiled at every start: %s", exc)
                with tempfile.TemporaryDirectory() as folder:
                    return open_library(build(cache=Path(folder), part=part))
    except CompileFailed as exc:
        logger.warning("no native CPU kernels, torch's operations are used: %s", exc)
        return None


def build_ahead(head_dim: int | None = None) -> None:
    """Compile in the background if need be. Needs no torch, so that a first start can compile while
    it imports that; `load` waits for it."""
    parts = [CORE] if head_dim is None else [CORE, attention(head_dim)]

    def work() -> None:
        # `load` will say what is wrong
        with _building, contextlib.suppress(CompileFailed), ThreadPoolExecutor() as pool:
            list(pool.map(lambda part: build(part=part), parts))

    if os.environ.get("PENSTOCK_NATIVE") != "0":
        threading.Thread(target=work, name="penstock-compile", daemon=True).start()


def build(march: str | None = None, cache: Path | None = None, part: Part = CORE) -> Path:
    """Path of a part's shared library, from the cache or compiled. Raises `CompileFailed`.

    `march` is the compiler's name for a processor: PENSTOCK_MARCH, or this one.
    """
    march = march or os.environ.get("PENSTOCK_MARCH") or "native"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CompileFailed("no C++ compiler (g++) on the PATH")
    shared = cache is None
    cache = cache or cache_folder()
    library = cache / f"{part.name}-{_key(compiler, march, part)}.so"
    if _intact(library):
        return library
    if shared:
        logger.info("compiling kernels for this machine, once: %s", part.name)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = _compile(compiler, march, part, Path(scratch))
            _seal(built)
            built.replace(library)  # atomic: another process sees all of it or nothing
    except OSError as exc:
        raise CacheUnusable(f"{cache} cannot be used: {exc}") from exc
    return library


def cache_folder() -> Path:
    """$PENSTOCK_CACHE, or the user's cache folder."""
    if found := os.environ.get("PENSTOCK_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"


def open_library(path: Path) -> ctypes.CDLL:
    """Load a built library and declare its functions. Raises `CompileFailed`."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as exc:
        raise CompileFailed(f"{path} does not load: {exc}") from exc
    pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures = {
        "run": [pointer, pointer, flag],
        "replay": [pointer, pointer, count, flag],
        "plan_new": [],
        "plan_free": [pointer],
        "plan": [pointer] * 3 + [count] * 2,
        "lanes": [],
        "dot_unit": [],
    }
    for name, argtypes in signatures.items():
        function = getattr(library, f"penstock_{name}", None)
        if function is None:  # of another part
            continue
        function.argtypes = argtypes
        returns = {"lanes": flag, "plan_new": pointer, "dot_unit": ctypes.c_char_p}
        function.restype = returns.get(name)
    return library


def _compile(compiler: str, march: str, part: Part, scratch: Path) -> Path:
    """The sources side by side, then one link."""

    def compile_one(source: str) -> Path:
        out = scratch / f"{source}.o"
        how = [*_FLAGS, f"-march={march}", *part.defines]
        _run([compiler, *how, "-c", str(_HERE / source), "-o", str(out)])
        return out

    with ThreadPoolExecutor(len(part.sources)) as pool:
        objects = list(pool.map(compile_one, part.sources))
    library = scratch / "kernels.so"
    _run([compiler, "-shared", *map(str, objects), *_openmp(), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired as exc:
        raise CompileFailed(f"{command[0]} took longer than {_COMPILE_TIMEOUT_S} s") from exc
    except OSError as exc:
        raise CompileFailed(f"{command[0]} cannot be run: {exc}") from exc
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        raise CompileFailed(f"{command[0]} failed: {reason}")


def _openmp() -> list[str]:
    """torch's own OpenMP runtime where it brings one, else the system's."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    bundled = sorted((torch / "lib").glob("libgomp*.so*"))
    bundled += sorted((torch.parent / "torch.libs").glob("libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]


def _key(compiler: str, march: str, part: Part) -> str:
    """Everything that decides the binary."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256()
    inputs = [(_HERE / name).read_bytes() for name in (*part.sources, *_HEADERS)]
    inputs += [
        version,
        " ".join((*_FLAGS, *part.defines, march, *_openmp())).encode(),
        _cpu_flags(),
    ]
    for each in inputs:
        digest.update(len(each).to_bytes(8, "little") + each)
    return digest.hexdigest()[:24]


def _cpu_flags() -> bytes:
    """What -march=native depends on: a cache may be shared by different machines."""
    wanted = ("flags", "Features", "model name", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = dict.fromkeys(line for line in lines if line.startswith(wanted))
    return "\n".join([platform.machine(), *found]).encode()


_SEAL_BYTES = 32


def _seal(library: Path) -> None:
    """Append a digest of the file to itself; loaders do not look past the last section."""
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())


def _intact(library: Path) -> bool:
    """A file that was cut short or changed is compiled again rather than loaded."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_SEAL_BYTES]).digest() == content[-_SEAL_BYTES:]


if __name__ == "__main__":
    # What installers call, so that the first start need not compile.
    if load() is not None:
        for each in _COMMON_HEAD_DIMS:
            load_attention(each)
