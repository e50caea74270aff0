"""The results as a picture, from the results file's own figures.

    python -m benchmarks.compare.plot RESULTS.json [OUT.png]

Needs matplotlib (`pip install 'penstock[bench]'`); without it there is a word and no picture.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare.engines import VARIANTS

#: Ours in one strong colour, paler with fewer bits; rivals in quiet ones.
COLOURS = {
    "penstock": "#0b6e8a",
    "penstock-int8": "#3a9cb8",
    "penstock-int8-kv8": "#5cb1c9",
    "penstock-int4": "#7cc3d6",
    "vllm": "#6b6b6b",
    "openvino": "#9a8c6f",
    "openvino-int8": "#bfb193",
    "llama": "#a58a97",
    "llama-q8_0": "#bda6b1",
    "llama-q4_0": "#d5c4cc",
    "transformers": "#b4b4b4",
}
LABELS = {
    "penstock": "Penstock bf16",
    "penstock-int8": "Penstock int8",
    "penstock-int8-kv8": "Penstock int8, KV int8",
    "penstock-int4": "Penstock int4",
    "vllm": "vLLM bf16",
    "openvino": "OpenVINO bf16",
    "openvino-int8": "OpenVINO int8",
    "llama": "llama.cpp bf16",
    "llama-q8_0": "llama.cpp Q8_0",
    "llama-q4_0": "llama.cpp Q4_0",
    "transformers": "transformers bf16",
}


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    task: str
    metric: str
    less_is_better: bool


PANELS = (
    Panel("Time per output token, context 128", "ms", "context_128", "tpot_ms", True),
    Panel("Time per output token, context 1k", "ms", "context_1024", "tpot_ms", True),
    Panel("Time per output token, context 4k", "ms", "context_4096", "tpot_ms", True),
    Panel("Time to first token, 128 tokens", "s", "context_128", "ttft_s", True),
    Panel("Time to first token, 1k tokens", "s", "context_1024", "ttft_s", True),
    Panel("Time to first token, 4k tokens", "s", "context_4096", "ttft_s", True),
    Panel("16 × (256 + 64)", "output tok/s", "batch", "output_tok_s", False),
    Panel("ShareGPT's lengths / 8", "output tok/s", "mixed", "output_tok_s", False),
    Panel("16 prompts, 70 % shared", "output tok/s", "prefix", "output_tok_s", False),
)


def panels(results: Mapping[str, Any]) -> list[tuple[Panel, dict[str, Mapping[str, float]]]]:
    """The panels that have figures, with each engine's, in the order of the engines' table."""
    found = []
    for panel in PANELS:
        rows = {
            variant.name: results["summary"][variant.name][panel.task]
            for variant in VARIANTS
            if panel.metric in results["summary"].get(variant.name, {}).get(panel.task, {})
        }
        if rows:
            found.append((panel, rows))
    return found


def write(results: Mapping[str, Any], file: Path, say: Callable[[str], None]) -> None:
    try:
        import matplotlib
    except ImportError:
        say("no plot: matplotlib is not installed (pip install 'penstock[bench]')")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = panels(results)
    online = results["online"]
    count = len(drawn) + 2 * bool(online)
    if not count:
        return
    columns = min(3, count)
    rows = -(-count // columns)
    engines = max((len(figures) for _, figures in drawn), default=4)
    size = (4.9 * columns, rows * max(2.3, 0.75 + 0.3 * engines) + 0.9)
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"}):
        figure, grid = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        places = list(grid.flat)
        for (panel, figures), axes in zip(drawn, places, strict=False):
            _bars(axes, panel, figures)
        if online:
            _goodput(places[len(drawn)], online)
            _first_tokens(places[len(drawn) + 1], online, results["options"]["objective"])
        for axes in places[count:]:
            axes.remove()
        figure.suptitle(_heading(results), fontsize=10)
        figure.savefig(file, dpi=150)
        plt.close(figure)
    say(f"written: {file}")


def _heading(results: Mapping[str, Any]) -> str:
    machine, reference = results["machine"], results["options"]["reference"]
    heading = (
        f"{machine['cpu']}, {machine['cpus']} CPUs · random Qwen3-0.6B · medians, "
        f"{machine['date']}\nthin marks: the floor, the weights' bytes over the read bandwidth "
        "of the same repeat"
    )
    if reference not in results["summary"]:
        return heading
    return f"{heading} · ×: median ratio to {LABELS[reference]} in the same round"


def _bars(axes: Any, panel: Panel, rows: Mapping[str, Mapping[str, float]]) -> None:
    names = list(rows)
    values = [rows[name][panel.metric] for name in names]
    places = _places(names)
    axes.barh(places, values, color=[COLOURS[name] for name in names], height=0.72)
    for place, value, name in zip(places, values, names, strict=True):
        ratio = rows[name].get(f"{panel.metric}_ratio")
        text = _short(value) + (f"   {ratio:.2f} ×" if ratio is not None else "")
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
        if panel.metric == "tpot_ms":
            floor = value / rows[name]["over_floor"]
            axes.plot([floor, floor], [place - 0.36, place + 0.36], color="black", linewidth=1.1)
    axes.set_yticks(places, [LABELS[name] for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name.startswith("penstock") else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(values))
    axes.set_title(panel.title, loc="left")
    better = "less is better" if panel.less_is_better else "more is better"
    axes.set_xlabel(f"{panel.unit} ({better})")
    _quiet(axes)


def _places(names: list[str]) -> list[float]:
    """One below the other, a little apart where the number of bits changes."""
    bits = {variant.name: variant.bits for variant in VARIANTS}
    places, place = [], 0.0
    for before, name in zip([names[0], *names], names, strict=False):
        place += 1.0 if bits[before] == bits[name] else 1.35
        places.append(place)
    return places


def _goodput(axes: Any, online: list[Mapping[str, Any]]) -> None:
    for name, rows in _by_engine(online).items():
        rates = [row["rate_per_s"] for row in rows]
        axes.plot(rates, [row["goodput_per_s"] for row in rows], "o-", color=COLOURS[name],
                  label=LABELS[name])  # fmt: skip
    limit = max(row["rate_per_s"] for row in online)
    axes.plot([0, limit], [0, limit], color="black", linewidth=0.6, linestyle=":")
    axes.set_xlim(0, 1.05 * limit)
    axes.set_ylim(0, 1.05 * limit)
    axes.set_title("Goodput, Azure Conversation / 4", loc="left")
    axes.set_xlabel("arrivals per second")
    axes.set_ylabel("requests in time per second")
    axes.legend(frameon=False, fontsize=8)
    _quiet(axes)


def _first_tokens(
    axes: Any, online: list[Mapping[str, Any]], objective: Mapping[str, float]
) -> None:
    for name, rows in _by_engine(online).items():
        rates = [row["rate_per_s"] for row in rows]
        axes.plot(rates, [row["ttft_p50_s"] for row in rows], "o-", color=COLOURS[name],
                  label=f"{LABELS[name]}, p50")  # fmt: skip
        axes.plot(rates, [row["ttft_p90_s"] for row in rows], "^--", color=COLOURS[name],
                  label="p90", markersize=4)  # fmt: skip
    axes.axhline(objective["ttft_s"], color="black", linewidth=0.6, linestyle=":")
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    axes.set_title("Time to first token under load", loc="left")
    axes.set_xlabel("arrivals per second (dotted: the objective)")
    axes.set_ylabel("s")
    axes.legend(frameon=False, fontsize=8)
    _quiet(axes)


def _by_engine(online: list[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    names = dict.fromkeys(row["engine"] for row in online)
    return {
        name: sorted((row for row in online if row["engine"] == name),
                     key=lambda row: row["rate_per_s"])
        for name in names
    }  # fmt: skip


def _quiet(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2)


def _short(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    file, *out = (Path(word) for word in sys.argv[1:])
    results = json.loads(file.read_text(encoding="utf-8"))
    write(results, out[0] if out else file.with_suffix(".png"), print)


if __name__ == "__main__":
    main()
