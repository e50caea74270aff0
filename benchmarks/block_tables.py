"""Virtually contiguous KV against block tables, under the same decode attention kernel.

    python -m benchmarks.block_tables [--threads 2] [--rounds 15] [--pool-gib 1]

The kernels are compiled twice, the second time with one line of attention.h changed: instead of
computing a block's address (base + block * stride) it reads it from a table. That is the table in
its cheapest form, whole addresses instead of numbers of blocks. Both variants read the same
physical blocks, in the same scattered order, layer by layer through a step of Qwen3-0.6B's
dimensions; they take turns, and what counts is the ratio within a round. A third one looks up
addresses of the mapped range: what it costs over the first is the look-up, and what the second
costs over it is the translation of scattered addresses (TLB, page walks). Mapping is measured
apart: each sequence needs one new block every 16 steps, so a step of n sequences owes n / 16 maps
where nothing is mapped ahead.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from penstock.engine.attention.base import AttentionRow, AttentionShape
from penstock.engine.attention.cpu_native import NativeCpuAttention
from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.platforms.cpu import kernels
from penstock.engine.platforms.cpu.ops import Ops

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 28, 16, 8, 128, 16
SHAPE = AttentionShape(HEADS, KV_HEADS, DIM, DIM**-0.5)
CONTEXTS = (1024, 4096, 16384)
NUM_SEQUENCES = (1, 4, 16, 64)
#: More mappings than this are beyond what the kernel gives a process by default.
MAX_MAPPINGS = 49_000

_ADDRESS = "reinterpret_cast<char*>(row.base) + block * call.block_stride_bytes"
_FROM_TABLE = "reinterpret_cast<char**>(row.base)[block]"


class Tables:
    """What the attention backend asks of a memory: block tables over the mapped memory's pool."""

    def __init__(self, memory: XTensorMemory, blocks_SN: np.ndarray, base_S1: np.ndarray) -> None:
        self.layout = memory.layout
        self.block_stride_bytes = memory.block_stride_bytes
        addresses_SN = base_S1 + blocks_SN.astype(np.int64) * memory.block_stride_bytes
        self._table_SN = np.ascontiguousarray(addresses_SN)

    def base(self, slot: int, num_blocks: int = 0) -> int:
        assert num_blocks <= self._table_SN.shape[1]
        return int(self._table_SN[slot].ctypes.data)


def attention(memory: Any, ops: Ops) -> NativeCpuAttention:
    """The backend over a variant's library instead of the engine's."""
    with mock.patch.object(kernels, "load_attention", lambda head_dim: ops.library):
        return NativeCpuAttention(SHAPE, memory, ops)


