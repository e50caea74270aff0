"""KV in int8 through the real engine: what it costs the toy model on prose it has not read."""

from __future__ import annotations

import pytest
import torch

from penstock.checkpoint import resolve
from penstock.engine.attention.base import AttentionRow, AttentionShape
from penstock.engine.attention.cpu_native import NativeCpuAttention
from penstock.engine.attention.reference import ReferenceAttention
from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.platforms.cpu import kernels
from penstock.perplexity import eval_texts, perplexity_of


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_perplexity_with_int8_kv(backend: str) -> None:
    texts = eval_texts(resolve("toy"))[::20]

    def perplexity(kv_cache_dtype: str) -> float:
        return perplexity_of(
            "toy",
            texts,
            dtype="float32",
            kv_cache_bytes=64 << 20,
            kv_cache_dtype=kv_cache_dtype,
            attention_backend=backend,
        )[0]

    exact, int8 = perplexity("auto"), perplexity("int8")
    assert int8 != exact
    assert int8 == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("backend", [NativeCpuAttention, ReferenceAttention])
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_seen(backend, spoilt):
    """Not rounded to a plausible zero."""
    if backend is NativeCpuAttention and kernels.load() is None:
        pytest.skip("needs a C++ compiler")
    memory = XTensorMemory(kv_layout(1, 2, 64, "int8"), 1, 1, 1)
    memory.map(0, 0, 0)
    attention = backend(AttentionShape(4, 2, 64, 0.1), memory)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 64, generator=gen).bfloat16() for n in (4, 2, 2))
    k[1, 0, 5] = v[1, 1, 7] = spoilt
    attention.plan([AttentionRow(0, 0, 3)])
    out_THD = attention.run(0, q, k, v)
    # A token's scale is one head's: nothing else is spoilt.
    assert out_THD[1:, :2].isnan().all() and out_THD[1:, 2:].isnan().any()
    memory.close()
