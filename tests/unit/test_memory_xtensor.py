"""What only the mapped memory does: system calls saved, limits, other processes, what must fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from penstock.engine.memory import xtensor
from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.protocol.errors import EngineFailed, NotEnoughMemory

LAYOUT = kv_layout(2, 2, 64, "bfloat16")


@pytest.fixture
def memory():
    made = XTensorMemory(LAYOUT, num_blocks=12, num_slots=3, max_blocks_per_slot=6)
    yield made
    made.close()


def test_blocks_are_contiguous_in_the_slots_range(memory):
    for index, block in enumerate((7, 2, 9)):
        memory.map(1, index, block)
        memory.pool_blocks()[block] = float(block)
    view = memory.slot_blocks(1, 3)
    assert view.data_ptr() == memory.base(1)
    assert view.stride(0) * view.element_size() == memory.block_stride_bytes
    assert [view[i].unique().item() for i in range(3)] == [7.0, 2.0, 9.0]


def test_a_block_mapped_twice_is_one_block(memory):
    memory.map(0, 0, 5)
    memory.map(2, 3, 5)
    memory.slot_blocks(0, 1)[0] = 3.0
    assert (memory.slot_blocks(2, 4)[3] == 3.0).all()


def test_a_block_that_comes_back_to_its_place_costs_no_system_call(memory):
    for index in range(4):
        memory.map(0, index, index)
    before = memory.num_syscalls
    memory.free_slot(0)
    for index in range(4):
        memory.map(0, index, index)
    assert memory.num_syscalls == before
    memory.map(0, 0, 11)
    assert memory.num_syscalls == before + 1


def test_block_bytes_are_padded_to_pages():
    layout = kv_layout(1, 1, 16, "bfloat16")  # 1 KiB
    memory = XTensorMemory(layout, 4, 2, 4)
    assert memory.block_stride_bytes == 4096
    memory.map(0, 0, 3)
    memory.map(0, 1, 1)
    memory.slot_blocks(0, 2)[1] = 2.0
    assert (memory.pool_blocks()[1] == 2.0).all() and (memory.pool_blocks()[2:] == 0.0).all()
    memory.check()
    memory.close()


def test_mappings_of_ended_sequences_go_when_the_bound_is_near():
    memory = XTensorMemory(LAYOUT, 40, 3, 10, max_mappings=3 + 12)
    for index in range(10):
        memory.map(0, index, index)
    memory.free_slot(0)
    for index in range(10):
        memory.map(1, index, 10 + 2 * index)
    assert memory.num_mapped == 10
    memory.map(0, 0, 39)
    memory.check()
    assert not torch.isnan(memory.slot_blocks(1, 10)).any()
    memory.close()


def test_unmapped_blocks_are_refused_before_a_kernel_reads_them(memory):
    memory.map(0, 0, 4)
    assert memory.base(0, 1) == memory.base(0)
    with pytest.raises(AssertionError, match="1 blocks mapped, 2 are needed"):
        memory.base(0, 2)
    memory.free_slot(0)
    with pytest.raises(AssertionError):
        memory.base(0, 1)


def test_check_sees_a_mapping_that_is_not_what_was_asked_for(memory):
    memory.map(0, 0, 4)
    memory.map(0, 1, 5)
    memory.check()
    stride = memory.block_stride_bytes
    flags = 0x1 | 0x10  # MAP_SHARED | MAP_FIXED, behind the memory's back
    xtensor._mmap(memory.base(0) + stride, stride, 3, flags, memory.fd, 9 * stride)
    with pytest.raises(AssertionError, match="slot 0 index 1: block 9 is mapped, block 5"):
        memory.check()


def test_a_hole_is_found(memory):
    memory.map(0, 1, 4)
    with pytest.raises(AssertionError, match="hole"):
        memory.check()


def test_another_process_reads_the_pool_through_the_descriptor(memory):
    memory.map(0, 0, 3)
    memory.slot_blocks(0, 1)[0] = 1.0
    program = (
        "import mmap, sys; fd, size, at = map(int, sys.argv[1:]);"
        "pool = mmap.mmap(fd, size, prot=mmap.PROT_READ); print(pool[at:at + 4].hex())"
    )
    size, at = 12 * memory.block_stride_bytes, 3 * memory.block_stride_bytes
    found = subprocess.run(
        [sys.executable, "-c", program, str(memory.fd), str(size), str(at)],
        pass_fds=[memory.fd],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "803f803f"  # two bfloat16 ones


def test_a_pool_that_does_not_fit_is_refused_with_both_sizes():
    with pytest.raises(NotEnoughMemory, match=r"does not fit: .* GiB are available"):
        XTensorMemory(LAYOUT, 1 << 40, 2, 4)


def test_a_pool_the_kernel_refuses_is_a_startup_error(monkeypatch):
    def refuse(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(NotEnoughMemory, match="No space left"):
        XTensorMemory(LAYOUT, 4, 2, 4)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_running_out_of_mappings_is_an_engine_error_that_says_what_to_raise(memory, monkeypatch):
    monkeypatch.setattr(xtensor.ctypes, "get_errno", lambda: 12)
    with pytest.raises(EngineFailed, match=r"vm\.max_map_count"):
        xtensor._mmap(1 << 20, 0, 0, 0, -1, 0)  # length 0 is refused
    monkeypatch.undo()
    memory.check()


def test_a_failed_map_leaves_the_table_true(memory, monkeypatch):
    memory.map(0, 0, 1)

    def refuse(*_args):
        raise EngineFailed("no room")

    monkeypatch.setattr(xtensor, "_mmap", refuse)
    with pytest.raises(EngineFailed):
        memory.map(0, 1, 2)
    with pytest.raises(EngineFailed):
        memory.map(0, 0, 7)
    monkeypatch.undo()
    memory.check()
    memory.map(0, 1, 2)
    memory.check()


def test_close_gives_everything_back():
    def ours() -> int:
        return Path("/proc/self/maps").read_text().count("penstock-kv")

    before = ours()
    memory = XTensorMemory(LAYOUT, 6, 2, 4)
    memory.map(1, 0, 2)
    assert ours() > before
    memory.close()
    memory.close()
    assert ours() == before
