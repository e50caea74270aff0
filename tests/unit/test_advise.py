"""Traces, and `penstock advise` on them: what it advises, and bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from penstock.cli.advise import run
from penstock.loadgen.costs import from_file, hardware, known_hardware
from penstock.loadgen.sources import open_trace
from penstock.loadgen.traces import TraceRequest, read_trace, spread_ticks, tick_of
from penstock.protocol.errors import ConfigError
from penstock.simulator.advice import Question, advise

COST = dict(
    base_s=4e-3, per_token_s=2e-5, per_row_s=1e-4, per_context_token_s=1e-8, per_attention_s=1e-9,
    kv_tokens=100_000, kv_bytes_per_token=1000, step_tokens=256, max_running=16,
)  # fmt: skip

# --- traces ---------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_our_csv(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "arrival_s,input_tokens,output_tokens\n2.5,100,10\n4,7,0\n")
    assert read_trace(path) == [TraceRequest(0.0, 100, 10), TraceRequest(1.5, 7, 1)]


def test_azures_csv_as_published(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    )
    first, second = read_trace(write(tmp_path / "a.csv", text))
    assert (first.arrival_s, first.input_tokens) == (0.0, 4808)
    assert second.arrival_s == pytest.approx(0.052)


def test_mooncakes_lines_and_its_clock(tmp_path: Path) -> None:
    times = [0, 0, 0, 3000, 6000, 6000]
    lines = [
        json.dumps(
            dict(timestamp=ms, input_length=600, output_length=9, hash_ids=[0, n], more="ignored")
        )
        for n, ms in enumerate(times)
    ]
    path = write(tmp_path / "m.jsonl.gz", "\n".join(lines))
    requests = read_trace(path)
    assert [r.arrival_s for r in requests] == [0, 0, 0, 3, 6, 6]
    assert requests[1].hash_ids == (0, 1)
    assert tick_of(path, requests) == 3.0
    assert [r.arrival_s for r in spread_ticks(requests, 3.0)] == [0, 1, 2, 3, 6, 7.5]


@pytest.mark.parametrize(
    ("columns", "times", "expected"),
    [
        ("arrival_s,input_tokens,output_tokens", ("0", "0", "5"), [0, 0, 5]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens",
         ("2023-11-16 18:17:03", "2023-11-16 18:17:03", "2023-11-16 18:17:08"), [0, 0.5, 5]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens",
         ("2023-11-16 18:17:03", "2023-11-16 18:17:03", "2023-11-16 18:17:08.5"), [0, 0, 5.5]),
        ("timestamp,input_length,output_length", ("0", "0", "60000"), [0, 1.5, 60]),
    ],
)  # fmt: skip
def test_only_coarse_clocks_are_spread_and_that_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    columns: str,
    times: tuple[str, ...],
    expected: list[float],
) -> None:
    path = write(tmp_path / "t.csv", "\n".join([columns, *(f"{t},9,9" for t in times)]))
    assert [r.arrival_s for r in open_trace(str(path))] == expected
    assert ("clock is coarse" in caplog.text) == (len(set(expected)) == 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no requests"),
        ("arrival_s,input_tokens\n1,2\n", "lacks the column output_tokens; it has arrival_s"),
        ("a,b\n1,2\n", "lacks the column"),
        ("arrival_s,input_tokens,output_tokens\n1,2,3\n0,2,3\n", "line 3: arrives at 0 s, before"),
        ("arrival_s,input_tokens,output_tokens\n-1,2,3\n", "line 2: arrival_s is negative"),
        ("arrival_s,input_tokens,output_tokens\n0,2,3\n1e300,2,3\n", "line 3: .* ten years"),
        ("arrival_s,input_tokens,input_tokens,output_tokens\n0,2,3,4\n", "input_tokens twice"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("[1, 2]", "line 1 is not a JSON object"),
        ("arrival_s,input_tokens,output_tokens\n1,x,3\n", "input_tokens is not a number: 'x'"),
        ("arrival_s,input_tokens,output_tokens\n1,2.5,3\n", "whole numbers"),
        ("arrival_s,input_tokens,output_tokens\n1,0,3\n", "at least 1 of a prompt"),
        ("arrival_s,input_tokens,output_tokens\nnan,2,3\n", "arrival_s is nan"),
        ("arrival_s,input_tokens,output_tokens\n1,2\n", "line 2: output_tokens has no value"),
        ("arrival_s,input_tokens,output_tokens\n\n0,1,1024,9\n", "line 3 has 4 values, .* 3 col"),
        ("0,5,10\n1,5,10\n", "begins with '0, 5, 10': its first line has to be a header"),
        ("0,0,10\n", "first line has to be a header"),
        ("2023-11-16 18:17:03.9799600,4808,10\n", "first line has to be a header"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,2,3\n", "not a date: 'noon'"),
        ('{"timestamp": 0, "input_length": 5}\n', "lacks the column output_length"),
        ('{"timestamp": 0,\n', "line 1 is not JSON"),
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": "x"}\n',
            "hash_ids is not a list",
        ),
        (
            '{"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [1, 2, 3]}\n',
            "there are 3 hash_ids for a prompt of 1000 tokens: in blocks of 512 it has 2",
        ),
        (
            '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1]}\n',
            "1 hash_ids for a prompt of 1024 tokens",
        ),
        (
            '{"arrival_s": 0, "input_tokens": 99, "output_tokens": 1, "hash_ids": [1, 2], '
            '"block_tokens": 64, "more": [1, 2]}\n{"arrival_s": 0, "input_tokens": 99, '
            '"output_tokens": 1, "hash_ids": [1, 2]}',
            "line 2: there are 2 hash_ids for a prompt of 99 tokens: in blocks of 512 it has 1",
        ),
    ],
)
def test_bad_traces_are_said_plainly(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path / "t", text))


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "nothing.csv")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x01\n" * 9)
    with pytest.raises(ConfigError, match="neither CSV nor JSON"):
        read_trace(tmp_path / "bytes")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"arrival_s,input_tokens\n" * 99)[:30])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "cut.gz")


# --- the advice -----------------------------------------------------------------------------------


def bursts() -> list[TraceRequest]:
    """Steady chat, and long prompts that come two at a time and want one token."""
    chat = [TraceRequest(n / 6, 60, 100) for n in range(72)]
    long = [TraceRequest(1.0 + n + 0.01 * k, 6000, 1) for n in range(11) for k in range(2)]
    return sorted(chat + long, key=lambda r: r.arrival_s)


@pytest.fixture
def cost(tmp_path: Path) -> str:
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    return str(tmp_path / "cost.json")


def question(cost: str, **more) -> Question:
    values = dict(hardware=cost, instances=3, ttft_slo_s=1.5, tpot_slo_s=0.005)
    return Question(**(values | more))


def test_bursts_of_long_prompts_over_steady_decoding_want_a_split(cost: str) -> None:
    advice = advise(bursts(), question(cost))
    assert advice.splits
    assert advice.best.attained > advice.together.attained + 0.05
    assert advice.together.num_split == 0
    assert all(0 < s.utilisation < 1 for s in advice.simulated)


def test_light_work_wants_none(cost: str) -> None:
    light = [TraceRequest(n * 1.0, 100, 20) for n in range(30)]
    assert not advise(light, question(cost)).splits


def test_two_processes_advise_what_one_does(cost: str) -> None:
    requests = bursts()[:40]
    one, two = (advise(requests, question(cost, instances=2), jobs=jobs) for jobs in (1, 2))
    for a, b in zip(one.simulated, two.simulated, strict=True):
        assert a.setup == b.setup and (a.ttft_s == b.ttft_s).all() and (a.tpot_s == b.tpot_s).all()


def test_the_busiest_stretch_is_what_counts(cost: str) -> None:
    requests = [TraceRequest(n * 10.0, 10, 5) for n in range(20)]
    requests += [TraceRequest(200 + n * 0.5, 500, 50) for n in range(20)]
    advice = advise(requests, question(cost, window_s=10.0, instances=1))
    assert advice.work["requests"] == 20 and advice.work["mean_prompt_tokens"] == 500
    assert [s.setup for s in advice.simulated] == ["together"]


@pytest.mark.parametrize(
    ("more", "changed", "message"),
    [
        (
            dict(tpot_slo_s=0.001),
            {},
            "hold a TPOT of 1 ms .* 4.1 ms a token. 90% .* TPOT",
        ),
        (dict(ttft_slo_s=0.001), {}, r"nobody can hold a TTFT of 0.001 s .* \(60 tokens\)"),
        ({}, dict(kv_tokens=5000), "room for 5000 tokens of KV, and one request .* needs 6001"),
    ],
)
def test_what_nobody_can_meet_is_said(tmp_path: Path, more, changed, message) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(COST | changed))
    with pytest.raises(ConfigError, match=message):
        advise(bursts(), question(str(path), **more))


def test_what_would_meet_an_slo_that_no_setup_meets_is_said(cost: str) -> None:
    tight = advise(bursts(), question(cost, instances=1, tpot_slo_s=0.00425))
    assert any("it takes more instances" in said for said in tight.because)
    ttft_s, tpot_s = tight.best.held_s
    held = f"TTFT of up to {1e3 * ttft_s:,.0f} ms, and 90% a TPOT of up to {1e3 * tpot_s:.3g} ms"
    assert held in tight.because[-1]
    beyond = advise(bursts(), question(cost, instances=1, tpot_slo_s=0.0041209))
    assert any("no number of instances keeps 90%" in said for said in beyond.because)


def trace_file(tmp_path: Path) -> str:
    lines = [f"{r.arrival_s},{r.input_tokens},{r.output_tokens}" for r in bursts()]
    return str(
        write(
            tmp_path / "t.csv", "\n".join(["arrival_s,input_tokens,output_tokens", *lines]) + "\n"
        )
    )


def test_the_command_speaks_to_people_and_to_programs(tmp_path: Path, cost: str, capsys) -> None:
    flags = [trace_file(tmp_path), "--instances", "3", "--model-cost", cost, "--window", "8s"]
    flags += ["--slo", "ttft=1.5s,tpot=5ms", "--jobs", "1"]
    assert run(flags) == 0
    text = capsys.readouterr().out
    assert "advice: prefill apart from decode" in text
    assert run([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["disaggregate"] and found["advice"] in text
    assert [row["setup"] for row in found["setups"]] == ["together", "1:2", "2:1", "auto"]
    assert found["work"]["seconds"] < 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slo", "fast"], "not like ttft=1s,tpot=50ms"),
        (["--slo", "ttft=1s"], "has to give a ttft and a tpot"),
        (["--slo", "ttft=0s,tpot=1s"], "both more than 0"),
        (["--hardware", "abacus"], "in place of abacus write a100 or"),
        (["--hardware", "h100:llama3.1-8b"], "h100:llama3.1-8b:bf16:tp1, h100:llama3.1-8b:bf16"),
        (["--model-cost", "nothing.json"], "^nothing.json cannot be read: No such"),
        (["--speed", "0"], "--speed 0 has to be more than 0"),
        (["--link-gbit", "-1"], "--link-gbit -1 has to be more than 0"),
    ],
)
def test_bad_flags_are_said_plainly(tmp_path: Path, flags, message) -> None:
    with pytest.raises(ConfigError, match=message):
        run([trace_file(tmp_path), *flags])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "not a JSON object"),
        ({"base_s": "x"}, "base_s is 'x'"),
        ({"base_s": -1}, "not a number of at least 0"),
        ({"base_s": 1, "per_token_s": 1}, "lacks kv_tokens"),
    ],
)
def test_bad_cost_models_are_said_plainly(tmp_path: Path, found, message) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=message):
        from_file(path)


def test_known_hardware_is_near_what_was_measured() -> None:
    for name, found in known_hardware().items():
        assert found["median_error"] < 0.12, name
    # Llama 3.1 8B on an H100: 512 tokens in 11.9 ms, a decode step of 64 at 512 in 9.1 ms.
    model = hardware("h100:llama3.1-8b:bf16")
    assert model.prefill_s(512) == pytest.approx(11.9e-3, rel=0.15)
    assert model.step_s(64, 64, 64 * 512, 64 * 512) == pytest.approx(9.1e-3, rel=0.15)
