"""What benchmarks.compare works out from its measurements; nothing is timed here."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.compare import report
from benchmarks.compare.__main__ import choose_tasks, installed, pairs
from benchmarks.compare.checkpoint import sizes
from benchmarks.compare.engines import (
    VARIANTS,
    Bench,
    Variant,
    choose,
    find_pythons,
    has_module,
    in_waves,
)
from benchmarks.compare.memory import most_of
from benchmarks.compare.offline import Found
from benchmarks.compare.plot import COLOURS, LABELS, panels
from benchmarks.compare.process import EngineFailed, Worker
from benchmarks.compare.summary import (
    Objective,
    Outcome,
    agreement,
    best_goodput,
    floor_ms,
    metrics,
    percentile,
    same_round_ratios,
    summarise,
    summarise_online,
    worth_repeating,
)
from benchmarks.compare.tasks import TASKS
from benchmarks.compare.traces import (
    AZURE_CONVERSATION,
    SHAREGPT,
    Lengths,
    poisson_arrivals,
    read_lengths,
)

BY_NAME = {variant.name: variant for variant in VARIANTS}


def stream_record(engine: str, repeat: int, *, first_s: float, step_ms: float, **more: Any) -> Any:
    return {
        "engine": engine,
        "task": "context_128",
        "wave": 0,
        "repeat": repeat,
        "context_tokens": 128,
        "num_tokens": 33,
        "first_token_s": first_s,
        "elapsed_s": first_s + 32 * step_ms / 1e3,
        "bandwidth_gb_s": 50.0,
        "matrix_tflops": 1.0,
    } | more


def batch_record(engine: str, repeat: int, *, elapsed_s: float) -> Any:
    return {
        "engine": engine,
        "task": "batch",
        "wave": 0,
        "repeat": repeat,
        "context_tokens": None,
        "num_tokens": 1024,
        "elapsed_s": elapsed_s,
        "bandwidth_gb_s": 50.0,
        "matrix_tflops": 1.0,
    }


# --- summaries -----------------------------------------------------------------------------------


def test_a_stream_has_times_and_a_batch_a_rate() -> None:
    stream = metrics(stream_record("vllm", 0, first_s=0.5, step_ms=25.0))
    assert stream == pytest.approx({"ttft_s": 0.5, "tpot_ms": 25.0})
    assert metrics(batch_record("vllm", 0, elapsed_s=8.0)) == {"output_tok_s": 128.0}


def test_ratios_are_taken_within_a_round() -> None:
    """The machine was twice as slow in the second round: medians would hide what ratios show."""
    records = [
        stream_record("vllm", 0, first_s=1.0, step_ms=20.0),
        stream_record("penstock", 0, first_s=0.5, step_ms=10.0),
        stream_record("vllm", 1, first_s=2.0, step_ms=40.0),
        stream_record("penstock", 1, first_s=1.0, step_ms=20.0),
        stream_record("vllm", 2, first_s=2.0, step_ms=40.0),
    ]
    found = summarise(records, {"vllm": 10**9, "penstock": 10**9}, 0, "vllm")
    assert found["penstock"]["context_128"]["tpot_ms_ratio"] == pytest.approx(0.5)
    assert found["penstock"]["context_128"]["ttft_s_ratio"] == pytest.approx(0.5)
    assert found["vllm"]["context_128"]["tpot_ms_ratio"] == 1.0
    assert found["penstock"]["context_128"]["rounds"] == 2


def test_rounds_of_different_waves_are_not_compared() -> None:
    records = [
        stream_record("vllm", 0, first_s=1.0, step_ms=20.0),
        stream_record("penstock-int8", 0, first_s=1.0, step_ms=10.0, wave=1),
    ]
    weights = dict.fromkeys(("vllm", "penstock-int8"), 10**9)
    figures = summarise(records, weights, 0, "vllm")["penstock-int8"]["context_128"]
    assert "tpot_ms_ratio" not in figures
    assert figures["tpot_ms"] == pytest.approx(10.0)
    assert same_round_ratios(records, [("penstock-int8", "vllm")]) == []


def test_without_a_reference_there_are_medians_and_no_ratios() -> None:
    figures = summarise([batch_record("llama", 0, elapsed_s=4.0)], {"llama": 1}, 0, None)
    assert figures["llama"]["batch"]["output_tok_s"] == 256.0
    assert "output_tok_s_ratio" not in figures["llama"]["batch"]


def test_the_floor_is_the_engines_own_weights_over_the_bandwidth_of_the_same_repeat() -> None:
    assert floor_ms(1e9, 50.0) == pytest.approx(20.0)
    records = [
        stream_record("llama-q8_0", 0, first_s=1.0, step_ms=22.0),
        stream_record("llama-q8_0", 1, first_s=1.0, step_ms=11.0, bandwidth_gb_s=100.0),
    ]
    kv_bytes_per_token = 1_000_000_000 // 128 // 10
    figures = summarise(records, {"llama-q8_0": 10**9}, kv_bytes_per_token, None)
    figures = figures["llama-q8_0"]["context_128"]
    assert figures["over_floor"] == pytest.approx(1.1)
    assert figures["over_floor_with_kv"] == pytest.approx(1.0, rel=1e-3)


def test_pairs_hold_weights_of_as_many_bits() -> None:
    found = pairs(VARIANTS)
    assert ("penstock-int8", "llama-q8_0") in found and ("penstock", "vllm") in found
    assert ("penstock-int4", "llama-q4_0") in found and ("penstock-int8", "vllm") not in found
    records = [
        batch_record("penstock-int8", 0, elapsed_s=5.0),
        batch_record("llama-q8_0", 0, elapsed_s=10.0),
    ]
    (row,) = same_round_ratios(records, found)
    assert row["ratio"] == 2.0 and row["metric"] == "output_tok_s" and row["rounds"] == 1


def test_slow_rivals_run_once_and_ours_always() -> None:
    records = [batch_record(e, 0, elapsed_s=60.0) for e in ("llama", "penstock")]
    always = ("penstock", "vllm")
    assert not worth_repeating(records, "llama", "batch", 10.0, always)
    assert worth_repeating(records, "llama", "mixed", 10.0, always)
    assert worth_repeating(records, "llama", "batch", 90.0, always)
    assert worth_repeating(records, "penstock", "batch", 10.0, always)


def test_agreement_counts_first_tokens_and_whole_continuations() -> None:
    ids = {
        "odd": [[7, 2], [8, 4]],
        "a": [[1, 2], [3, 4]],
        "b": [[1, 9], [3, 4]],
        "c": [[1, 2], [3, 5]],
    }
    found = agreement(ids)
    assert found["a"] == {"prompts": 2, "same_first_token": 2, "same_tokens": 2}
    assert found["b"] == {"prompts": 2, "same_first_token": 2, "same_tokens": 1}
    assert found["odd"] == {"prompts": 2, "same_first_token": 0, "same_tokens": 0}
    assert agreement({}) == {}


def test_shared_memory_is_no_part_of_the_private_peak() -> None:
    said = {"peak_bytes": 900, "anon_bytes": 300, "file_bytes": 100, "shared_bytes": 400}
    most = most_of(said | {"weight_bytes": None, "elapsed_s": 1.0}, {})
    assert most["private_bytes"] == 500 and most["peak_bytes"] == 900
    later = most_of(said | {"anon_bytes": 450}, most)
    assert later["private_bytes"] == 550


# --- online --------------------------------------------------------------------------------------


def test_goodput_counts_what_meets_both_objectives() -> None:
    objective = Objective(ttft_s=5.0, tpot_ms=250.0)
    outcomes = [
        Outcome(11, first_token_s=1.0, finished_s=2.0),
        Outcome(11, first_token_s=5.0, finished_s=7.5),  # both just met
        Outcome(11, first_token_s=5.1, finished_s=6.0),  # late
        Outcome(11, first_token_s=1.0, finished_s=3.6),  # slow
        Outcome(0, first_token_s=1.0, finished_s=None),  # not finished
        Outcome(0, first_token_s=None, finished_s=None),  # refused
        Outcome(1, first_token_s=0.5, finished_s=0.5),  # one token has no time per token
    ]
    found = summarise_online(outcomes, 10.0, objective)
    assert found["goodput_per_s"] == pytest.approx(0.3)
    assert found["attainment"] == pytest.approx(3 / 7)
    assert (found["requests"], found["finished"]) == (7, 5)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values, p) for p in (0.5, 0.9, 0.99, 1.0)] == [50.0, 90.0, 99.0, 100.0]
    assert percentile([3.0], 0.01) == 3.0
    assert math.isnan(percentile([], 0.5))


def test_best_goodput_is_not_that_of_the_highest_rate() -> None:
    rows = [
        {"engine": "vllm", "rate_per_s": r, "goodput_per_s": g, "attainment": g / r}
        for r, g in ((1.0, 1.0), (2.0, 1.4), (3.0, 0.2))
    ]
    best = best_goodput(rows)["vllm"]
    assert best == {"rate_per_s": 2.0, "goodput_per_s": 1.4, "attainment": 0.7}


@pytest.mark.parametrize("file", [SHAREGPT, AZURE_CONVERSATION])
def test_slices_of_traces_can_be_read(file: Path) -> None:
    lengths = read_lengths(file)
    assert len(lengths) in (256, 512)
    assert all(x.input_tokens > 0 and x.output_tokens > 0 for x in lengths)


def test_scaled_lengths_keep_a_few_tokens() -> None:
    assert Lengths(1000, 200).scaled(8) == Lengths(125, 25)
    assert Lengths(5, 9).scaled(8) == Lengths(4, 4)


def test_arrivals_are_the_same_for_every_engine() -> None:
    lengths = [Lengths(8, 4), Lengths(16, 6)]
    arrivals = list(poisson_arrivals(lengths, 2.0, 50.0, 1, 1000))
    assert arrivals == list(poisson_arrivals(lengths, 2.0, 50.0, 1, 1000))
    assert arrivals != list(poisson_arrivals(lengths, 2.0, 50.0, 2, 1000))
    assert len(arrivals) == 100
    times_s = [arrival.at_s for arrival in arrivals]
    assert times_s == sorted(times_s) and times_s[0] >= 0.0 and times_s[-1] <= 50.0
    gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
    mean_s = sum(gaps_s) / len(gaps_s)
    deviation_s = math.sqrt(sum((g - mean_s) ** 2 for g in gaps_s) / len(gaps_s))
    assert 0.6 < deviation_s / mean_s < 1.4  # 1 for exponential gaps, 0 for even ones


# --- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_tasks_are_reproducible_and_new_in_each_round(task: Any) -> None:
    job = task.job(0, 4096)
    assert job == task.job(0, 4096)
    assert job.prompts != task.job(1, 4096).prompts
    assert len(job.prompts) == len(job.max_tokens)
    assert all(100 <= i < 4096 for prompt in job.prompts for i in prompt)


def test_a_share_of_the_prefix_is_shared_and_no_more() -> None:
    prompts = TASKS["prefix"].job(0, 4096).prompts
    first = prompts[0]
    assert all(len(p) == 512 and p[:358] == first[:358] for p in prompts)
    assert len({tuple(p[358:]) for p in prompts}) == len(prompts)
    assert len({p[358] for p in prompts}) > 1


# --- who takes part ------------------------------------------------------------------------------


def test_engines_and_tasks_are_chosen_by_patterns() -> None:
    assert [v.name for v in choose(["llama*", "penstock"])] == [
        *("penstock", "llama", "llama-q8_0", "llama-q4_0")
    ]
    assert choose_tasks(["context_*", "online"])[-1] == "online"
    with pytest.raises(ValueError, match="no engine is called 'lama'"):
        choose(["lama"])
    with pytest.raises(ValueError, match="no task is called"):
        choose_tasks(["decode"])


def test_what_is_not_installed_is_skipped_with_a_word(tmp_path: Path) -> None:
    pythons = find_pythons(tmp_path / "nothing", {"transformers": tmp_path / "no-python"})
    assert set(pythons) == {"penstock"}
    bench = make_bench(tmp_path, pythons)
    found = Found()
    left = installed(choose(["penstock", "vllm", "llama*"]), bench, found)
    assert [v.name for v in left] == ["penstock"]
    assert found.missing == dict.fromkeys(
        ("vllm", "llama", "llama-q8_0", "llama-q4_0"), "not installed"
    )


def test_a_python_that_lacks_the_module_does_not_count() -> None:
    assert has_module(Path(sys.executable), "json")
    assert not has_module(Path(sys.executable), "no_such_module_anywhere")


def test_all_fit_together_where_there_is_room() -> None:
    needs = {v.name: 2 for v in VARIANTS}
    (wave,) = in_waves(list(VARIANTS), needs, 100, "vllm")
    assert {v.name for v in wave} == set(BY_NAME)


def test_the_reference_is_in_every_wave_and_bits_stay_together() -> None:
    needs = {v.name: 2 for v in VARIANTS}
    waves = in_waves(list(VARIANTS), needs, 14, "vllm")
    names = [[v.name for v in wave] for wave in waves]
    assert names == [
        ["vllm", "penstock", "openvino", "llama", "transformers"],
        [
            *("vllm", "penstock-int8", "openvino-int8", "llama-q8_0", "penstock-int8-kv8"),
            *("penstock-int4", "llama-q4_0"),
        ],
    ]


@pytest.mark.parametrize("available", [0, 3, 5, 6, 9, 20])
def test_every_engine_gets_its_turn_once(available: int) -> None:
    draw = random.Random(available)
    needs = {v.name: draw.randrange(1, 6) for v in VARIANTS}
    waves = in_waves(list(VARIANTS), needs, available, "vllm")
    turns = [v.name for wave in waves for v in wave if v.name != "vllm"]
    assert sorted(turns) == sorted(set(BY_NAME) - {"vllm"})
    for wave in waves:
        assert wave[0].name == "vllm"
        assert len(wave) == 2 or sum(needs[v.name] for v in wave) <= available
    assert in_waves([BY_NAME["vllm"]], needs, available, "vllm") == [[BY_NAME["vllm"]]]


# --- the checkpoint's sizes ----------------------------------------------------------------------


def write_checkpoint(folder: Path) -> None:
    shapes = {"model.embed_tokens.weight": [100, 8], "a.weight": [16, 8], "norm.weight": [8]}
    header = {name: {"dtype": "BF16", "shape": shape} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {}, **header}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    config = {"vocab_size": 100, "num_key_value_heads": 2, "head_dim": 4, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))


def make_bench(folder: Path, pythons: dict[str, Path]) -> Bench:
    model = folder / "model"
    model.mkdir()
    write_checkpoint(model)
    return Bench(model, sizes(model), pythons, num_threads=1, kv_bytes=1 << 30)


def test_bytes_of_weights(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, {})
    assert bench.sizes.kv_bytes_per_token == 2 * 2 * 4 * 3 * 2
    assert bench.weight_bytes(BY_NAME["vllm"]) == 2 * (100 * 8 + 16 * 8 + 8)
    assert bench.weight_bytes(BY_NAME["penstock-int8"]) == 928 + 4 * 116 + 2 * 8
    # 100 x 8 of them are the tied embedding, which stays in 8 bits.
    assert bench.weight_bytes(BY_NAME["penstock-int4"]) == 64 + 4 * 1 + 800 + 4 * 100 + 2 * 8
    (tmp_path / "model-q8_0.gguf").write_bytes(bytes(77))
    assert bench.weight_bytes(BY_NAME["llama-q8_0"]) == 77


def test_a_server_is_asked_for_only_where_there_is_one(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, {v.kind: Path("/x/bin/python") for v in VARIANTS})
    assert bench.server_command(BY_NAME["llama"], 1) is None
    command = bench.server_command(BY_NAME["penstock-int8"], 1)
    assert command is not None and command[-2:] == ["--quantization", "int8"]


# --- a worker that fails -------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bench whose one engine is the script that the test gives."""

    def make(script: str) -> Worker:
        workers = tmp_path / "workers"
        workers.mkdir()
        (workers / "worker.py").write_text(script)
        monkeypatch.setattr("benchmarks.compare.process.WORKERS", workers)
        bench = make_bench(tmp_path, {"penstock": Path(sys.executable)})
        return Worker(bench, Variant("penstock", "penstock"))

    return make


