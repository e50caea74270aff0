"""Windows: pages of another pool in our ranges, readable, verified, and gone when closed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.windows import Page
from penstock.engine.memory.xtensor import XTensorMemory

LAYOUT = kv_layout(2, 2, 64, "bfloat16")
NUM_BLOCKS = 12


@dataclass(eq=False)
class Pool:
    fd: int
    generations: np.ndarray = field(default_factory=lambda: np.zeros(NUM_BLOCKS, np.uint64))


@pytest.fixture
def memories() -> Iterator[tuple[XTensorMemory, XTensorMemory, Pool]]:
    owner, ours = (XTensorMemory(LAYOUT, NUM_BLOCKS, 3, 6) for _ in range(2))
    pool = Pool(os.open(f"/proc/self/fd/{owner.fd}", os.O_RDONLY))
    yield owner, ours, pool
    ours.close()
    owner.close()
    os.close(pool.fd)


def test_a_window_shows_the_owners_page_beside_our_own(memories) -> None:
    owner, ours, pool = memories
    owner.pool_blocks()[7] = 7.0
    ours.open_window(12, Page(pool, 7, 0))
    ours.map(0, 0, 12)
    ours.map(0, 1, 3)
    ours.map_ahead(1, 4, 12)
    ours.slot_blocks(0, 2)[1] = 3.0
    ours.check()
    assert (ours.slot_blocks(0, 2)[0] == 7.0).all() and (ours.slot_blocks(1, 5)[4] == 7.0).all()
    owner.pool_blocks()[7] = 8.0
    assert (ours.slot_blocks(0, 1)[0] == 8.0).all()
    assert (ours.pool_blocks()[3] == 3.0).all()


def test_only_rows_that_read_what_has_moved_on_are_told(memories) -> None:
    _, ours, pool = memories
    other = Pool(pool.fd)
    pages = {12: (pool, 7), 13: (pool, 8), 14: (other, 7)}
    for window, (whose, block) in pages.items():
        ours.open_window(window, Page(whose, block, 0))
        ours.map(0, window - 12, window)
    ours.map(1, 0, 13)
    ours.map(1, 1, 5)
    ours.map(2, 0, 6)
    rows = [(2, 1), (0, 3), (1, 2), (0, 1)]
    assert ours.moved_on(rows) == {}
    pool.generations[8] += 1
    assert ours.moved_on(rows) == {1: [13], 2: [13]}
    other.generations[7] += 1
    assert ours.moved_on(rows) == {1: [13, 14], 2: [13]}
    pool.generations[:] += 1
    assert ours.moved_on([(0, 1)]) == {0: [12]}


def test_a_closed_window_is_unmapped_and_its_id_serves_again(memories) -> None:
    owner, ours, pool = memories
    owner.pool_blocks()[1], owner.pool_blocks()[2] = 1.0, 2.0
    ours.open_window(12, Page(pool, 1, 0))
    for slot in range(3):
        ours.map(slot, 0, 12)
    ours.close_windows([12])
    ours.check()
    assert ours.num_mapped == 0 and not len(ours.windows)
    with pytest.raises(AssertionError, match="block 12 of 12 and 0 windows"):
        ours.map(0, 0, 12)
    ours.open_window(12, Page(pool, 2, 0))
    ours.map(0, 0, 12)
    assert (ours.slot_blocks(0, 1)[0] == 2.0).all()
    ours.check()


def test_many_windows_come_and_go_in_any_order(memories) -> None:
    _, ours, pool = memories
    rng = np.random.default_rng(0)
    is_open: dict[int, int] = {}
    for _ in range(500):
        window = int(rng.integers(12, 400))
        if window in is_open:
            ours.close_windows([window])
            del is_open[window]
        else:
            is_open[window] = int(rng.integers(0, NUM_BLOCKS))
            ours.open_window(window, Page(pool, is_open[window], 0))
        assert sorted(ours.windows) == sorted(is_open)
    pool.generations[5] = 1
    windows = np.array(list(is_open))
    assert ours.windows.moved_on(windows).tolist() == [b == 5 for b in is_open.values()]


def test_nobody_writes_through_a_window() -> None:
    """The kernel sees to it: the process that tries is ended."""
    program = (
        "import os, numpy as np\n"
        "from penstock.engine.memory.sizing import kv_layout\n"
        "from penstock.engine.memory.windows import Page\n"
        "from penstock.engine.memory.xtensor import XTensorMemory\n"
        "a, b = (XTensorMemory(kv_layout(2, 2, 64, 'bfloat16'), 4, 1, 4) for _ in range(2))\n"
        "class Pool: fd, generations = a.fd, np.zeros(4, np.uint64)\n"
        "b.open_window(4, Page(Pool(), 0, 0))\n"
        "b.map(0, 0, 4)\n"
        "print(float(b.slot_blocks(0, 1).sum()), flush=True)\n"
        "b.slot_blocks(0, 1)[0] = 1.0\n"
        "print('written')\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode < 0 and found.stdout == "0.0\n"


def test_closing_the_memory_leaves_no_mapping(memories) -> None:
    pool = memories[2]
    before = Path("/proc/self/maps").read_text().count("penstock-kv")
    memory = XTensorMemory(LAYOUT, NUM_BLOCKS, 3, 6)
    memory.open_window(12, Page(pool, 1, 0))
    memory.map(0, 0, 12)
    memory.close()
    assert Path("/proc/self/maps").read_text().count("penstock-kv") == before
