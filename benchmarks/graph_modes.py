"""What the form of a step is worth: eager, captured, and compiled by Inductor.

    python -m benchmarks.graph_modes [--models toy,0.6b,1.7b] [--tokens 1,4,16,64] [--out FILE]

Everything of a step but attention (which is the same kernel in all forms) over random weights: the
small operations and linears of all layers. "eager" is our kernels called one by one from Python,
"captured" the same calls replayed as one program, "compiled" is torch.compile with the number of
tokens dynamic and `freezing` (weights are constants and re-ordered for oneDNN), layer by layer; its
time to compile is shown, and "again" is the same from Inductor's own cache in a new process.
Medians of alternated repeats; a read-bandwidth probe beside each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch.nn import functional

from penstock.engine.platforms.cpu.platform import CpuPlatform


@dataclass(frozen=True)
class Dimensions:
    layers: int
    hidden: int
    inner: int
    qkv: int
    attention: int

    @property
    def weight_bytes(self) -> int:
        a_layer = self.qkv + self.attention + 3 * self.inner
        return 2 * self.layers * self.hidden * a_layer


MODELS = {
    "toy": Dimensions(8, 256, 768, 512, 256),
    "0.6b": Dimensions(28, 1024, 3072, 4096, 2048),
    "1.7b": Dimensions(28, 2048, 6144, 4096, 2048),
    "4b": Dimensions(36, 2560, 9728, 6144, 4096),
}
Step = Callable[[torch.Tensor], torch.Tensor]


class Weights:
    """Of all layers, drawn once for a model."""

    def __init__(self, dims: Dimensions) -> None:
        gen = torch.Generator().manual_seed(0)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=torch.bfloat16).uniform_(
                -0.03, 0.03, generator=gen
            )

        h = dims.hidden
        self.norm_E = torch.ones(h, dtype=torch.bfloat16)
        self.layers = [
            (
                matrix(dims.qkv, h),
                matrix(h, dims.attention),
                matrix(2 * dims.inner, h),
                matrix(h, dims.inner),
            )
            for _ in range(dims.layers)
        ]


def ours(dims: Dimensions, weights: Weights) -> tuple[CpuPlatform, Step]:
    platform = CpuPlatform()
    layers = [tuple(platform.make_linear(each) for each in layer) for layer in weights.layers]
    norm_E = weights.norm_E
    matrix_VE = torch.randn(1024, dims.hidden).bfloat16()

    def step(ids_T: torch.Tensor) -> torch.Tensor:
        hidden_TE = platform.embedding(ids_T, matrix_VE)
        normed_TE = platform.rms_norm(hidden_TE, norm_E, 1e-6)
        for qkv, out, gate_up, down in layers:
            heads_TA = qkv(normed_TE)[:, : dims.attention]  # where attention would stand
            normed_TE = platform.add_rms_norm_(hidden_TE, out(heads_TA), norm_E, 1e-6)
            share_TE = down(platform.silu_mul(gate_up(normed_TE)))
            normed_TE = platform.add_rms_norm_(hidden_TE, share_TE, norm_E, 1e-6)
        return normed_TE

    return platform, step


class Block(torch.nn.Module):
    """A layer without attention in plain torch, its weights constants to Inductor."""

    def __init__(self, matrices: tuple[torch.Tensor, ...], norm_E: torch.Tensor) -> None:
        super().__init__()
        self.qkv, self.out, self.gate_up, self.down, self.norm_E = (
            torch.nn.Parameter(each, requires_grad=False) for each in (*matrices, norm_E)
        )

    def forward(self, hidden: torch.Tensor, normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = functional.linear(normed, self.qkv)[:, : self.out.shape[1]]
        hidden = hidden + functional.linear(heads, self.out)
        gate, up = functional.linear(norm(hidden, self.norm_E), self.gate_up).chunk(2, -1)
        hidden = hidden + functional.linear(functional.silu(gate) * up, self.down)
        return hidden, norm(hidden, self.norm_E)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    f = x.float()
    return weight * (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def compiled(dims: Dimensions, weights: Weights) -> Step:
    """One compilation a layer: with `freezing` Inductor re-orders the weights for oneDNN, which it
    does for constants only."""
    torch._inductor.config.freezing = True
    torch._dynamo.config.accumulated_recompile_limit = 8 * dims.layers
    torch._dynamo.config.recompile_limit = 8 * dims.layers
    blocks = [
        torch.compile(Block(layer, weights.norm_E).eval(), dynamic=True) for layer in weights.layers
    ]
    matrix_VE = torch.randn(1024, dims.hidden).bfloat16()

    def step(ids_T: torch.Tensor) -> torch.Tensor:
        hidden_TE = functional.embedding(ids_T, matrix_VE)
        normed_TE = norm(hidden_TE, weights.norm_E)
        for block in blocks:
            hidden_TE, normed_TE = block(hidden_TE, normed_TE)
        return normed_TE

    return torch.inference_mode()(step)


def median_s(call: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        call()
        found.append(time.perf_counter() - started_s)
    return statistics.median(found)


def measure(name: str, tokens: list[int], repeats: int) -> dict[str, Any]:
    dims = MODELS[name]
    weights = Weights(dims)
    platform, eager = ours(dims, weights)
    captured = platform.capture(lambda ids_T, _: eager(ids_T), max(tokens))
    inductor = compiled(dims, weights)
    started_s = time.perf_counter()
    try:
        for count in (2, 3):  # a size, and the proof that it is dynamic
            inductor(torch.arange(count))
    except Exception as exc:
        print(f"  {name}: Inductor cannot: {exc}", file=sys.stderr)
        inductor = None
    compile_s = time.perf_counter() - started_s
    buffer = torch.ones(1 << 27)
    result: dict[str, Any] = {"dimensions": asdict(dims), "compile_s": compile_s, "steps": {}}
    for count in tokens:
        ids_T = torch.arange(count)
        forms: dict[str, Callable[[], Any]] = {
            "eager": lambda ids_T=ids_T: eager(ids_T),
            "captured": lambda ids_T=ids_T: captured(ids_T, ids_T),
        }
        if inductor is not None:
            forms["compiled"] = lambda ids_T=ids_T: inductor(ids_T)
        assert torch.equal(forms["eager"](), forms["captured"]())
        rounds: dict[str, list[float]] = {form: [] for form in (*forms, "read_gb_s")}
        for _ in range(repeats):
            for form, call in forms.items():
                call()
                rounds[form].append(1e3 * median_s(call, 3))
            rounds["read_gb_s"].append(buffer.numel() * 4 / median_s(buffer.sum, 3) / 1e9)
        found = {form: statistics.median(values) for form, values in rounds.items()}
        found["floor_ms"] = dims.weight_bytes / found["read_gb_s"] / 1e6
        for form in forms:
            if form != "eager":
                pairs = zip(rounds[form], rounds["eager"], strict=True)
                found[f"{form}_over_eager"] = statistics.median(a / b for a, b in pairs)
        result["steps"][count] = found
        print(f"{name:5} {count:4} tokens  " + "  ".join(f"{k} {v:.3g}" for k, v in found.items()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="toy,0.6b,1.7b")
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokens = [int(each) for each in options.tokens.split(",")]
    results = {}
    for name in options.models.split(","):
        results[name] = measure(name, tokens, options.repeats)
        if not options.one:
            command = [sys.executable, "-m", "benchmarks.graph_modes", "--one", "--models", name]
            command += ["--tokens", "1", "--repeats", "1", "--out", "/dev/stdout"]
            again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = json.loads(again[again.index("{") :])
            results[name]["compile_again_s"] = found[name]["compile_s"]
            print(f"{name:5} compile {results[name]['compile_s']:.1f} s, ", end="")
            print(f"again {results[name]['compile_again_s']:.1f} s")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
