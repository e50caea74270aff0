"""Step times of whole models, composed from measured kernels, for `fit_costs.py`.

    python -m tools.compose_step_times FOLDER tests/data/gpu_step_times.csv.gz

FOLDER holds kernels_GPU_{gemm,prefill_attn,decode_attn,allreduce}.csv (latencies in ms that
ai-dynamo/aiconfigurator has measured; Apache-2.0) and steptime_composed.csv.gz (step times of some
of our models, composed from the same kernels by others).

A step is, for each layer, its four matrix products, attention, two all-reduces with tensor
parallelism, and what else moves activations; and the logits. The last of these has no measured
kernel: a fixed time a layer and a rate of bytes are fitted, for each GPU, to what the composed step
times have beyond our sum. Between measured sizes times are interpolated in logarithms, beyond them
they go on at the last slope; attention of prompts, with the square of the length.

There is no measured prefill over a cached prefix. A chunk of n tokens that ends at position e costs
what prefilling e tokens costs in attention, less what prefilling e - n does: with causal masks that
is exactly the part of the work that is left.
"""

from __future__ import annotations

import csv
import gzip
import math
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tools.gpu_models import (
    DTYPE_BYTES,
    LEAST_KV_TOKENS,
    MEMORY_BYTES,
    MODELS,
    ModelShape,
    kv_tokens,
)

TPS = (1, 2, 4, 8)
PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
CHUNK_ENDS = (1024, 2048, 4096, 8192, 12288, 16384)
#: Beyond what was measured: there attention grows with the square of the length.
LONGEST_MEASURED = 16384
FAR_ENDS = (32768, 65536, 131072)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_CONTEXT = 1 << 19
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
COLUMNS = ("gpu", "model", "gemm_dtype", "tp", "phase", "batch", "new_tokens", "context", "ms")


class Table:
    """Times at points of a grid that may have holes; `at` interpolates in logarithms."""

    def __init__(self) -> None:
        self._tree: dict[int, Any] = {}

    def add(self, point: tuple[int, ...], ms: float) -> None:
        tree = self._tree
        for coordinate in point[:-1]:
            tree = tree.setdefault(coordinate, {})
        tree[point[-1]] = ms

    def at(self, *point: int) -> float:
        return math.exp(_log_at(self._tree, point))


def _log_at(tree: Any, point: tuple[int, ...]) -> float:
    if not point:
        return math.log(tree)
    first, *rest = point
    if first in tree:
        return _log_at(tree[first], tuple(rest))
    axis = sorted(tree)
    low = min(max(bisect_left(axis, first) - 1, 0), len(axis) - 2)
    (x0, x1), (y0, y1) = zip(
        *((math.log(a), _log_at(tree[a], tuple(rest))) for a in axis[low : low + 2])
    )
    return y0 + (y1 - y0) * (math.log(first) - x0) / (x1 - x0)


