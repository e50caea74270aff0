"""Reports of simulations: the numbers against closed forms, the page against a parser."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import penstock.simulator.report as package
from penstock.simulator.crew import Task
from penstock.simulator.gaps import GapHistogram
from penstock.simulator.outcome import Outcome, RoleChange, Sample
from penstock.simulator.planner import Measure
from penstock.simulator.report import table
from penstock.simulator.report.comparison import sweep
from penstock.simulator.report.html import NO_PLOTS, find_plots, render, to_json
from penstock.simulator.report.metrics import metrics, rate_at, usd_per_hour
from penstock.simulator.spec import ClusterSpec, PoolSpec

H100, TP4 = "h100:llama3.1-8b:bf16:tp1", "h100:llama3.1-70b:bf16:tp4"


def spec(**more: Any) -> ClusterSpec:
    values: dict[str, Any] = dict(
        pools=(PoolSpec(name="a", count=2, hardware=H100, gpu_hour_usd=2.0),
               PoolSpec(name="b", count=1, hardware=TP4, gpu_hour_usd=3.0)),
        pd="auto", ttft_slo_s=1.0, tpot_slo_s=0.05,
    )  # fmt: skip
    return ClusterSpec(**(values | more))


def outcome(cluster: ClusterSpec | None = None) -> Outcome:
    """Six requests in 10 s: two good, one late, one slow, one refused, one that failed half-way."""
    nan = np.nan
    gaps = GapHistogram()
    gaps.add(0.01, 98)
    gaps.add(0.5, 2)
    roles = ("prefill", "decode", "any")
    return Outcome(
        spec=cluster or spec(),
        seed=7,
        mode="exact",
        instances=("a-0", "a-1", "b-0"),
        arrival_s=np.array([0.0, 2, 4, 6, 8, 10]),
        first_s=np.array([0.1, 2.3, 6.0, 6.5, nan, 10.5]),
        end_s=np.array([0.1, 2.7, 6.2, 8.5, nan, nan]),
        input_tokens=np.array([100.0, 300, 100, 100, 100, 100]),
        output_tokens=np.array([1.0, 11, 21, 21, 0, 5]),
        cached_tokens=np.array([0.0, 150, 0, 0, 0, 0]),
        finish=["stop", "length", "length", "stop", "refused", "error"],
        samples=[
            Sample(t, roles if t < 6 else ("decode", "decode", "any"),
                   np.array([0.5, 1.0, 0.0]), np.array([1, 2, 0]), np.array([0, 3, 0]),
                   np.array([0.1, 0.2 if t < 6 else 0.4, 0.0]))
            for t in range(-2, 14)
        ],
        role_changes=[RoleChange(-1.0, "a-0", "prefill"), RoleChange(6.0, "a-0", "decode")],
        handovers=2,
        preemptions=3,
        gaps=gaps,
        events=1000,
        wall_s=0.5,
        digest="abc",
    )  # fmt: skip


def test_numbers_are_what_their_definitions_say() -> None:
    found = metrics(outcome(), speed=2.0)
    assert (found["requests"], found["answered"], found["refused"], found["failed"]) == (6, 4, 1, 1)
    assert found["seconds"] == 10 and found["rate_per_s"] == 0.6
    # In SLO: the first, which has no TPOT, and the second, with 0.4 s for 10 tokens.
    assert found["attainment"] == pytest.approx(2 / 6)
    assert found["goodput_per_s"] == pytest.approx(0.2)
    assert found["goodput_tokens_per_s"] == pytest.approx(12 / 10)
    assert found["output_tokens_per_s"] == pytest.approx(54 / 10)
    assert found["ttft_s"]["p50"] == pytest.approx(np.median([0.1, 0.3, 2.0, 0.5]))
    assert found["tpot_s"]["p99"] == pytest.approx(np.percentile([0.04, 0.01, 0.1], 99))
    assert found["gap_p99_s"] == pytest.approx(0.5, rel=0.02)
    assert found["kv_hit_rate"] == pytest.approx(150 / 600)
    assert found["role_changes"] == [{"at_s": 6.0, "instance": "a-0", "role": "decode"}]
    assert found["simulated"]["seconds_per_wall_s"] == pytest.approx(26)


def test_a_rate_is_requests_over_the_time_that_they_came_in() -> None:
    short = outcome()
    short.arrival_s = short.arrival_s / 50  # all within 0.2 s
    assert metrics(short)["rate_per_s"] == pytest.approx(6 / 0.2)
    short.arrival_s = short.arrival_s * 0
    at_once = metrics(short)
    assert at_once["rate_per_s"] is None and sweep([at_once, at_once | {"speed": 2.0}]) == []
    assert table.NONE in table.cells(at_once)


def test_what_was_held_where_the_slo_was_not() -> None:
    # TTFTs of 0.1, 0.3, 2.0, 0.5, never and 0.5 s; TPOTs of 0.04, 0.01, 0.1 s.
    assert outcome().held_s(0.5) == pytest.approx((0.5, 0.04))
    assert outcome().held_s(0.9) == pytest.approx((np.inf, 0.1))
    said = table.pool_lines(metrics(outcome()))[-1]
    assert "90% of the requests never came to one, and 90% had a TPOT of up to 100 ms" in said
    lax = metrics(outcome(spec(ttft_slo_s=None, tpot_slo_s=None)))
    assert not any("90%" in line for line in table.pool_lines(lax))


def test_utilisation_is_by_pool_and_by_role() -> None:
    use = metrics(outcome())["utilisation"]
    assert use["mean"] == pytest.approx(0.5)
    a, b = use["pools"]
    assert a["busy"] == pytest.approx(0.75) and b["busy"] == 0.0
    assert a["kv_used_max"] == 0.4
    by_role = {r["role"]: r for r in use["roles"]}
    assert by_role["prefill"]["instances_mean"] == pytest.approx(0.5)  # 5 of 10 samples
    assert by_role["prefill"]["busy"] == pytest.approx(0.5)
    assert by_role["decode"]["busy"] == pytest.approx((15 * 1.0 - 5 * 0.5) / 15)


def test_a_cluster_that_falls_behind_is_paid_until_its_last_answer() -> None:
    late = outcome()
    late.end_s[3] = 40.0
    late.samples += [
        Sample(t, late.samples[-1].roles, np.zeros(3), *[np.zeros(3)] * 3) for t in range(14, 41)
    ]
    usual, found = metrics(outcome()), metrics(late)
    assert (found["seconds"], found["span_s"]) == (10, 40)
    assert found["rate_per_s"] == usual["rate_per_s"]  # what is offered stays that
    for name in ("output_tokens_per_s", "goodput_per_s", "goodput_tokens_per_s"):
        assert found[name] == pytest.approx(usual[name] / 4)
    for name in ("usd_per_million_output_tokens", "usd_per_million_tokens"):
        assert found["cost"][name] == pytest.approx(usual["cost"][name] * 4)
    assert found["utilisation"]["mean"] == pytest.approx(0.5 * 13 / 40)
    # A plan's price for a million tokens goes by the same span.
    measured = [Measure(0.9)(o, Task(spec=o.spec)).output_tokens_per_s for o in (outcome(), late)]
    assert measured[1] == pytest.approx(measured[0] / 4)


def test_tokens_have_a_price_where_gpus_have_one() -> None:
    cluster = spec()
    assert usd_per_hour(cluster) == 2 * 2.0 + 4 * 3.0
    cost = metrics(outcome())["cost"]
    assert cost["usd_per_million_output_tokens"] == pytest.approx(16 * 10 / 3600 / 54 * 1e6)
    assert cost["usd_per_million_tokens"] == pytest.approx(16 * 10 / 3600 / 654 * 1e6)
    without = spec(pools=(PoolSpec(name="a", count=3, hardware=H100),))
    assert metrics(outcome(without))["cost"] is None


def test_what_does_not_exist_is_none_and_the_report_is_strict_json() -> None:
    nothing = outcome(spec(ttft_slo_s=None, tpot_slo_s=None))
    nothing.finish = ["refused"] * 6
    nothing.first_s[:] = np.nan
    nothing.output_tokens[:] = 0
    nothing.samples = []
    found = metrics(nothing)
    assert found["attainment"] is None and found["goodput_per_s"] is None
    assert set(found["ttft_s"].values()) == {None} and found["kv_hit_rate"] is None
    assert found["cost"]["usd_per_million_output_tokens"] is None
    json.loads(to_json(report([found])))
    assert "–" in render(report([found]))


def test_where_attainment_falls_below() -> None:
    assert rate_at([(1, 1.0), (3, 0.8), (2, 1.0)], 0.9) == pytest.approx(2.5)
    assert rate_at([(1, 0.9), (2, 0.5)], 0.9) == 1
    assert rate_at([(1, 1.0), (2, 0.8), (3, 0.95), (4, 0.1)], 0.9) == pytest.approx(1.5)
    assert rate_at([(1, 1.0), (2, 0.95)], 0.9) is None
    assert rate_at([(1, 0.5), (2, 0.4)], 0.9) is None


def test_gaps_are_read_back_within_their_buckets() -> None:
    gaps = GapHistogram()
    assert gaps.quantile(0.99) == 0.0
    drawn = np.random.default_rng(1).lognormal(-4, 1, 5000)
    for gap_s in drawn:
        gaps.add(float(gap_s))
    for share in (0.01, 0.5, 0.99, 1.0):
        exact = np.quantile(drawn, share, method="inverted_cdf")
        assert gaps.quantile(share) == pytest.approx(exact, rel=0.011)
    gaps.add(0.0, 10**9)
    assert gaps.quantile(0.5) == 0.0


# --- pages ----------------------------------------------------------------------------------------


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "about": {
            "penstock": "0", "trace": "t.csv", "window_s": None, "requests": 6,
            "trace_seconds": 10.0, "mean_input_tokens": 1.0, "mean_output_tokens": 2.0,
            "cluster_name": "<script>alert('x')</script>", "cluster": "name: <b>&amp;",
            "instances": 3, "gpus": 6, "slo": {"ttft_s": 1.0, "tpot_s": None},
        },
        "runs": runs,
        "sweep": sweep(runs),
        "unmet": ["nobody <holds> it"],
    }  # fmt: skip


def several() -> list[dict[str, Any]]:
    evil = "p<i>$x^2$&"
    cluster = spec(pools=(PoolSpec(name=evil, count=3, hardware=H100),))
    runs = []
    for speed in (1.0, 2.0, 3.0):
        found = outcome(cluster)
        found.instances = tuple(f"{evil}-{n}" for n in range(3))
        found.arrival_s = found.arrival_s / speed
        runs.append(metrics(found, speed))
    return runs


class Page(HTMLParser):
    """Text, tags that are open, ids, and where it would fetch from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_holds_every_number_of_the_table() -> None:
    runs = several()
    page = Page(render(report(runs)))
    assert page.open == []
    text = "\n".join(page.text)
    for run in runs:
        for cell in table.cells(run):
            assert cell in text
        for line in table.pool_lines(run):
            assert line in text
    for line in table.sweep_lines(report(runs)):
        assert line in text
    assert "nobody <holds> it" in text
    assert "6.0 s" in text and "is decode" in text and "name: <b>&amp;" in text


