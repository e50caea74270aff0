"""The results file, and what is printed of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare.tasks import TASKS

Results = Mapping[str, Any]
_GIB = 2**30
#: Columns of a table by metric: heading, figure, format.
_STREAM = (
    ("TTFT s", "ttft_s", "{:.3f}"),
    ("× ref", "ttft_s_ratio", "{:.2f}"),
    ("TPOT ms", "tpot_ms", "{:.1f}"),
    ("× ref", "tpot_ms_ratio", "{:.2f}"),
    ("× floor", "over_floor", "{:.2f}"),
    ("with KV", "over_floor_with_kv", "{:.2f}"),
)
_BATCH = (("output tok/s", "output_tok_s", "{:.1f}"), ("× ref", "output_tok_s_ratio", "{:.2f}"))
_COMMON = (
    ("rounds", "rounds", "{:.0f}"),
    ("GB/s", "bandwidth_gb_s", "{:.0f}"),
    ("TFLOP/s", "matrix_tflops", "{:.2f}"),
)
_ONLINE = (
    ("rate/s", "rate_per_s", "{:.2f}"),
    ("goodput/s", "goodput_per_s", "{:.2f}"),
    ("met", "attainment", "{:.0%}"),
    *((f"TTFT p{p} s", f"ttft_p{p}_s", "{:.2f}") for p in (50, 90, 99)),
    *((f"TPOT p{p} ms", f"tpot_p{p}_ms", "{:.0f}") for p in (50, 90, 99)),
)
_PROCESS = (
    ("start s", "warm_start_s", "{:.1f}"),
    ("first start s", "first_start_s", "{:.1f}"),
    ("peak GiB", "peak_gib", "{:.2f}"),
    ("PSS GiB", "pss_gib", "{:.2f}"),
    ("weights GiB", "weights_gib", "{:.2f}"),
    ("overhead MiB", "overhead_mib", "{:.0f}"),
)


def write(results: Results, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def lines(results: Results) -> Iterator[str]:
    machine = results["machine"]
    yield (
        f"{machine['cpu']}, {machine['cpus']} CPUs ({' '.join(machine['cpu_flags'])}), "
        f"{machine['memory_gib']} GiB, torch {machine['torch']}, {machine['commit']}"
    )
    yield f"reference: {results['options']['reference']}; ratios are medians of same-round ratios"
    for name, task in TASKS.items():
        rows = {
            engine: tasks[name] for engine, tasks in results["summary"].items() if name in tasks
        }
        if rows:
            columns = _BATCH if task.context_tokens is None else _STREAM
            yield ""
            yield task.title
            yield from table(rows.items(), (*columns, *_COMMON))
    if results["ratios"]:
        yield ""
        yield "ours over theirs in the same round, with weights of as many bits"
        yield from ratio_table(results["ratios"])
    if results["online"]:
        yield ""
        yield f"online: Poisson arrivals, {results['options']['online_lengths']}"
        yield from table(((row["engine"], row) for row in results["online"]), _ONLINE)
        for engine, best in results["best_goodput"].items():
            yield (
                f"best goodput of {engine}: {best['goodput_per_s']:.2f}/s at "
                f"{best['rate_per_s']:.2f}/s"
            )
    if results["process"]:
        yield ""
        yield "processes: start to first token, and memory"
        yield from table(results["process"].items(), _PROCESS)
    if results["agreement"]:
        yield ""
        yield "the same model? Greedy tokens beside what most engines say"
        for engine, same in results["agreement"].items():
            doubt = "  <- no" if 2 * same["same_first_token"] < same["prompts"] else ""
            yield (
                f"  {engine:15} {same['same_first_token']} of {same['prompts']} first tokens, "
                f"{same['same_tokens']} of {same['prompts']} whole{doubt}"
            )
    for engine, why in results["missing"].items():
        yield f"without {engine}: {why}"


def table(rows: Any, columns: tuple[tuple[str, str, str], ...]) -> Iterator[str]:
    """A line for each (name, figures); a dash where there is no figure."""
    present = list(rows)
    used = [c for c in columns if any(figures.get(c[1]) is not None for _, figures in present)]
    widths = [max(len(heading), 7) for heading, _, _ in used]
    margin = max((len(name) for name, _ in present), default=0)
    heads = (f"{heading:>{width}}" for (heading, _, _), width in zip(used, widths, strict=True))
    yield f"  {'':{margin}}  " + "  ".join(heads)
    for name, figures in present:
        cells = []
        for (_, key, form), width in zip(used, widths, strict=True):
            value = figures.get(key)
            cells.append(f"{'–' if value is None else form.format(value):>{width}}")
        yield f"  {name:{margin}}  " + "  ".join(cells)


def ratio_table(ratios: list[Mapping[str, Any]]) -> Iterator[str]:
    """A row for each pair, a column for each task and metric."""
    keys = dict.fromkeys((row["task"], row["metric"]) for row in ratios)
    short = {"ttft_s": "TTFT", "tpot_ms": "TPOT", "output_tok_s": "tok/s"}
    columns = tuple(
        (f"{short[metric]} {task.removeprefix('context_')}", f"{task}/{metric}", "{:.2f}")
        for task, metric in keys
    )
    rows: dict[str, dict[str, float]] = {}
    for row in ratios:
        name = f"{row['ours']} / {row['theirs']}"
        rows.setdefault(name, {})[f"{row['task']}/{row['metric']}"] = row["ratio"]
    yield from table(rows.items(), columns)


def process_rows(
    starts_s: Mapping[str, list[float]],
    memory: Mapping[str, Mapping[str, int]],
    weight_bytes: Mapping[str, int],
    overhead_bytes: Mapping[str, int],
) -> dict[str, dict[str, float]]:
    """What is said of each engine as a process. The first start may have found cold caches."""
    rows: dict[str, dict[str, float]] = {}
    for engine, starts in starts_s.items():
        row = rows[engine] = {"first_start_s": starts[0], "warm_start_s": starts[-1]}
        if engine in memory:
            row["peak_gib"] = memory[engine]["peak_bytes"] / _GIB
            row["pss_gib"] = memory[engine]["pss_bytes"] / _GIB
            row["weights_gib"] = weight_bytes[engine] / _GIB
        if engine in overhead_bytes:
            row["overhead_mib"] = overhead_bytes[engine] / 2**20
    return rows