@dataclass
class Kernels:
    """Of one GPU. Attention by (heads, KV heads) of a rank, all-reduce by the number of ranks."""

    gemm: dict[str, Table] = field(default_factory=dict)
    prefill: dict[tuple[int, int], Table] = field(default_factory=dict)
    decode: dict[tuple[int, int], Table] = field(default_factory=dict)
    all_reduce: dict[int, Table] = field(default_factory=dict)
    #: Of a layer whatever it computes, and of each byte of activations that other kernels move.
    layer_ms: float = 0.0
    byte_ms: float = 0.0

    @classmethod
    def read(cls, folder: Path, gpu: str) -> Kernels:
        kernels = cls()
        for row in _rows(folder / f"kernels_{gpu}_gemm.csv.gz"):
            table = kernels.gemm.setdefault(row["gemm_dtype"], Table())
            table.add((int(row["n"]), int(row["k"]), int(row["m"])), float(row["latency"]))
        for name, tables, length in (
            ("prefill", kernels.prefill, lambda row: int(row["isl"])),
            ("decode", kernels.decode, lambda row: int(row["step"]) + 1),
        ):
            for row in _rows(folder / f"kernels_{gpu}_{name}_attn.csv.gz"):
                heads = int(row["num_heads"]), int(row["num_key_value_heads"])
                point = int(row["batch_size"]), length(row)
                tables.setdefault(heads, Table()).add(point, float(row["latency"]))
        for row in _rows(folder / f"kernels_{gpu}_allreduce.csv"):
            table = kernels.all_reduce.setdefault(int(row["num_gpus"]), Table())
            table.add((int(row["message_size"]),), float(row["latency"]))
        return kernels

    def step_ms(
        self, model: ModelShape, gemm_dtype: str, tp: int, rows: int, new: int, end: int
    ) -> float:
        """`rows` sequences compute `new` tokens each and then have `end`."""
        heads = model.num_heads // tp, model.num_kv_heads // tp
        if new == 1:
            attention_ms = self.decode[heads].at(rows, end)
        else:
            attention_ms = self._prefill_attention_ms(heads, rows, end)
            if end > new:
                attention_ms -= self._prefill_attention_ms(heads, rows, end - new)
        tokens = rows * new
        layer_ms = attention_ms + sum(
            self.gemm[gemm_dtype].at(n, k, tokens) for n, k in model.linears(tp)
        )
        if tp > 1:
            layer_ms += 2 * self.all_reduce[tp].at(tokens * model.hidden * 2)
        # Logits stay in bfloat16, and only of the last token of each row.
        logits_ms = self.gemm["bfloat16"].at(model.vocab_size // tp, model.hidden, rows)
        layer_ms += self.layer_ms + self.byte_ms * _activation_bytes(model, tp, tokens)
        return model.num_layers * layer_ms + logits_ms

    def _prefill_attention_ms(self, heads: tuple[int, int], rows: int, length: int) -> float:
        measured = min(length, LONGEST_MEASURED)
        return self.prefill[heads].at(rows, measured) * (length / measured) ** 2

    def fit_the_rest(self, rows: list[dict[str, str]]) -> float:
        """`layer_ms` and `byte_ms`, from composed step times. Returns the median relative error
        that is left."""
        features, missing = [], []
        for row in rows:
            model, tp, ms = MODELS[row["model"]], int(row["tp"]), float(row["ms"])
            rows_, new, end = _sizes(row)
            ours_ms = self.step_ms(model, row["gemm_dtype"], tp, rows_, new, end)
            num_bytes = _activation_bytes(model, tp, rows_ * new)
            features.append([model.num_layers / ms, model.num_layers * num_bytes / ms])
            missing.append((ms - ours_ms) / ms)
        found, *_ = np.linalg.lstsq(np.array(features), np.array(missing))
        self.layer_ms, self.byte_ms = (float(v) for v in found)
        assert min(found) > 0, "something is counted twice"
        return float(np.median(np.abs(np.array(features) @ found - np.array(missing))))


def _activation_bytes(model: ModelShape, tp: int, tokens: int) -> float:
    """What norms, rotations, residuals and the activation read and write in one layer."""
    return tokens * 2.0 * (8 * model.hidden + 3 * model.intermediate / tp)


def _sizes(row: dict[str, str]) -> tuple[int, int, int]:
    batch, size = int(row["batch"]), int(row["tokens_or_ctx"])
    return (batch, size, size) if row["phase"] == "prefill" else (batch, 1, size)


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return list(csv.DictReader(file))


def _points() -> Iterator[tuple[str, int, int, int]]:
    """(phase, rows, new tokens of each, context of each at the end). The same for all, even where
    not so much fits: what is fitted to them can be compared."""
    for tokens in PROMPTS:
        yield "prefill", 1, tokens, tokens
    for chunk in CHUNKS:
        for end in CHUNK_ENDS:
            if end > chunk:
                yield "chunk", 1, chunk, end
        for end in FAR_ENDS:
            yield "far chunk", 1, chunk, end
    for batch in BATCHES:
        for context in CONTEXTS:
            if batch * context <= MOST_CONTEXT:
                yield "decode", batch, 1, context


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    known = _rows(folder / "steptime_composed.csv.gz")
    lines = [",".join(COLUMNS)]
    for gpu in MEMORY_BYTES:
        kernels = Kernels.read(folder, gpu)
        error = kernels.fit_the_rest([row for row in known if row["gpu"] == gpu])
        print(
            f"{gpu}: {1e3 * kernels.layer_ms:.1f} us a layer and "
            f"{1e-9 / kernels.byte_ms:.2f} TB/s beside the kernels; median difference from the "
            f"known step times {100 * error:.1f}%",
            file=sys.stderr,
        )
        for dtype in DTYPE_BYTES.keys() & kernels.gemm.keys():
            for name, model in MODELS.items():
                for tp in TPS:
                    if kv_tokens(gpu, name, dtype, tp) < LEAST_KV_TOKENS:
                        continue
                    for phase, rows, new, end in _points():
                        ms = kernels.step_ms(model, dtype, tp, rows, new, end)
                        point = (gpu, name, dtype, tp, phase, rows, new, end, f"{ms:.5g}")
                        lines.append(",".join(str(v) for v in point))
    lines[1:] = sorted(lines[1:], key=_order)
    # No time stamp: the same input gives the same file.
    out.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))


def _order(line: str) -> tuple[object, ...]:
    return tuple(int(v) if v.isdigit() else v for v in line.split(",")[:-1])


if __name__ == "__main__":
    main()
