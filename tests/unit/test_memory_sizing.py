"""How many blocks, and what a machine says it can spare."""

from __future__ import annotations

import pytest
import torch

from penstock.engine.memory import huge_pages
from penstock.engine.memory.sizing import (
    GIB,
    KvSizing,
    available_memory_bytes,
    block_stride_bytes,
    choose_num_blocks,
    kv_layout,
)
from penstock.protocol.errors import ConfigError, NotEnoughMemory

LAYOUT = kv_layout(28, 8, 128, "bfloat16")


def blocks(sizing=None, *, max_model_len=4096, max_num_seqs=16, available_bytes=16 * GIB):
    return choose_num_blocks(
        LAYOUT,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        sizing=sizing,
        available_bytes=available_bytes,
    )


def test_block_bytes_count_all_layers_keys_and_values():
    assert LAYOUT.block_bytes == 28 * 2 * 8 * 16 * 128 * 2
    assert block_stride_bytes(LAYOUT) % 4096 == 0
    assert kv_layout(1, 1, 8, "float32", block_tokens=1).block_bytes == 2 * 8 * 4


def test_explicit_sizes_win():
    assert blocks(KvSizing(num_blocks=300, kv_cache_bytes=GIB)) == 300
    assert blocks(KvSizing(kv_cache_bytes=GIB)) == GIB // block_stride_bytes(LAYOUT)


def test_the_default_takes_a_share_but_no_more_than_the_cap_or_all_slots_need():
    assert blocks(available_bytes=4 * GIB) == int(4 * GIB * 0.4) // block_stride_bytes(LAYOUT)
    assert blocks(available_bytes=400 * GIB) == 4 * GIB // block_stride_bytes(LAYOUT)
    assert blocks(max_model_len=64, max_num_seqs=3) == 4 * 3


def test_one_sequence_is_the_least():
    one = 4096 // 16
    assert blocks(available_bytes=GIB) == one  # more than the share, but it fits
    with pytest.raises(NotEnoughMemory, match="--max-model-len"):
        blocks(available_bytes=GIB // 4)
    with pytest.raises(ConfigError, match="smaller than one sequence of 4096"):
        blocks(KvSizing(num_blocks=one - 1))
    with pytest.raises(ConfigError, match="smaller than one sequence"):
        blocks(KvSizing(kv_cache_bytes=1 << 20))


@pytest.fixture
def machine(tmp_path):
    """A /proc and /sys of 8 GiB available, to which tests add control groups."""
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    return proc, sys


def group(folder, limit, usage, *, v1=False, inactive_file=0):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names if v1 else ("memory.max", "memory.current"), (limit, usage)):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")


def test_available_without_groups(machine):
    assert available_memory_bytes(*machine) == 8 * GIB


def test_the_tightest_enclosing_group_counts(machine):
    proc, sys = machine
    (proc / "self/cgroup").write_text("0::/a/b\n")
    group(sys / "fs/cgroup/a", 3 * GIB, 2 * GIB, inactive_file=GIB // 2)
    group(sys / "fs/cgroup/a/b", "max", GIB)
    assert available_memory_bytes(proc, sys) == GIB + GIB // 2


def test_version_1_groups(machine):
    proc, sys = machine
    (proc / "self/cgroup").write_text("9:cpu:/\n4:cpuset,memory:/box\n")
    group(sys / "fs/cgroup/memory/box", 5 * GIB, 6 * GIB, v1=True)
    assert available_memory_bytes(proc, sys) == 0


def test_a_group_seen_from_inside_a_container_is_at_the_root(machine):
    proc, sys = machine
    (proc / "self/cgroup").write_text("0::/docker/not/visible\n")
    group(sys / "fs/cgroup", 2 * GIB, GIB)
    assert available_memory_bytes(proc, sys) == GIB


def test_large_buffers_where_there_are_no_huge_pages(monkeypatch):
    """A kernel without transparent huge pages refuses the advice; that is all."""
    monkeypatch.setattr(huge_pages, "_MADV_HUGEPAGE", 12345)
    found = huge_pages.empty_huge((3, 1 << 20), torch.float32)
    found[2, -1] = 7
    assert found.shape == (3, 1 << 20) and found[2, -1] == 7


def test_a_large_buffer_that_does_not_fit_is_an_error_of_ours():
    with pytest.raises(NotEnoughMemory, match="GiB"):
        huge_pages.empty_huge((1 << 60,), torch.uint8)
