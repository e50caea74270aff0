"""KV in int8 through the real engine: what it costs the toy model on prose it has not read."""

from __future__ import annotations

import pytest

from penstock.checkpoint import resolve
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
