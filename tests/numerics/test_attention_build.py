"""Compiling the kernels: the cache, what breaks it, and machines without a compiler."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engine.platforms.cpu import kernels
from penstock.engine.platforms.cpu.platform import CpuPlatform

needs_compiler = pytest.mark.skipif(kernels.load() is None, reason="needs a C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache of its own, and `load` as if never called."""
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    kernels.load_part.cache_clear()
    yield tmp_path / "cache"
    kernels.load_part.cache_clear()


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """A cache that holds the library, copied from the user's; compiling copies it again."""
    library = kernels.build()
    copy = tmp_path / library.name
    copy.write_bytes(library.read_bytes())
    compiled = []

    def compile_quickly(compiler: str, march: str, part: kernels.Part, scratch: Path) -> Path:
        compiled.append(march)
        built = scratch / "kernels.so"
        built.write_bytes(library.read_bytes()[: -kernels._SEAL_BYTES])
        return built

    monkeypatch.setattr(kernels, "_compile", compile_quickly)
    return copy, compiled


@needs_compiler
def test_the_cache_is_used(cached):
    library, compiled = cached
    assert kernels.build(cache=library.parent) == library
    assert not compiled


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_library_is_compiled_again_not_loaded(cached, damage):
    library, compiled = cached
    content = bytearray(library.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray()
    library.write_bytes(content)
    assert kernels.build(cache=library.parent) == library
    assert compiled == ["native"]
    kernels.open_library(library)
    assert list(library.parent.iterdir()) == [library]  # no leavings


@needs_compiler
def test_another_target_is_another_file():
    assert kernels.build("x86-64") != kernels.build("native")


@needs_compiler
def test_there_is_one_openmp_runtime():
    program = (
        "import torch; from penstock.engine.platforms.cpu import kernels; assert kernels.load();"
        "maps = open('/proc/self/maps').read().splitlines();"
        "print(len({line.split()[-1] for line in maps if 'gomp' in line or 'iomp' in line}))"
    )
    assert _python(program).stdout.strip() == "1"


def test_no_compiler_means_one_warning_and_torch(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nonexistent")
    with caplog.at_level(logging.WARNING):
        platforms = [CpuPlatform(), CpuPlatform()]
    assert [r.getMessage() for r in caplog.records] == [
        "no native CPU kernels, torch's operations are used: no C++ compiler (g++) on the PATH"
    ]
    assert platforms[0].kernels()["rms_norm"] == "torch"
    assert not fresh.exists()


def test_a_compiler_that_fails_is_named_with_its_reason(fresh, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'fatal error: disk on fire' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with caplog.at_level(logging.INFO):
        assert kernels.load() is None
    assert caplog.text.count("compiling kernels for this machine, once: core") == 1
    assert "disk on fire" in caplog.text
    assert list(fresh.iterdir()) == []


@needs_compiler
def test_without_a_cache_a_process_compiles_for_itself(fresh, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("PENSTOCK_MARCH", "x86-64")
    with caplog.at_level(logging.WARNING):
        library = kernels.load()
    assert library is not None and library.penstock_lanes() == 4
    assert "compiled at every start" in caplog.text


def test_native_kernels_can_be_declined(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PENSTOCK_NATIVE", "0")
    assert kernels.load() is None
    assert not caplog.records


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("PENSTOCK_CACHE", "/x/y")
    assert kernels.cache_folder() == Path("/x/y")
    monkeypatch.delenv("PENSTOCK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/z")
    assert kernels.cache_folder() == Path("/z/penstock")


def _python(program: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
