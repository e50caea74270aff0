"""The search behind `penstock plan`, against looking at every cluster there is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.loadgen.costs import InstanceModel
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.instance import CostModel
from penstock.simulator.planner import smaller
from penstock.simulator.planning import (
    KINDS,
    Candidate,
    Search,
    Shape,
    cheaper,
    larger,
    least_instances,
    prefill_share,
    reach,
)

WANTED = 0.9
MODEL = InstanceModel(
    "small", CostModel(4e-3, 2e-5, 1e-4, 1e-8, 1e-9), kv_tokens=100_000, kv_bytes_per_token=1000,
    step_tokens=256, max_running=16,
)  # fmt: skip


def everything(shapes: list[Shape], max_gpus: int) -> list[Candidate]:
    found = []
    for shape in shapes:
        for count in range(1, max_gpus // shape.gpus + 1):
            pds = ["off"] + (["auto"] if count > 1 else [])
            pds += [f"{p}:{count - p}" for p in range(1, count)]
            found += [Candidate(shape, count, pd) for pd in pds]
    return found


def search(
    shapes: list[Shape], max_gpus: int, attains: Callable[[Candidate], float]
) -> tuple[Search, int]:
    found, runs = Search(shapes, WANTED, max_gpus), 0
    while asked := found.wants():
        assert len(set(asked)) == len(asked) and not set(asked) & found.attained.keys()
        runs += len(asked)
        found.take({c: attains(c) for c in asked})
    return found, runs


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Shape], Callable[[Candidate], float]]:
    """More of a kind serve more; of splits, the nearer to the best one, the more."""
    share = st.floats(0.05, 0.95)
    shapes = [
        Shape(f"s{i}", draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1.0, 1.5, 2.7])),
              prefill_share=draw(share))
        for i in range(draw(st.integers(1, 3)))
    ]  # fmt: skip
    needs = {(s.hardware, kind): draw(st.integers(1, 40)) for s in shapes for kind in KINDS}
    ideal = {s.hardware: draw(share) for s in shapes}

    def attains(c: Candidate) -> float:
        able = float(c.count)
        if c.kind == "split":
            prefill, decode = (int(n) for n in c.pd.split(":"))
            best = ideal[c.shape.hardware]
            able = min(prefill / best, decode / (1 - best))
        return min(1.0, WANTED * able / needs[c.shape.hardware, c.kind])

    return shapes, attains


@given(worlds(), st.integers(1, 30))
@settings(max_examples=300)
def test_nothing_cheaper_would_have_done(world, max_gpus: int) -> None:
    shapes, attains = world
    found, runs = search(shapes, max_gpus, attains)
    able = [c for c in everything(shapes, max_gpus) if attains(c) >= WANTED]
    assert runs <= len(everything(shapes, max_gpus))
    assert all(attains(c) >= WANTED and c.gpus <= max_gpus for c in found.found())
    if able:
        assert found.found()[0].cost == min(c.cost for c in able)
    else:
        assert not found.found()


def test_a_large_search_takes_few_looks() -> None:
    shapes = [Shape(f"s{n}", 1, 1.0 + n / 10, prefill_share=0.4) for n in range(4)]

    def attains(c: Candidate) -> float:
        return min(1.0, 0.9 * c.count / 37)

    found, runs = search(shapes, 64, attains)
    assert found.found()[0].count == 37
    assert runs < len(everything(shapes, 64)) / 50


def test_kinds_of_gpu_that_can_only_cost_more_are_not_looked_at() -> None:
    cheap, dear = Shape("cheap", 1, 1.0), Shape("dear", 8, 5.0)
    found, _ = search([dear, cheap], 64, lambda c: 1.0)
    assert {c.shape for c in found.attained} == {cheap}


def test_the_lower_bound_is_where_it_begins() -> None:
    found, _ = search([Shape("a", 1, 1.0, least=5)], 64, lambda c: 1.0)
    assert {c.count for c in found.attained} == {5}


def test_of_equals_the_simplest_comes_first() -> None:
    found, _ = search([Shape("a", 1, 1.0)], 8, lambda c: 1.0 if c.count >= 3 else 0.1)
    assert [c.pd for c in found.found()] == ["off", "1:2", "auto"] or [
        c.pd for c in found.found()
    ] == ["off", "2:1", "auto"]


def test_what_comes_nearest_is_known_where_nothing_does() -> None:
    shapes = [Shape("a", 1, 1.0), Shape("b", 1, 2.0)]
    found, _ = search(shapes, 4, lambda c: (0.5 if c.shape.hardware == "b" else 0.3) * c.count / 4)
    nearest = found.nearest()
    assert not found.found() and nearest is not None
    assert (nearest.shape.hardware, nearest.count, nearest.pd) == ("b", 4, "off")
    assert Search([], WANTED, 8).nearest() is None
    assert Search([Shape("big", 16, 1.0)], WANTED, 8).wants() == []


def test_neighbours() -> None:
    a = Shape("a", 1, 1.0, prefill_share=0.5)
    one = Candidate(a, 1, "off")
    assert smaller(one) == []
    assert all(smaller(Candidate(a, 2, pd)) == [one] for pd in ("off", "auto", "1:1"))
    assert cheaper(Candidate(a, 2, "1:1"), {one: 0.3}) == (one, 0.3)
    assert [c.pd for c in smaller(Candidate(a, 4, "2:2"))] == ["1:2", "2:1"]
    assert larger(Candidate(a, 4, "1:3")).pd == "2:3" and larger(Candidate(a, 4, "3:1")).pd == "3:2"
    assert larger(Candidate(a, 4, "auto")) == Candidate(a, 5, "auto")
    tried = {Candidate(a, 3, "1:2"): 0.7, Candidate(a, 3, "2:1"): 0.8, Candidate(a, 3, "off"): 0.9}
    assert cheaper(Candidate(a, 4, "2:2"), tried) == (Candidate(a, 3, "2:1"), 0.8)
    assert cheaper(Candidate(a, 9, "off"), tried) is None


# --- closed forms ---------------------------------------------------------------------------------


def test_the_lower_bound_is_below_what_the_work_takes() -> None:
    """300 prompts of 2,000 tokens in 10 s: at least their tokens' own terms."""
    requests = [TraceRequest(n / 30, 2000, 1) for n in range(301)]
    least = least_instances(MODEL, requests, ttft_s=1.0, tpot_s=0.05, wanted=1.0)
    tokens_s = 301 * 2000 * (2e-5 + 4e-3 / 256)
    attention_s = 301 * 0.5 * 1e-9 * 2000**2
    assert least == math.ceil((tokens_s + attention_s) / (10 + 1.0))
    # Three instances as fast as that could do it in the time there is, in the best of worlds.
    alone_s = sum(MODEL.prefill_s(2000) for _ in requests)
    assert least * 11 <= alone_s + 11