def test_last_words_of_an_engine_that_does_not_start(broken: Any) -> None:
    with pytest.raises(EngineFailed, match="no such luck"):
        broken("import sys; sys.exit('no such luck')")


def test_an_engine_that_lacks_what_is_asked_of_it(broken: Any) -> None:
    with pytest.raises(EngineFailed, match="not available: no int4"):
        broken("""print('{"unavailable": "no int4"}', flush=True)""")


def test_an_engine_that_dies_or_falls_short_later(broken: Any) -> None:
    short = broken(
        """print('{}', flush=True); input(); print('{"num_tokens": 3}', flush=True); input()"""
    )
    with pytest.raises(EngineFailed, match="3 tokens for 4"):
        short.run([[1]], [4])
    short.close()
    short.close()
    assert not Path(f"/proc/{short._process.pid}").exists() or short._process.poll() is not None


# --- the report ----------------------------------------------------------------------------------


def results() -> dict[str, Any]:
    records = [
        stream_record("vllm", 0, first_s=1.0, step_ms=20.0),
        stream_record("penstock", 0, first_s=0.5, step_ms=10.0),
        batch_record("penstock", 0, elapsed_s=4.0),
    ]
    weights = {"vllm": 10**9, "penstock": 10**9}
    row = summarise_online([Outcome(3, 0.1, 0.2)], 1.0, Objective())
    online = [{"engine": "penstock", "rate_per_s": 1.0, **row}]
    return {
        "machine": {"cpu": "A CPU", "cpus": 2, "cpu_flags": ["avx2"], "memory_gib": 24.0,
                    "torch": "2", "commit": "abc", "date": "2026-01-01"},
        "options": {"reference": "vllm", "online_lengths": "lengths",
                    "objective": {"ttft_s": 5.0, "tpot_ms": 250.0}},
        "summary": summarise(records, weights, 0, "vllm"),
        "ratios": same_round_ratios(records, [("penstock", "vllm")]),
        "online": online,
        "best_goodput": best_goodput(online),
        "process": report.process_rows({"vllm": [60.0, 30.0]}, {}, weights, {}),
        "agreement": agreement({"vllm": [[1]], "penstock": [[1]], "openvino": [[2]]}),
        "missing": {"llama": "not installed"},
        "records": records,
    }  # fmt: skip