def build(folder: Path, *, with_tables: bool) -> Ops:
    """The attention kernels, of this head_dim alone to save time; at will with the address read
    from a table."""
    folder.mkdir()
    for file in kernels._HERE.glob("*.h"):
        shutil.copy(file, folder / file.name)
    if with_tables:
        header = (folder / "attention.h").read_text()
        assert header.count(_ADDRESS) == 1, "attention.h finds blocks in another way: change this"
        (folder / "attention.h").write_text(header.replace(_ADDRESS, _FROM_TABLE))
    shutil.copy(kernels._HERE / "attention.cpp", folder)
    shutil.copy(kernels._HERE / "ops.cpp", folder)
    library = folder / "attention.so"
    subprocess.run(
        [
            *(os.environ.get("CXX", "g++"), *kernels._FLAGS, "-march=native", "-shared"),
            *kernels.attention(DIM).defines,
            *(str(folder / "attention.cpp"), str(folder / "ops.cpp")),
            *(*kernels._openmp(), "-o", str(library)),
        ],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    pointer, count_type = ctypes.c_void_p, ctypes.c_int64
    loaded.penstock_run.argtypes = [pointer, pointer, ctypes.c_int]
    loaded.penstock_plan_new.restype = pointer
    loaded.penstock_plan_free.argtypes = [pointer]
    loaded.penstock_plan.argtypes = [pointer] * 3 + [count_type] * 2
    return Ops(loaded)


def scattered(
    num_sequences: int, num_blocks: int, pool_blocks: int, dice: np.random.Generator
) -> np.ndarray:
    """Blocks of each sequence, in no order; beyond the pool's size some serve several sequences."""
    turns = -(-num_sequences * num_blocks // pool_blocks)
    drawn = np.concatenate([dice.permutation(pool_blocks) for _ in range(turns)])
    return drawn[: num_sequences * num_blocks].reshape(num_sequences, num_blocks)


def compare(
    num_sequences: int, context: int, pool_blocks: int, ops: tuple[Ops, Ops], rounds: int
) -> None:
    layout = kv_layout(LAYERS, KV_HEADS, DIM, "bfloat16")
    num_blocks = context // BLOCK
    dice = np.random.default_rng(num_sequences * context)
    blocks_SN = scattered(num_sequences, num_blocks, pool_blocks, dice)
    memory = XTensorMemory(
        layout, pool_blocks, num_sequences, num_blocks, max_mappings=MAX_MAPPINGS + num_sequences
    )
    for block, content in enumerate(memory.pool_blocks()):
        content.fill_(block % 7 / 8)
    started_s = time.perf_counter()
    for slot, row in enumerate(blocks_SN.tolist()):
        for index, block in enumerate(row):
            memory.map(slot, index, block)
    map_s = (time.perf_counter() - started_s) / blocks_SN.size
    of_pool: Any = Tables(memory, blocks_SN, np.array(memory.pool_blocks().data_ptr()))
    bases_S1 = np.array([[memory.base(slot)] for slot in range(num_sequences)])
    in_order = np.broadcast_to(np.arange(num_blocks), blocks_SN.shape)
    of_ranges: Any = Tables(memory, in_order, bases_S1)
    plain_ops, table_ops = ops
    mapped = attention(memory, plain_ops)
    tabled = attention(of_pool, table_ops)
    looked_up = attention(of_ranges, table_ops)
    backends = [mapped, tabled, looked_up]
    rows = [AttentionRow(slot, context - 1, 1) for slot in range(num_sequences)]
    for backend in backends:
        backend.plan(rows)
    heads = torch.randn(num_sequences, HEADS + 2 * KV_HEADS, DIM).to(torch.bfloat16)
    q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    k, v = torch.full_like(k, 0.5), torch.full_like(v, 0.5)  # what is stored reads the same
    for backend in backends:
        backend.run(0, q, k, v)
    assert torch.equal(mapped.run(0, q, k, v), tabled.run(0, q, k, v))
    assert torch.equal(mapped.run(0, q, k, v), looked_up.run(0, q, k, v))

    def step_s(backend: NativeCpuAttention) -> float:
        started_s = time.perf_counter()
        for layer in range(LAYERS):
            backend.run(layer, q, k, v)
        return time.perf_counter() - started_s

    times = []
    for number in range(rounds + 1):
        order = backends if number % 2 else backends[::-1]
        found = {backend: step_s(backend) for backend in order}
        times.append([found[backend] for backend in backends])
    mapped_s, tabled_s, _ = (statistics.median(column) for column in zip(*times[1:]))
    ratio = statistics.median(tables / first for first, tables, _ in times[1:])
    lookup = statistics.median(third / first for first, _, third in times[1:])
    owed = num_sequences / BLOCK * map_s
    num_bytes = num_sequences * num_blocks * layout.block_bytes
    print(
        f"{num_sequences:3} x {context:6,}  mapped {mapped_s * 1e3:8.2f} ms "
        f"({num_bytes / mapped_s / 1e9:5.1f} GB/s)   tables {tabled_s * 1e3:8.2f} ms   "
        f"x {ratio:.3f} (look-up alone x {lookup:.3f})   a map {map_s * 1e6:5.0f} us: "
        f"{owed / mapped_s:6.2%} of the step if not ahead",
        flush=True,
    )
    del mapped, tabled, looked_up, backends, backend, found
    gc.collect()
    memory.close()


def shapes(contexts: list[int], batches: list[int]) -> Iterator[tuple[int, int]]:
    for context in contexts:
        for num_sequences in batches:
            if num_sequences * context // BLOCK > MAX_MAPPINGS:
                print(f"{num_sequences:3} x {context:6,}  more mappings than a process may have")
            else:
                yield num_sequences, context


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--sequences", type=int, nargs="+", default=NUM_SEQUENCES)
    parser.add_argument("--pool-gib", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stride = kv_layout(LAYERS, KV_HEADS, DIM, "bfloat16").block_bytes
    pool_blocks = int(options.pool_gib * (1 << 30)) // stride
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(2) as pool:
            plain = pool.submit(build, Path(folder) / "plain", with_tables=False)
            tables = pool.submit(build, Path(folder) / "tables", with_tables=True)
        ops = plain.result(), tables.result()
        for num_sequences, context in shapes(options.contexts, options.sequences):
            compare(num_sequences, context, pool_blocks, ops, options.rounds)


if __name__ == "__main__":
    main()