def test_half_of_the_requests_need_half() -> None:
    requests = [TraceRequest(n / 10, 3000, 200) for n in range(1001)]
    all_of_them = least_instances(MODEL, requests, 1.0, 0.05, 1.0)
    half = least_instances(MODEL, requests, 1.0, 0.05, 0.5)
    assert half == pytest.approx(all_of_them / 2, abs=1)


def test_shared_prefixes_are_counted_once() -> None:
    apart = [TraceRequest(n / 10, 5120, 2, tuple(range(10 * n, 10 * n + 10))) for n in range(300)]
    shared = [TraceRequest(n / 10, 5120, 2, tuple(range(10))) for n in range(300)]
    assert least_instances(MODEL, apart, 1.0, 0.05, 1.0) > 1
    assert least_instances(MODEL, shared, 1.0, 0.05, 1.0) == 1


def test_what_is_in_reach() -> None:
    requests = [TraceRequest(0, 100, 50)] * 90 + [TraceRequest(0, 10_000, 50)] * 10
    all_of_it = reach([MODEL], requests, 10.0, 1.0, 0.9)
    assert all_of_it.share == 1.0 and all_of_it.ttft_s == pytest.approx(MODEL.prefill_s(10_000))
    short = reach([MODEL], requests, MODEL.prefill_s(100), 1.0, 0.9)
    assert short.share == pytest.approx(0.9)
    slow = reach([MODEL], requests, 10.0, 1e-3, 0.9)
    assert slow.share == 0.0 and slow.tpot_s > 4e-3
    one_token = [TraceRequest(0, 100, 1)]
    assert reach([MODEL], one_token, 10.0, 1e-3, 0.9).share == 1.0
    # A long prompt may be in a cache: then nobody knows how soon its first token can be.
    cached = [TraceRequest(n, 10_000, 5, tuple(range(20))) for n in range(3)]
    assert reach([MODEL], cached, 0.01, 1.0, 0.9).share == 1.0


def test_prompts_share_of_the_work() -> None:
    only_prompts = [TraceRequest(0, 4000, 1)] * 3
    only_answers = [TraceRequest(0, 1, 4000)] * 3
    assert prefill_share(MODEL, only_prompts, 0.05) > 0.99
    assert prefill_share(MODEL, only_answers, 0.05) < 0.01
    both = prefill_share(MODEL, [TraceRequest(0, 2000, 200)] * 3, 0.05)
    assert 0.05 < both < 0.95 and np.isfinite(both)
