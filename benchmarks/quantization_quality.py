"""What int8 and int4 cost in quality.

    python -m benchmarks.quantization_quality [--write]

Perplexity of the toy model on prose that it has not read (its eval_text.json), through the engine
that serves it: with this machine's kernels, which quantize activations to 8 bits too, and with the
linears dequantized, which leaves the share of their weights. And the relative error
|W - Q| / |W| of linears of Qwen3-0.6B's shapes, on random weights: normal ones, and a Student's t
with 4 degrees of freedom, which has outliers. --write keeps the figures in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from penstock.checkpoint import resolve
from penstock.engine.quantization.convert import quantize_checkpoint, relative_error
from penstock.engine.quantization.schemes import SCHEMES
from penstock.perplexity import eval_texts, perplexity_of

RESULT = Path(__file__).parent / "results" / "quantization-quality.json"
SHAPES = {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULT}")
    options = parser.parse_args()
    result = {
        "command": "python -m benchmarks.quantization_quality --write",
        "toy_perplexity": toy_perplexity(),
        "relative_error_on_random_weights": random_errors(),
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if options.write:
        RESULT.write_text(text, encoding="utf-8")


def toy_perplexity() -> dict[str, object]:
    toy = resolve("toy")
    texts = eval_texts(toy)

    def measure(model: str, quantization: str, dtype: str = "bfloat16") -> float:
        found, _ = perplexity_of(
            model, texts, quantization=quantization, dtype=dtype, kv_cache_bytes=256 << 20
        )
        return round(found, 4)

    found: dict[str, object] = {
        "float32": measure("toy", "none", "float32"),
        "bfloat16": measure("toy", "none"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for scheme in SCHEMES.values():
            out = Path(folder) / scheme.name
            quantize_checkpoint(toy, out, scheme)
            found[scheme.name] = measure(str(out), "auto")
            found[f"{scheme.name}, linears dequantized"] = measure(str(out), "none")
    return found


def random_errors() -> dict[str, dict[str, dict[str, float]]]:
    torch.manual_seed(0)
    student = torch.distributions.StudentT(torch.tensor(4.0))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, shape in SHAPES.items():
        drawn = {"normal": torch.randn(shape), "student_t4": student.sample(shape)}
        found[name] = {
            kind: {
                scheme.name: round(relative_error(weight, scheme.quantize(weight)), 5)
                for scheme in SCHEMES.values()
            }
            for kind, weight in drawn.items()
        }
    return found


if __name__ == "__main__":
    main()