def test_the_page_needs_nothing_else_and_names_stay_names() -> None:
    pytest.importorskip("matplotlib")
    html = render(report(several()))
    page = Page(html)
    assert "svg" in page.tags and NO_PLOTS not in html
    assert not page.tags & {"script", "i", "b", "img", "link", "iframe"}
    assert all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert "p<i>$x^2$&-0" in "".join(page.text)
    assert "currentColor" in html and "#010203" not in html
    assert html == render(report(several()))


def test_a_large_cluster_is_counted_by_role() -> None:
    pytest.importorskip("matplotlib")
    large = outcome(spec(pools=(PoolSpec(name="a", count=60, hardware=H100),)))
    large.instances = tuple(f"a-{n}" for n in range(60))
    one = large.samples[0]
    large.samples = [
        Sample(t, ("prefill",) * 20 + ("decode",) * 40, *(np.tile(x, 20) for x in (
            one.busy, one.running, one.waiting, one.kv_used)))
        for t in range(1, 700)
    ]  # fmt: skip
    found = metrics(large)
    assert "instances" not in found["timeline"] and len(found["timeline"]["at_s"]) <= 300
    assert set(found["timeline"]["roles"]) == {"prefill", "decode"}
    assert found["timeline"]["running"][0] == 60
    assert "<svg" in render(report([found]))


def test_without_matplotlib_the_page_says_how_to_get_plots(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "penstock.simulator.report.plots", raising=False)
    monkeypatch.delattr(package, "plots", raising=False)
    runs = several()
    page = Page(render(report(runs)))
    assert "svg" not in page.tags and NO_PLOTS in "".join(page.text)
    assert all(cell in "".join(page.text) for cell in table.cells(runs[0]))
    assert find_plots() is None
