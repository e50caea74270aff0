"""Attention against the machine: prefill by its matrix rate, decode by its read bandwidth.

    python -m benchmarks.attention [--threads 2] [--repeats 7] [--kv-cache-dtype int8]

Each row is measured beside a bfloat16 matrix product and a plain read of memory in the same round,
since both rates wander on shared machines; what is printed are medians of the rounds and of the
ratios within a round. Decode walks over more KV than the cache holds. The FLOPs of prefill are
those of the keys that a query sees: 4 x head_dim a head.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from penstock.engine.attention.base import AttentionRow, AttentionShape
from penstock.engine.attention.cpu_native import NativeCpuAttention
from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.xtensor import XTensorMemory

#: Qwen3-0.6B.
LAYERS, HEADS, KV_HEADS, DIM = 28, 16, 8, 128
SHAPE = AttentionShape(HEADS, KV_HEADS, DIM, DIM**-0.5)
#: Read between two visits to the same KV.
COLD_BYTES = 256 << 20

#: (tokens before, tokens of the chunk)
PREFILLS = ((0, 128), (0, 256), (0, 1024), (0, 4096), (768, 256), (3840, 256), (15872, 512))
#: Lengths of the sequences of a batch.
DECODES = {
    "1 x 128": [128],
    "1 x 1,024": [1024],
    "1 x 4,096": [4096],
    "1 x 32,768": [32768],
    "16 x 64-1,984": [64 + 128 * i for i in range(16)],
    "64 x 32-2,048": [32 + 32 * i for i in range(64)],
}


class Scene:
    """Sequences of the given lengths in one pool, and a backend over it."""

    def __init__(self, lengths: list[int], kv_dtype: str) -> None:
        layout = kv_layout(LAYERS, KV_HEADS, DIM, kv_dtype)
        blocks = [-(-length // 16) for length in lengths]
        self.memory = XTensorMemory(layout, sum(blocks), len(lengths), max(blocks))
        self.memory.pool_blocks().fill_(60)  # in int8, four of these are a scale of 0.01
        block = iter(torch.randperm(sum(blocks)).tolist())  # as in an engine that has run for long
        for slot, count in enumerate(blocks):
            for index in range(count):
                self.memory.map(slot, index, next(block))
        self.backend = NativeCpuAttention(SHAPE, self.memory)

    def inputs(self, num_tokens: int) -> list[torch.Tensor]:
        qkv = torch.randn(num_tokens, HEADS + 2 * KV_HEADS, DIM).to(torch.bfloat16)
        return list(qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1))


def seconds(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def product_flops_per_s(size: int = 1024) -> float:
    a, b = torch.randn(2, size, size).to(torch.bfloat16)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(3))


def read_bytes_per_s(buffer: torch.Tensor) -> float:
    return buffer.nbytes / min(seconds(buffer.sum) for _ in range(2))


def prefill(start: int, num_tokens: int, kv_dtype: str) -> tuple[Callable[[], float], float]:
    """(one round: seconds of a layer, FLOPs of a layer)."""
    scene = Scene([start + num_tokens], kv_dtype)
    q, k, v = scene.inputs(num_tokens)

    def round_s() -> float:
        scene.backend.plan([AttentionRow(0, start, num_tokens)])
        layers = min(LAYERS, max(2, 8192 // num_tokens))
        run = scene.backend.run
        return seconds(lambda: [run(layer, q, k, v) for layer in range(layers)]) / layers

    seen = sum(range(start + 1, start + num_tokens + 1))
    return round_s, 4.0 * DIM * HEADS * seen


def sdpa(start: int, num_tokens: int) -> Callable[[], float]:
    q = torch.randn(1, HEADS, num_tokens, DIM).to(torch.bfloat16)
    k, v = torch.randn(2, 1, KV_HEADS, start + num_tokens, DIM).to(torch.bfloat16)
    mask = None
    if start:
        mask = torch.ones(num_tokens, start + num_tokens, dtype=torch.bool).tril(start)

    def round_s() -> float:
        return seconds(
            lambda: functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        )

    return round_s


def decode(lengths: list[int], kv_dtype: str) -> tuple[Callable[[], float], float]:
    """(one round: seconds of a step's attention in all layers, bytes of KV read)."""
    memory_bytes = sum(lengths) * kv_layout(LAYERS, KV_HEADS, DIM, kv_dtype).block_bytes // 16
    copies = -(-COLD_BYTES // memory_bytes)
    scene = Scene(lengths * copies, kv_dtype)
    q, k, v = scene.inputs(len(lengths))
    turn = 0

    def step() -> None:
        nonlocal turn
        first = turn % copies * len(lengths)
        turn += 1
        rows = [AttentionRow(first + i, length - 1, 1) for i, length in enumerate(lengths)]
        scene.backend.plan(rows)
        for layer in range(LAYERS):
            scene.backend.run(layer, q, k, v)

    def round_s() -> float:
        steps = max(1, min(copies, 8))
        return seconds(lambda: [step() for _ in range(steps)]) / steps

    return round_s, float(memory_bytes)


def show(name: str, rates: list[float], limits: list[float], unit: str, note: str = "") -> None:
    of = statistics.median(rate / limit for rate, limit in zip(rates, limits, strict=True))
    rate, limit = statistics.median(rates) / 1e9, statistics.median(limits) / 1e9
    print(f"{name:22} {rate:7.1f} {unit}  of {limit:7.1f}: {of:5.0%}  {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kv-cache-dtype", default="bfloat16", choices=("bfloat16", "int8"))
    parser.add_argument("--only", choices=("prefill", "decode"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, KV in {options.kv_cache_dtype}")
    if options.only != "decode":
        for start, num_tokens in PREFILLS:
            round_s, flops = prefill(start, num_tokens, options.kv_cache_dtype)
            theirs_s = sdpa(start, num_tokens)
            limits, rates, torch_s = [], [], []
            for _ in range(options.repeats):
                limits.append(product_flops_per_s())
                rates.append(flops / round_s())
                torch_s.append(theirs_s())
            name = f"prefill {num_tokens:,} after {start:,}"
            faster = statistics.median(
                their * rate / flops for their, rate in zip(torch_s, rates, strict=True)
            )
            show(name, rates, limits, "GFLOP/s", f"torch's SDPA takes {faster:.1f} x as long")
    if options.only != "prefill":
        buffer = torch.ones(COLD_BYTES // 4)
        for name, lengths in DECODES.items():
            round_s, num_bytes = decode(lengths, options.kv_cache_dtype)
            limits, rates = [], []
            for _ in range(options.repeats):
                limits.append(read_bytes_per_s(buffer))
                rates.append(num_bytes / round_s())
            show(f"decode {name}", rates, limits, "GB/s")


if __name__ == "__main__":
    main()
