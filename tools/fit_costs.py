"""Fit cost models to measured step times, for `penstock advise --hardware`.

    python tools/fit_costs.py steptime_composed.csv.gz > src/penstock/loadgen/costs.json

Input: gpu,model,gemm_dtype,tp,phase,batch,tokens_or_ctx,ms (composed from the kernel latencies that
ai-dynamo/aiconfigurator has measured; Apache-2.0). The terms are those of
`penstock.protocol.instance.CostModel`; errors count relative to the time, coefficients are not
negative.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections import defaultdict

import numpy as np

TERMS = ("base_s", "per_token_s", "per_row_s", "per_context_token_s", "per_attention_s")
#: Parameters, and bytes of KV a token (layers * 2 * KV heads * head dimension * 2 bytes).
MODELS = {
    "llama3.1-8b": (8.03e9, 32 * 2 * 8 * 128 * 2),
    "llama3.1-70b": (70.6e9, 80 * 2 * 8 * 128 * 2),
    "qwen3-8b": (8.19e9, 36 * 2 * 8 * 128 * 2),
    "qwen3-32b": (32.8e9, 64 * 2 * 8 * 128 * 2),
}
MEMORY_BYTES = {"a100_sxm": 80e9, "h100_sxm": 80e9, "h200_sxm": 141e9}
#: Of the memory, for weights and KV (vLLM's gpu_memory_utilization).
USED = 0.9


def main() -> None:
    groups: dict[tuple[str, ...], list[tuple[list[float], float]]] = defaultdict(list)
    with gzip.open(sys.argv[1], "rt") as file:
        for row in csv.DictReader(file):
            key = (row["gpu"], row["model"], row["gemm_dtype"], row["tp"])
            batch, size = float(row["batch"]), float(row["tokens_or_ctx"])
            new = batch * size if row["phase"] == "prefill" else batch
            terms = [1.0, new, batch, batch * size, new * size]
            groups[key].append((terms, float(row["ms"]) * 1e-3))
    costs = {}
    for (gpu, model, dtype, tp), points in sorted(groups.items()):
        name = f"{gpu.removesuffix('_sxm')}:{model}:{dtype.replace('bfloat16', 'bf16')}:tp{tp}"
        features = np.array([terms for terms, _ in points])
        seconds = np.array([s for _, s in points])
        weights = fit(features, seconds)
        error = np.abs(features @ weights - seconds) / seconds
        parameters, kv_bytes = MODELS[model]
        room = USED * MEMORY_BYTES[gpu] * int(tp) - parameters * (1 if dtype == "fp8" else 2)
        costs[name] = {
            **{term: float(f"{w:.4g}") for term, w in zip(TERMS, weights)},
            "median_error": round(float(np.median(error)), 3),
            "points": len(points),
            "kv_bytes_per_token": kv_bytes,
            "kv_tokens": int(room / kv_bytes),
            "gpus": int(tp),
        }
    about = {
        "source": "step times composed from kernel latencies of ai-dynamo/aiconfigurator 095f58a",
        "license": "Apache-2.0",
        "made_by": "tools/fit_costs.py",
    }
    json.dump({"about": about, "costs": costs}, sys.stdout, indent=1)
    print()


def fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Least squares of the relative error; terms that come out negative are left out in turn."""
    relative = features / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    kept = list(range(features.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(relative[:, kept] / scale[kept], np.ones(len(seconds)))
        if (found >= 0).all():
            weights = np.zeros(features.shape[1])
            weights[kept] = found / scale[kept]
            return weights
        del kept[int(found.argmin())]


if __name__ == "__main__":
    main()
