"""Linears against the machine and against torch: bytes of weights read and operations a second.

    python -m benchmarks.kernels [--threads 2] [--repeats 7] [--shapes 4096x1024] [--tokens 1,16]

Shapes are those of Qwen3-0.6B. Each kind of linear runs over as many copies of its weight as exceed
the cache. Kinds take turns, with a plain read of memory before each round; printed are medians of
the rounds: GB/s of the weights (scales included), TOP/s (two for a multiplication and its addition)
and in brackets the GB/s against the read of the same round. Ours are replayed as in a captured
step; torch's are called from Python, which is what they cost there. Activations are quantized
within the time of every int8 and int4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from penstock.engine.platforms.cpu import onednn, onednn_int8
from penstock.engine.platforms.cpu.graph import Program
from penstock.engine.platforms.cpu.platform import CpuPlatform
from penstock.engine.quantization.weight import QuantizedWeight

SHAPES = ("4096x1024", "1024x2048", "6144x1024", "1024x3072", "151936x1024")
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)
#: The head computes sampled rows alone.
MAX_HEAD_TOKENS = 64
HEAD_OUTPUTS = 100_000
GROUP_INPUTS = 128
#: In one turn, so that a turn at 1,024 tokens is not a minute.
MAX_TURN_PRODUCTS = 4e10

Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Kind:
    """One way to hold and multiply a weight."""

    name: str
    bits: float  # a weight, scales included
    make: Callable[[torch.Tensor], Linear]  # from bfloat16 [N, K]
    native: bool = False


def quantized(weight_NK: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Rounded to the nearest code: what is measured does not depend on how well."""
    rows, columns = weight_NK.shape
    groups = weight_NK.float().view(rows, -1, group_size)
    half = 1 << (bits - 1)
    scales = groups.abs().amax(-1) / (half - 1)
    codes = ((groups / scales[..., None]).round() + half).to(torch.uint8)
    return QuantizedWeight(bits, group_size, codes.view(rows, columns), scales)


def kinds(platform: CpuPlatform) -> Iterator[Kind]:
    native = platform.ops is not None

    def few_bits(bits: int, group: int | None = None) -> Callable[[torch.Tensor], Linear]:
        return lambda weight_NK: platform.make_quantized_linear(
            quantized(weight_NK, bits, group or weight_NK.shape[1]), None, torch.bfloat16
        )

    yield Kind("bf16", 16, platform.make_linear, native)
    yield Kind("int8", 8, few_bits(8), native)
    yield Kind("int4", 4 + 16 / GROUP_INPUTS, few_bits(4, GROUP_INPUTS), native)
    yield Kind("torch bf16", 16, lambda w: lambda x: functional.linear(x, w))
    if onednn.cannot_pack(torch.bfloat16) is None:
        yield Kind("onednn bf16", 16, onednn.PackedLinear)
    if onednn_int8.refusal() is None:
        yield Kind(
            "onednn int8", 8, lambda w: onednn_int8.OneDnnInt8Linear(quantized(w, 8, w.shape[1]))
        )


class Contender:
    """A kind over several copies of one weight."""

    def __init__(
        self, platform: CpuPlatform, kind: Kind, weight_NK: torch.Tensor, cold_bytes: int
    ) -> None:
        self.kind = kind
        self._platform = platform
        self._products = weight_NK.numel()
        self._bytes = weight_NK.numel() * kind.bits / 8
        copies = -(-cold_bytes // int(self._bytes))
        self._linears = [kind.make(weight_NK.clone()) for _ in range(copies)]

    def prepare(self, x_TK: torch.Tensor) -> None:
        """Fix the input; a native kind is written down as one program."""
        num_tokens = len(x_TK)
        copies = max(1, int(MAX_TURN_PRODUCTS / (self._products * num_tokens)))
        linears = self._linears[:copies]
        self._scale = num_tokens * self._products * len(linears), self._bytes * len(linears)
        ops = self._platform.ops
        if not self.kind.native or ops is None:
            self._turn: Callable[[], object] = lambda: [apply(x_TK) for apply in linears]
            return
        program = Program(ops)
        ops.recorder = program
        try:
            for apply in linears:
                apply(x_TK)
        finally:
            ops.recorder = None
        program.close()
        self._turn = lambda: program.replay(num_tokens)

    def turn(self) -> tuple[float, float]:
        """(bytes/s, operations/s)"""
        products, num_bytes = self._scale
        taken_s = seconds(self._turn)
        return num_bytes / taken_s, 2 * products / taken_s


def seconds(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def measure(contenders: list[Contender], buffer: torch.Tensor, repeats: int) -> tuple[float, str]:
    """(median bytes/s of plain reads, a cell for each contender)"""
    for each in contenders:
        each.turn()
    reads: list[float] = []
    turns: dict[str, list[tuple[float, float, float]]] = {c.kind.name: [] for c in contenders}
    for _ in range(repeats):
        read = buffer.nbytes / min(seconds(buffer.sum) for _ in range(2))
        reads.append(read)
        for each in contenders:
            bytes_per_s, operations_per_s = each.turn()
            turns[each.kind.name].append((bytes_per_s, operations_per_s, bytes_per_s / read))
    cells = []
    for rounds in turns.values():
        gb, top, share = (statistics.median(column) for column in zip(*rounds, strict=True))
        cells.append(f"{gb / 1e9:6.1f} {top / 1e12:6.3f} ({share:4.2f})")
    return statistics.median(reads), "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--kinds", help="some of the names, separated by commas")
    parser.add_argument("--cold-mib", type=int, default=160, help="of weights, beyond the cache")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    platform = CpuPlatform()
    chosen = [
        kind
        for kind in kinds(platform)
        if options.kinds is None or kind.name in options.kinds.split(",")
    ]
    buffer = torch.ones(1 << 26)
    print(f"{options.threads} threads; {platform.kernels()}")
    for shape in options.shapes.split(","):
        outputs, inputs = map(int, shape.split("x"))
        weight_NK = torch.randn(outputs, inputs).bfloat16()
        cold_bytes = options.cold_mib << 20
        contenders = [Contender(platform, kind, weight_NK, cold_bytes) for kind in chosen]
        header = "  ".join(f"{kind.name:>20}" for kind in chosen)
        print(f"\n[{outputs}, {inputs}]\n     M  read  {header}", flush=True)
        for num_tokens in map(int, options.tokens.split(",")):
            if outputs > HEAD_OUTPUTS and num_tokens > MAX_HEAD_TOKENS:
                continue
            x_TK = torch.randn(num_tokens, inputs).bfloat16()
            for each in contenders:
                each.prepare(x_TK)
            read, cells = measure(contenders, buffer, options.repeats)
            print(f"{num_tokens:6} {read / 1e9:5.1f}  {cells}", flush=True)


if __name__ == "__main__":
    main()
