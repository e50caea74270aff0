"""`penstock simulate` and `penstock plan` from the command line, with the example that comes along
and with what people get wrong."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.cli import main, plan, simulate
from penstock.protocol.errors import ConfigError
from penstock.simulator.prices import DEFAULT_USD, prices_of
from penstock.simulator.report import html

EXAMPLES = Path(__file__).parents[2] / "examples"
CLUSTER, TRACE = str(EXAMPLES / "simulate.yaml"), str(EXAMPLES / "azure_code_5min.csv")
#: Llama 3.1 8B on something slow, so that small tests need several instances.
SLOW = dict(base_s=0.02, per_token_s=1e-4, per_row_s=2e-4, kv_tokens=40_000, kv_bytes_per_token=9)
HEAD = "arrival_s,input_tokens,output_tokens\n"


def run_json(run: Any, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Standard output is the report and nothing else."""
    assert run([*words, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, str]:
    """A cluster of two slow instances, and 60 requests in 12 s."""
    (tmp_path / "slow.json").write_text(json.dumps(SLOW))
    (tmp_path / "c.yaml").write_text(
        "pools: [{name: s, count: 2, hardware: slow.json, gpu-hour-usd: 1.5}]\n"
        "slo: {ttft: 400ms, tpot: 60ms}\npd: off\n"
    )
    rows = [f"{n * 0.2:.1f},{200 + 37 * n % 900},{5 + n % 20}" for n in range(60)]
    (tmp_path / "t.csv").write_text(HEAD + "\n".join(rows) + "\n")
    return str(tmp_path / "c.yaml"), str(tmp_path / "t.csv")


def test_the_example_runs_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [CLUSTER, "--trace", TRACE, "--window", "30s", "--out", str(tmp_path / "new" / "out")]
    assert simulate.run(flags) == 0
    captured = capsys.readouterr()
    report = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
    (run,) = report["runs"]
    assert run["requests"] == run["answered"] == report["about"]["requests"] > 100
    assert run["attainment"] > 0.9 and run["cost"]["usd_per_million_output_tokens"] > 0
    assert (run["policy"], run["pd"], run["mode"]) == ("slo-aware", "auto", "exact")
    assert f"{100 * run['attainment']:.1f}%" in captured.out and "four H100s" in captured.out
    assert str(tmp_path / "new" / "out" / "report.html") in captured.out
    assert "<title>Simulation: four H100s</title>" in (
        tmp_path / "new" / "out" / "report.html"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("there", [True, False])
def test_missing_plots_are_said_to_be_where_the_report_is(
    small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch,
    there: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(html, "find_plots", lambda: None)
    monkeypatch.setattr(simulate, "find_plots", lambda: html if there else None)
    assert simulate.run([small[0], "--trace", small[1], "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    command = re.search(r"without plots: (.*) -m pip install matplotlib", said)
    assert (command is None) == there
    if command:
        assert Path(*shlex.split(command[1])).samefile(sys.executable)


def test_setups_are_compared_each_with_each(
    small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cluster, trace = small
    flags = ["--trace", trace, "--policy", "least-load,slo-aware", "--pd", "off,1:1"]
    found = run_json(simulate.run, capsys, cluster, *flags, "--jobs", "1")
    assert [(r["policy"], r["pd"]) for r in found["runs"]] == [
        ("least-load", "off"), ("least-load", "1:1"), ("slo-aware", "off"), ("slo-aware", "1:1"),
    ]  # fmt: skip
    assert not found["sweep"] and not (tmp_path / "simulate-report").exists()
    # Processes change nothing but the time it takes.
    again = run_json(simulate.run, capsys, cluster, *flags, "--jobs", "2")
    assert [without_time(r) for r in found["runs"]] == [without_time(r) for r in again["runs"]]


def without_time(run: dict[str, Any]) -> dict[str, Any]:
    simulated = {k: v for k, v in run["simulated"].items() if k in ("events", "digest")}
    return run | {"simulated": simulated}


def test_speeds_are_a_sweep_and_the_rate_at_90_percent_lies_between(
    small: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, trace = small
    flags = [cluster, "--trace", trace, "--speed", "1,2,8", "--jobs", "1"]
    found = run_json(simulate.run, capsys, *flags)
    (line,) = found["sweep"]
    rates = [p["rate_per_s"] for p in line["points"]]
    assert rates == pytest.approx([rates[0] * s for s in (1, 2, 8)])
    shares = [p["attainment"] for p in line["points"]]
    assert shares[0] > 0.9 > shares[-1]
    assert rates[0] < line["rate_per_s"] < rates[-1]
    assert simulate.run([*flags, "--out", str(Path(trace).parent)]) == 0
    assert f"up to {line['rate_per_s']:.2f} req/s" in capsys.readouterr().out


def test_an_slo_that_is_not_met_is_said_with_what_would_meet_it(
    small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No instance is faster than its step (20.3 ms); queues are a matter of how many there are."""
    cluster, trace = Path(small[0]), small[1]
    usual = cluster.read_text()
    flags = [str(cluster), "--trace", trace, "--out", str(tmp_path / "out")]
    cluster.write_text(usual.replace("tpot: 60ms", "tpot: 2ms"))
    (said,) = run_json(simulate.run, capsys, *flags)["unmet"]
    assert said.startswith("no number of these instances holds TTFT 400 ms and TPOT 2 ms for 90%")
    assert "at best TTFT 120 ms and TPOT 20.3 ms" in said
    assert simulate.run(flags) == 0
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "report.html").read_text()

    cluster.write_text(usual)
    found = run_json(simulate.run, capsys, *flags, "--speed", "1,8")
    assert found["unmet"] == [] and found["floor"]["share"] == 1.0
    found = run_json(simulate.run, capsys, *flags, "--speed", "8")
    (said,), (run,) = found["unmet"], found["runs"]
    assert said.startswith("nothing here keeps 90% of the requests within the SLO")
    # Asked for the TTFT that 90% had, where the TPOT was kept anyway, 90% keep both. (With another
    # TPOT steps would be paced otherwise.)
    assert run["held"]["tpot_s"] <= 0.06
    asked = f"{1e3 * run['held']['ttft_s'] + 1e-6:.6f}ms"
    cluster.write_text(usual.replace("400ms", asked))
    again = run_json(simulate.run, capsys, *flags, "--speed", "8")
    assert 0.9 <= again["runs"][0]["attainment"] > run["attainment"]


def test_one_seed_one_history(small: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    cluster, trace = small
    digests = [
        run_json(simulate.run, capsys, cluster, "--trace", trace, "--seed", seed)["runs"][0][
            "simulated"
        ]["digest"]
        for seed in ("3", "3", "4")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_scale_mode_comes_to_the_same(
    small: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, trace = small
    exact, scale = (
        run_json(simulate.run, capsys, cluster, "--trace", trace, "--mode", mode)["runs"][0]
        for mode in ("exact", "scale")
    )
    assert scale["attainment"] == pytest.approx(exact["attainment"], abs=0.02)
    assert scale["ttft_s"]["p50"] == pytest.approx(exact["ttft_s"]["p50"], rel=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "which trace"),
        (["--trace", "nothing.csv"], "nothing.csv cannot be read"),
        (["--trace", TRACE, "--speed", "0"], "--speed 0 has to be more than 0"),
        (["--trace", TRACE, "--speed", "1,,2"], "empty word"),
        (["--trace", TRACE, "--speed", "fast"], "--speed fast is not a number"),
        (["--trace", TRACE, "--policy", "best"], "choose one of round-robin"),
        (["--trace", TRACE, "--pd", "9:9"], "there are 4 instances"),
        (["--trace", TRACE, "--pd", "maybe"], "write off, auto"),
        (["--trace", TRACE, "--window", "10"], None),
        (["--trace", TRACE, "--window", "10 parsecs"], "--window is '10 parsecs'"),
        (["--trace", TRACE, "--window", "0s"], "--window has to be more than 0"),
        (["--trace", TRACE, "--mode", "fast"], "invalid choice: 'fast'"),
        (["--trace", TRACE, "--out", "/dev/null/x"], "--out /dev/null/x cannot be made"),
        (["--trace", TRACE, "--json", "--out", "-"], "--out is a folder: --json prints"),
        (["--trase", TRACE], r"no flag --trase \(did you mean --trace\?\)"),
    ],
)
def test_what_people_get_wrong(flags: list[str], message: str | None) -> None:
    if message is None:
        assert simulate.window_of(simulate.make_parser().parse([CLUSTER, *flags])) == 10.0
        return
    with pytest.raises(ConfigError, match=message):
        simulate.run([CLUSTER, *flags])


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ("arrival_s,input_tokens\n0,5\n", "lacks the column output_tokens"),
        (HEAD + "5,10,10\n1,10,10\n", "sort the trace"),
        (HEAD + "-1,10,10\n", "negative"),
        (HEAD, "holds no requests"),
        (HEAD + "0,39990,100\n", "39990 [+] 100 tokens, and .* room for 40000 tokens"),
    ],
)
def test_traces_that_are_none_and_requests_that_do_not_fit(
    small: tuple[str, str], tmp_path: Path, trace: str, message: str
) -> None:
    (tmp_path / "bad.csv").write_text(trace)
    with pytest.raises(ConfigError, match=message):
        simulate.run([small[0], "--trace", str(tmp_path / "bad.csv")])


def test_errors_are_one_line_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["simulate", str(tmp_path / "no.yaml"), "--trace", TRACE, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "no.yaml" in captured.err


# --- plan -----------------------------------------------------------------------------------------


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of which one is twice as fast and costs twenty times as much."""
    slow = SLOW | dict(gpus=1, median_error=0.03)
    fast = {k: v / 2 if k.endswith("_s") else v for k, v in slow.items()}
    models = {"slow:m:bf16:tp1": slow, "fast:m:bf16:tp1": fast}
    for module in ("penstock.loadgen.costs", "penstock.simulator.planner"):
        monkeypatch.setattr(f"{module}.known_hardware", lambda: models)


def plan_flags(trace: str, *more: str) -> list[str]:
    return [
        trace, "--slo", "ttft=500ms,tpot=80ms", "--hardware", "slow,fast", "--model", "m",
        "--prices", "slow=1,fast=20", "--jobs", "1", "--seeds", "2", *more,
    ]  # fmt: skip


def test_a_plan_is_the_cheapest_that_does(
    small: tuple[str, str], known: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = plan_flags(small[1], "--speed", "3")
    found = run_json(plan.run, capsys, *flags)
    best = found["plans"][0]
    assert best["hardware"] == "slow:m:bf16:tp1" and best["instances"] > 1
    assert best["busiest"]["mean"] >= 0.9 and best["whole"]["mean"] >= 0.9
    assert best["one_less"]["attainment"] < 0.9
    assert best["one_less"]["instances"] == best["instances"] - 1
    assert best["faster"] >= best["slower"]
    costs = [p["cost_per_hour"] for p in found["plans"]]
    assert costs == sorted(costs) and best["cost_per_hour"] == best["instances"]
    assert plan.run(flags) == 0
    text = capsys.readouterr().out
    assert f"plan: {best['instances']} × slow:m:bf16:tp1" in text and "not enough" in text


def test_a_price_changes_the_plan(
    small: tuple[str, str], known: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prices.yaml").write_text("slow: 10\nfast: 1\n")
    flags = plan_flags(small[1], "--prices", str(tmp_path / "prices.yaml"))
    assert run_json(plan.run, capsys, *flags)["plans"][0]["hardware"] == "fast:m:bf16:tp1"


def test_prices_are_of_those_that_are_named_and_the_others_stay(tmp_path: Path) -> None:
    assert prices_of("h100=2") == {**DEFAULT_USD, "h100": 2.0}
    (tmp_path / "prices.yaml").write_text("b300: 9\n")
    assert prices_of(str(tmp_path / "prices.yaml")) == {**DEFAULT_USD, "b300": 9.0}


def test_too_few_gpus_for_any_cluster_and_how_many_it_takes(
    small: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--slo", "ttft=1s,tpot=50ms", "--model", "llama3.1-70b", "--hardware", "h100"]
    assert plan.run([small[1], *flags, "--max-gpus", "1"]) == plan.EXIT_NONE
    said = capsys.readouterr().out
    assert "no cluster of up to 1 GPU could do this work: it takes 4 or more (--max-g" in said


def test_an_slo_beyond_the_gpus_that_may_be_had(
    small: tuple[str, str], known: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = plan_flags(small[1], "--speed", "20", "--max-gpus", "1")
    assert plan.run([*flags, "--json"]) == plan.EXIT_NONE
    found = json.loads(capsys.readouterr().out)
    assert found["plans"] == [] and found["nearest"]["attainment"] < 0.9
    assert plan.run(flags) == plan.EXIT_NONE
    said = capsys.readouterr().out
    assert "no cluster of up to 1 GPU keeps 90%" in said
    assert (
        f"TTFT of up to {1e3 * found['nearest']['ttft_s']:,.0f} ms" in said and "--max-gpus" in said
    )


def test_an_slo_that_nobody_can_meet(small: tuple[str, str], known: None) -> None:
    with pytest.raises(ConfigError) as caught:
        plan.run(plan_flags(small[1], "--slo", "ttft=500ms,tpot=5ms"))
    said = caught.value.message
    assert "nobody can hold TTFT 500 ms and TPOT 5 ms for 90%" in said
    # 10 ms a step, a row and a token of it: 10.15 ms on the fast one, twice that on the other.
    assert "and TPOT 10.1 ms on fast:m:bf16:tp1" in said
    assert "and TPOT 20.3 ms on slow:m:bf16:tp1" in said
    with pytest.raises(ConfigError, match=r"nothing that was asked for holds the trace: .* 4000"):
        plan.run([*plan_flags(long_trace(small[1])), "--hardware", "slow"])


def long_trace(beside: str) -> str:
    path = Path(beside).with_name("long.csv")
    path.write_text(HEAD + "0,50000,5\n")
    return str(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "which SLO"),
        (["--slo", "ttft=1s"], "has to give a ttft and a tpot"),
        (["--slo", "ttft=1s,tpot=1s", "--hardware", "abacus"], "in place of abacus write a100"),
        (["--slo", "ttft=1s,tpot=1s", "--prices", "h100"], "--prices h100 cannot be read"),
        (["--slo", "ttft=1s,tpot=1s", "--prices", "h100=x,h200=1"], "'x', not a number"),
        (["--slo", "ttft=1s,tpot=1s", "--prices", "h100=0,h200=1"], "price of h100 is 0"),
        (["--slo", "ttft=1s,tpot=1s", "--attainment", "1.5"], "a share of the requests"),
        (["--slo", "ttft=1s,tpot=1s", "--model", "gpt5"], "in place of gpt5 write llama3.1-70b"),
        (["--slo", "ttft=1s,tpot=1s", "--max-gpus", "0"], "at least 1"),
        (["--slo", "ttft=1s,tpot=1s", "--policy", "best"], "choose one of"),
    ],
)
def test_what_people_get_wrong_about_plans(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan.run([TRACE, *flags])


# --- faults ---------------------------------------------------------------------------------------


def with_faults(cluster: str, faults: str) -> str:
    path = Path(cluster).with_name("faults.yaml")
    path.write_text(Path(cluster).read_text() + f"faults: {faults}\n")
    return str(path)


def test_a_crash_loses_nothing_and_costs_time(
    small: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, trace = small
    flags = ["--trace", trace]
    calm = run_json(simulate.run, capsys, cluster, *flags)["runs"][0]
    faults = with_faults(cluster, "[{at: 3s, crash: s-0, for: 4s}]")
    crashed = run_json(simulate.run, capsys, faults, *flags)["runs"][0]
    assert crashed["answered"] == calm["answered"] == 60
    assert crashed["resumed"] > 0 == calm["resumed"]
    assert crashed["ttft_s"]["p99"] > calm["ttft_s"]["p99"]


def test_slow_and_frozen_instances_are_slower_until_they_are_not(
    small: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, trace = small
    calm = run_json(simulate.run, capsys, cluster, "--trace", trace)["runs"][0]
    for fault in ("slow: s-0, times: 5, for: 5s", "slow: s-1, times: 5", "freeze: s-0, for: 2s"):
        found = with_faults(cluster, f"[{{at: 2s, {fault}}}]")
        run = run_json(simulate.run, capsys, found, "--trace", trace)["runs"][0]
        assert run["answered"] == 60 and run["e2e_s"]["p99"] > calm["e2e_s"]["p99"]


def test_a_failure_that_cannot_happen_is_said_not_to(
    small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, trace = small
    once = with_faults(cluster, "[{at: 3s, crash: s-0, for: 4s}]")
    alone = run_json(simulate.run, capsys, once, "--trace", trace)["runs"][0]
    assert alone["idle_faults"] == []
    twice = "{at: 3s, crash: s-0, for: 4s}, {at: 4s, slow: s-0, times: 9}"
    found = with_faults(cluster, f"[{twice}, {{at: 500m, crash: s-1}}]")
    run = run_json(simulate.run, capsys, found, "--trace", trace)["runs"][0]
    assert run["idle_faults"] == [
        "slow of s-0 at 4s did not happen: the instance was down",
        "crash of s-1 at 30000s did not happen: the run was over by then",
    ]
    assert alone["simulated"]["digest"] == run["simulated"]["digest"]
    assert simulate.run([found, "--trace", trace, "--out", str(tmp_path)]) == 0
    assert "slow of s-0 at 4s did not happen" in capsys.readouterr().out


def test_when_nobody_is_left_requests_end_in_errors(
    small: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, trace = small
    found = with_faults(cluster, "[{at: 3s, crash: s-0}, {at: 3s, crash: s-1}]")
    run = run_json(simulate.run, capsys, found, "--trace", trace)["runs"][0]
    assert 0 < run["answered"] < 60 and run["failed"] + run["refused"] == 60 - run["answered"]
