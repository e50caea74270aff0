"""Fit cost models to step times, for `--hardware` of simulate, plan and advise.

    python -m tools.fit_costs tests/data/gpu_step_times.csv.gz > src/penstock/loadgen/costs.json

Input: what `compose_step_times.py` writes. The terms are those of
`penstock.protocol.instance.CostModel`, five numbers for each GPU, model, dtype and TP; errors count
relative to the time; coefficients are not negative, so that more work never takes less time,
however far outside the data. Decode, prefill and chunks of a prefill count alike, whatever the
number of their points.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tools.gpu_models import MODELS, kv_tokens

TERMS = ("base_s", "per_token_s", "per_row_s", "per_context_token_s", "per_attention_s")
PHASES = ("decode", "prefill", "chunk", "far chunk")


class Point(NamedTuple):
    """`batch` sequences compute `new_tokens` each, and then have `context`."""

    phase: str
    batch: int
    new_tokens: int
    context: int
    seconds: float

    @property
    def features(self) -> list[float]:
        b, new, context = self.batch, self.new_tokens, self.context
        return [1.0, b * new, b, b * context, b * new * context]


class Name(NamedTuple):
    gpu: str
    model: str
    gemm_dtype: str
    tp: int

    def __str__(self) -> str:
        gpu, dtype = self.gpu.removesuffix("_sxm"), self.gemm_dtype.replace("bfloat16", "bf16")
        return f"{gpu}:{self.model}:{dtype}:tp{self.tp}"


def read(path: Path) -> dict[Name, list[Point]]:
    found: dict[Name, list[Point]] = {}
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            name = Name(row["gpu"], row["model"], row["gemm_dtype"], int(row["tp"]))
            sizes = int(row["batch"]), int(row["new_tokens"]), int(row["context"])
            point = Point(row["phase"], *sizes, float(row["ms"]) * 1e-3)
            found.setdefault(name, []).append(point)
    return found


def fit(points: Iterable[Point]) -> np.ndarray:
    """Coefficients in the order of `TERMS`, in seconds."""
    points = list(points)
    counts = {phase: sum(p.phase == phase for p in points) for phase in PHASES}
    weights = np.array([counts[p.phase] ** -0.5 for p in points])
    relative = np.array([p.features for p in points]) / seconds_of(points)[:, None]
    return non_negative(relative * weights[:, None], weights)


def predict(coefficients: np.ndarray, points: Iterable[Point]) -> np.ndarray:
    predicted: np.ndarray = np.array([p.features for p in points]) @ coefficients
    return predicted


def seconds_of(points: Iterable[Point]) -> np.ndarray:
    return np.array([p.seconds for p in points])


def non_negative(features: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The w >= 0 with the least |features @ w - wanted|: the plain least squares solution on some
    subset of the features (Lawson and Hanson, Solving Least Squares Problems, chapter 23). There
    are few: all are tried."""
    scale = np.abs(features).max(axis=0)
    features = features / np.where(scale, scale, 1.0)
    number = features.shape[1]
    best, least = np.zeros(number), float(wanted @ wanted)
    for mask in range(1, 1 << number):
        kept = [i for i in range(number) if mask >> i & 1 and scale[i]]
        found, *_ = np.linalg.lstsq(features[:, kept], wanted)
        left = float(((features[:, kept] @ found - wanted) ** 2).sum())
        if (found >= 0).all() and left < least:
            best, least = np.zeros(number), left
            best[kept] = found
    return best / np.where(scale, scale, 1.0)


def entry(name: Name, points: list[Point]) -> dict[str, Any]:
    """What stands in costs.json."""
    coefficients = np.array([float(f"{w:.4g}") for w in fit(points)])
    errors = np.abs(predict(coefficients, points) / seconds_of(points) - 1)
    phases = np.array([p.phase for p in points])
    return {
        **dict(zip(TERMS, coefficients.tolist())),
        "median_error": round(float(np.median(errors)), 3),
        "median_error_by_phase": {
            phase: round(float(np.median(errors[phases == phase])), 3) for phase in PHASES
        },
        "points": len(points),
        "kv_bytes_per_token": MODELS[name.model].kv_bytes_per_token,
        "kv_tokens": kv_tokens(*name),
        "gpus": name.tp,
    }


def costs(path: Path) -> dict[str, Any]:
    found = read(path)
    return {
        "about": {
            "source": "step times composed from kernel latencies of ai-dynamo/aiconfigurator "
            "095f58a (tools/compose_step_times.py)",
            "license": "Apache-2.0",
            "made_by": "tools/fit_costs.py",
        },
        "costs": {str(name): entry(name, found[name]) for name in sorted(found, key=str)},
    }


if __name__ == "__main__":
    json.dump(costs(Path(sys.argv[1])), sys.stdout, indent=1)
    print()
