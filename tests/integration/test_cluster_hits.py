"""The hits that the service predicts are those that the engines have: a recorded load, real
processes, caches that overflow."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.cluster_hits import (
    BLOCK_TOKENS,
    MAX_MODEL_LEN,
    all_active,
    ask_all,
    plain_lru_hits,
    read_trace,
)

from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import running


def test_predicted_hits_are_actual_hits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", max_position_embeddings=MAX_MODEL_LEN)
    trace = [ids for ids in read_trace(200) if len(ids) < 200]
    # Every other request comes a second time, one conversation later: not all hits are of the
    # first block, and some blocks are gone again.
    trace = [ids for i in range(2, len(trace), 2) for ids in (trace[i], trace[i - 1], trace[i - 2])]
    trace = trace[:150]
    with running(
        str(tmp_path), "--dtype", "float32", "--served-model-name", "m", "--num-threads", "1",
        "--policy", "kv-aware", "--instances", "2", "--num-gpu-blocks-override", "300",
    ) as server:  # fmt: skip
        all_active(server, 2)
        asked = asyncio.run(ask_all(server.url, trace, at_once=1))
    assert [a.predicted_tokens for a in asked] == [a.actual_tokens for a in asked]
    hits = sum(a.actual_tokens for a in asked) // BLOCK_TOKENS
    assert len(trace) < hits <= plain_lru_hits(trace, 600)
    assert sum(map(len, trace)) > 600, "the caches overflow"