def test_the_report_has_every_engine_and_says_who_is_missing(tmp_path: Path) -> None:
    text = "\n".join(report.lines(results()))
    assert "0.50" in text and "256.0" in text  # the ratio, and tokens a second
    assert "penstock / vllm" in text and "without llama: not installed" in text
    assert "0 of 1 whole  <- no" in text and text.count("<- no") == 1
    report.write(results(), tmp_path / "new" / "r.json")
    written = json.loads((tmp_path / "new" / "r.json").read_text())
    assert written["summary"]["penstock"]["batch"]["output_tok_s"] == 256.0


def test_panels_show_what_was_measured() -> None:
    found = {panel.title: list(rows) for panel, rows in panels(results())}
    assert found["16 × (256 + 64)"] == ["penstock"]
    assert found["Time per output token, context 128"] == ["penstock", "vllm"]
    assert "Time to first token, 1k tokens" not in found
    assert set(COLOURS) == set(LABELS) == set(BY_NAME)


def test_without_matplotlib_there_is_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.compare import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    plot.write(results(), tmp_path / "r.png", said.append)
    assert "matplotlib is not installed" in said[0]
    assert not (tmp_path / "r.png").exists()


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.compare import plot

    plot.write(results(), tmp_path / "r.png", lambda _: None)
    assert (tmp_path / "r.png").stat().st_size > 10_000


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="needs a shell")
def test_the_installer_knows_its_rivals() -> None:
    script = Path(report.__file__).with_name("install_rivals.sh")
    assert os.access(script, os.X_OK)
    done = subprocess.run([str(script), "/nowhere", "lama"], capture_output=True, text=True)
    assert done.returncode == 2 and "no rival is called lama" in done.stderr
