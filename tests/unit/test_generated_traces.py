"""Traces: formats of others, bad files, and generated ones against the numbers asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from penstock.cli.trace import run
from penstock.loadgen.generate import parse
from penstock.loadgen.prompts import prompt_ids
from penstock.loadgen.sources import busiest, open_trace
from penstock.loadgen.statistics import describe, reusable_share
from penstock.loadgen.traces import (
    TraceRequest,
    read_lengths,
    read_rates,
    read_trace,
    write_trace,
)
from penstock.protocol.errors import ConfigError

BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
SESSIONS = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- formats --------------------------------------------------------------------------------------


def test_burstgpt_without_its_failures(tmp_path: Path) -> None:
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,0,0,0,Conversation log\n"
    rows += "118,GPT-4,417,276,693,API log\n"
    found = read_trace(write(tmp_path / "b.csv", BURSTGPT + rows))
    assert found == [TraceRequest(0.0, 472, 18), TraceRequest(113.0, 417, 276)]


def test_sessions_of_burstgpt_begin_with_what_was_said(tmp_path: Path) -> None:
    rows = [
        "0,a,1,ChatGPT,1000,100,1100,Conversation log",
        "1,b,1,ChatGPT,1000,100,1100,Conversation log",
        "2,a,1,ChatGPT,1300,100,1400,Conversation log",
        "3,a,1,ChatGPT,50,100,150,Conversation log",
        "4,,1,ChatGPT,50,100,150,API log",
    ]
    first, other, second, anew, api = read_trace(
        write(tmp_path / "s.csv", SESSIONS + "\n".join(rows))
    )
    prompts = [prompt_ids(r, n) for n, r in enumerate((first, other, second, anew, api))]
    assert [len(p) for p in prompts] == [1000, 1000, 1300, 50, 50]
    assert prompts[2][:1000] == prompts[0] and prompts[1][:4] != prompts[0][:4]
    assert prompts[3][:4] != prompts[0][:4] and not api.hash_ids


def test_images_of_servegen_are_tokens_of_the_prompt(tmp_path: Path) -> None:
    text = "arrival_s,client,text_tokens,image_tokens,output_tokens\n0,11,474,324|432|216,59\n1,5,94,,10\n"  # noqa: E501
    assert [(r.input_tokens, r.output_tokens) for r in read_trace(write(tmp_path / "m", text))] == [
        (474 + 324 + 432 + 216, 59),
        (94, 10),
    ]


def test_dates_with_and_without_a_time_zone(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:00.5000000+00:00,1,1\n"
        "2024-05-12 00:00:01+00:00,1,1\n2024-05-12 02:00:02.25+01:00,1,1\n"
    )
    found = read_trace(write(tmp_path / "a.csv", text))
    assert [r.arrival_s for r in found] == pytest.approx([0.0, 0.5, 3601.75])


def test_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    text = "\ufeffarrival_s,input_tokens,output_tokens\n0,5,5\n\n1,6,6\n"
    assert len(read_trace(write(tmp_path / "bom.csv", text))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input_tokens,output_tokens\n5,5\n", "no times of arrival.*generate:rate=4"),
        ("window_s,m_rps\n0,5\n", "holds rates of arrival and no requests"),
        (BURSTGPT + "1,GPT-4,0,0,0,API log\n", "holds no requests"),
        (BURSTGPT.replace("Response tokens", "x") + "1,GPT-4,1,1,2,API log\n", "Response tokens"),
        ("arrival_s,input_tokens,output_tokens\ninf,2,3\n", "arrival_s is inf"),
        ("arrival_s,input_tokens,output_tokens\n1,nan,3\n", "input_tokens is nan"),
        ("arrival_s,input_tokens,output_tokens\n1,2,-3\n", "none is negative"),
        ("arrival_s,input_tokens,output_tokens\n1,99999999,3\n", "none above"),
        ("arrival_s,text_tokens,image_tokens,output_tokens\n1,2,3|x,3\n", "image_tokens is not a"),
        (
            '{"timestamp": 0, "input_length": true, "output_length": 1}\n',
            "input_length is True",
        ),
        (
            '{"timestamp": 1e999, "input_length": 4, "output_length": 1}\n',
            "timestamp is inf",
        ),
        (
            '{"timestamp": 0, "input_length": 4, "output_length": 1, "hash_ids": [-1]}\n',
            "hash_ids is not a list of numbers",
        ),
        (
            '{"timestamp": 0, "input_length": 4, "output_length": 1, "hash_ids": [1,2,3,4,5]}\n',
            "5 hash_ids for a prompt of 4 tokens",
        ),
        ('{"timestamp": -5, "input_length": 4, "output_length": 1}\n', "timestamp is negative"),
    ],
)
def test_bad_files_are_said_plainly(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path / "t", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("window_s,m_rps\n0,-5\n", "m_rps is negative"),
        ("window_s,m_rps\n0,5\n0,5\n", "no later than"),
        ("window_s,m_rps\n0,0\n", "no rate above 0"),
        ("a,b\n0,0\n", "lacks the column window_s and rps"),
    ],
)
def test_bad_rates(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rates(write(tmp_path / "r.csv", text))


def test_lengths_without_times(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", "input_tokens,output_tokens\n74,918\n290,905\n")
    assert read_lengths(path) == [(74, 918), (290, 905)]
    with pytest.raises(ConfigError, match="holds no lengths"):
        read_lengths(write(tmp_path / "x.csv", "a,b\n1,2\n"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for words in ("rate=5,duration=20s", "rate=5,duration=20s,turns=3,system=64,block=64"):
        made = open_trace(f"generate:{words}")
        write_trace(tmp_path / "t", made)
        again = read_trace(tmp_path / "t")
        assert [(r.input_tokens, r.output_tokens, r.hash_ids) for r in again] == [
            (r.input_tokens, r.output_tokens, r.hash_ids) for r in made
        ]
        assert {r.block_tokens for r in again} == {r.block_tokens for r in made}
        assert [r.arrival_s for r in again] == pytest.approx([r.arrival_s for r in made], abs=1e-5)


def test_reuse_is_counted_as_the_prompts_have_it() -> None:
    """The trie of hash ids against the token ids of the prompts, compared one by one."""
    requests = open_trace("generate:rate=2,duration=30s,turns=4,think=5s,input=300,system=512")
    prompts = [prompt_ids(r, n) for n, r in enumerate(requests)]
    shared = 0
    for n, prompt in enumerate(prompts):
        longest = 0
        for before in prompts[:n]:
            same = next(
                (i for i, (a, b) in enumerate(zip(prompt, before)) if a != b),
                min(len(prompt), len(before)),
            )
            longest = max(longest, same)
        shared += longest
    assert reusable_share(requests) == pytest.approx(shared / sum(map(len, prompts)), abs=1e-3)
    assert reusable_share(requests) > 0.5


# --- generated ------------------------------------------------------------------------------------


def test_one_seed_one_trace() -> None:
    words = "generate:rate=5,duration=60s,cv=2,tide=0.5,turns=3,think=5s,system=512,seed="
    assert open_trace(words + "1") == open_trace(words + "1")
    assert open_trace(words + "1") != open_trace(words + "2")


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_rate_and_bursts(cv: float) -> None:
    """Of n gaps with this CV the mean is off by cv / sqrt(n): four of these are allowed."""
    found = describe(open_trace(f"generate:rate=20,duration=1000,cv={cv},seed=3"))
    assert found["requests_per_s"] == pytest.approx(20, rel=4 * cv / np.sqrt(20_000))
    assert found["gap_cv"] == pytest.approx(cv, rel=0.1)


def test_burstiness_is_vllms() -> None:
    assert parse("rate=1,duration=1,burstiness=0.25").cv == pytest.approx(2.0)
    with pytest.raises(ConfigError, match="cv and burstiness"):
        parse("rate=1,duration=1,burstiness=0.25,cv=2")


def test_a_tide_rises_first() -> None:
    requests = open_trace("generate:rate=50,duration=200,tide=0.8,period=100,seed=1")
    times = np.array([r.arrival_s for r in requests])
    quarter = np.histogram(times % 100, bins=4, range=(0, 100))[0] / (2 * 25)
    # The mean of 1 + 0.8 sin over a half of the period is 1 +- 0.8 * 2 / pi.
    assert quarter[:2].mean() == pytest.approx(50 * (1 + 1.6 / np.pi), rel=0.05)
    assert quarter[2:].mean() == pytest.approx(50 * (1 - 1.6 / np.pi), rel=0.1)


def test_rates_of_a_file_squeezed_and_scaled(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", "window_s,a_rps,b_rps\n0,1,0\n600,0,1\n1200,3,1\n")
    words = f"generate:rates={path}:a_rps,period=300,rate=20,duration=600,seed=5"
    times = np.array([r.arrival_s for r in open_trace(words)])
    counts = np.histogram(times, bins=6, range=(0, 600))[0]
    assert counts.sum() == pytest.approx(12_000, rel=0.04)
    # Each lap of 300 s has windows of 100 s with 1 : 0 : 3.
    assert counts[1] <= 20 and counts[4] <= 20  # the first arrival is put at 0 s
    assert counts[2] / counts[0] == pytest.approx(3, rel=0.1)
    plain = open_trace(f"generate:rates={path}:b_rps,duration=1800,seed=5")
    assert len(plain) == pytest.approx(1200, rel=0.12)  # as it says: 1 a second in two windows


def test_lengths_are_drawn_as_asked(tmp_path: Path) -> None:
    requests = open_trace("generate:rate=100,duration=100,input=1000,input_cv=0.5,output_cv=0")
    prompts = np.array([r.input_tokens for r in requests])
    assert prompts.mean() == pytest.approx(1000, rel=0.03)
    assert prompts.std() / prompts.mean() == pytest.approx(0.5, rel=0.1)
    assert {r.output_tokens for r in requests} == {128}
    path = write(tmp_path / "l.csv", "input_tokens,output_tokens\n74,918\n290,905\n")
    drawn = open_trace(f"generate:rate=10,duration=100,lengths={path}")
    assert {(r.input_tokens, r.output_tokens) for r in drawn} == {(74, 918), (290, 905)}


def test_sessions_keep_the_rate_and_share_what_was_said() -> None:
    lengths = "input=100,input_cv=0,output=50,output_cv=0"
    requests = open_trace(f"generate:rate=10,duration=1000,turns=5,think=10s,{lengths}")
    # Sessions come at 2 a second and bring a geometric number of turns with a mean of 5.
    assert len(requests) == pytest.approx(10_000, rel=0.08)
    # Turn k asks with 100 k + 50 (k - 1) tokens, of which the prompt before is known; k is
    # geometric over requests as well: weights 0.8^(k-1).
    turns = np.arange(1, 200)
    weights = 0.8**turns
    prompts = 150 * turns - 50
    known = np.append(0, prompts[:-1])
    expected = (weights * known).sum() / (weights * prompts).sum()
    assert reusable_share(requests) == pytest.approx(expected, rel=0.05)
    found = {r.input_tokens for r in requests}
    assert min(found) == 100 and all((n + 50) % 150 == 0 for n in found)


def test_shared_prompts() -> None:
    requests = open_trace("generate:rate=5,duration=200,system=1024,systems=2,input=100,seed=1")
    heads = {tuple(prompt_ids(r, n)[:1024]) for n, r in enumerate(requests)}
    assert len(heads) == 2
    prompts = {tuple(prompt_ids(r, n)) for n, r in enumerate(requests)}
    assert len(prompts) == len(requests)


def test_a_session_ends_where_its_prompt_would_be_too_long() -> None:
    words = "generate:rate=5,duration=100,turns=50,think=1s,input=400,input_cv=2,max_input=2000"
    assert max(r.input_tokens for r in open_trace(words)) <= 2000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "takes key=value"),
        ("rate=4", "needs a duration"),
        ("duration=4", "needs a rate"),
        ("rate=0,duration=4", "rate=0 has to be more than 0"),
        ("rate=nan,duration=4", "rate=nan cannot be understood"),
        ("rate=4,duration=4x", "duration=4x cannot be understood"),
        ("rate=4,duration=4,turns=0", "at least one"),
        ("rate=4,duration=4,tide=2", "tide is a share"),
        ("rate=4,rate=5,duration=4", "said twice"),
        ("rate=4,duration=4,colour=blue", "knows no 'colour': it knows block,"),
        ("rate=4,duration=4,system=100", "whole blocks"),
        ("rate=4,duration=4,lengths=/nowhere.csv", "cannot be read"),
        ("rate=4e6,duration=1h", "more than 5000000"),
        ("rate=4,duration=1m,input=1e9", "input=1e.09 is more than max_input=128000"),
        (
            "rate=4,duration=1m,system=1024,max_input=1000",
            "system=1024 is more than max_input=1000",
        ),
        ("rate=1e-9,duration=1", "makes no request"),
    ],
)
def test_words_that_make_no_trace(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_trace(f"generate:{words}")


# --- parts, and the command -----------------------------------------------------------------------


def test_parts_of_a_trace() -> None:
    requests = [TraceRequest(float(t), n, 1) for t, n in [(0, 9), (10, 50), (12, 50), (30, 9)]]
    assert busiest(requests, 5.0) == [TraceRequest(0.0, 50, 1), TraceRequest(2.0, 50, 1)]
    words = "generate:rate=10,duration=100"
    whole = open_trace(words)
    assert open_trace(words, limit=7) == whole[:7]
    fast = open_trace(words, speed=4.0)
    assert fast[-1].arrival_s == pytest.approx(whole[-1].arrival_s / 4)
    for wrong in ({"speed": 0.0}, {"speed": float("inf")}, {"window_s": 0.0}):
        with pytest.raises(ConfigError):
            open_trace(words, **wrong)


def test_prompts_fit_a_small_vocabulary() -> None:
    request = TraceRequest(0.0, 700, 1, (0, 123_456))
    ids = prompt_ids(request, 3, num_ids=64)
    assert len(ids) == 700 and max(ids) < 64
    assert ids[:512] == prompt_ids(TraceRequest(0.0, 512, 1, (0,)), 9, num_ids=64)
    # Blocks that the ids do not cover are the request's own.
    assert (
        prompt_ids(request, 3)[:700]
        == prompt_ids(TraceRequest(0.0, 1500, 1, (0, 123_456)), 3)[:700]
    )


def test_the_command_says_what_a_trace_is_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.csv"
    assert run(["generate:rate=5,requests=40", "--out", str(out), "--speed", "2"]) == 0
    assert "40 requests" in capsys.readouterr().out
    assert run([str(out), "--json", "--limit", "30"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 30 and found["requests_per_s"] == pytest.approx(10, rel=0.5)
