"""Plots of a report as SVG. The only place that needs matplotlib (the extra `penstock[plots]`).

Text and axes are drawn in a colour that is replaced by `currentColor`, so that a page may be light
or dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from penstock.simulator.report.table import name_of

Run = dict[str, Any]
#: Stands for the colour of the page's text.
_INK = "#010203"
#: Okabe and Ito's palette: told apart by everybody, on white and on black.
_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8F8F00", "#7F7F7F")
ROLE_COLOURS = {
    "prefill": "#E69F00",
    "decode": "#0072B2",
    "any": "#009E73",
    "prefill_to_decode": "#9AA7C0",
    "decode_to_prefill": "#D8B98A",
    "encode": "#CC79A7",
}
_STYLE: Any = {
    "text.parse_math": False,  # names may hold a $
    "svg.fonttype": "none",
    "svg.hashsalt": "penstock",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
#: Curves in one plot; more could not be told apart.
MAX_CURVES = len(_LINES)


def cdf(runs: Sequence[Run], key: str, title: str, slo_s: float | None) -> str:
    """Share of requests below a time; `key`: ttft_cdf_s or tpot_cdf_s."""

    def draw(axes: Axes) -> None:
        for colour, run in zip(_LINES, runs):
            if run[key]:
                axes.plot(
                    1e3 * np.array(run[key]), np.arange(101), color=colour, label=name_of(run)
                )
        if slo_s is not None:
            axes.axvline(1e3 * slo_s, color=_INK, linestyle="--", linewidth=1, label="SLO")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel(f"{title}, ms")
        axes.set_ylabel("% of requests")
        if axes.get_lines():
            axes.legend(fontsize=8)

    return _svg(draw)


def attainment(lines: Sequence[dict[str, Any]]) -> str:
    """Share of requests in SLO over the rate; `lines` are a report's `sweep`."""

    def draw(axes: Axes) -> None:
        for colour, line in zip(_LINES, lines):
            rates = [p["rate_per_s"] for p in line["points"]]
            shares = [100 * p["attainment"] for p in line["points"]]
            label = f"{line['policy']}, pd {line['pd']}"
            axes.plot(rates, shares, color=colour, marker="o", markersize=4, label=label)
        axes.axhline(100 * lines[0]["wanted"], color=_INK, linestyle="--", linewidth=1)
        axes.set_xlabel("requests a second")
        axes.set_ylabel("% within the SLO")
        axes.set_ylim(0, 102)
        axes.legend(fontsize=8)

    return _svg(draw)


def roles(run: Run) -> str:
    """Each instance over time, in the colour of its role, the more so the busier it is; of large
    clusters, how many have each role."""
    line = run["timeline"]
    if "instances" not in line:
        return _role_counts(line)
    instances = line["instances"]

    def draw(axes: Axes) -> None:
        at_s = np.array(line["at_s"])
        before_s = np.concatenate([[0.0], at_s[:-1]])
        for row, instance in enumerate(instances):
            busy = np.clip(np.array(instance["busy"]), 0, 1)
            for role, colour in ROLE_COLOURS.items():
                mine = np.array([r == role for r in instance["roles"]])
                spans = list(zip(before_s[mine], (at_s - before_s)[mine]))
                if spans:
                    rgba = [(*matplotlib.colors.to_rgb(colour), 0.2 + 0.8 * b) for b in busy[mine]]
                    axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=rgba, linewidth=0)
        axes.set_yticks(range(len(instances)), [i["name"] for i in instances])
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xlabel("seconds")
        seen = {r for i in instances for r in i["roles"]}
        _role_legend(axes, [role for role in ROLE_COLOURS if role in seen])

    return _svg(draw, height=max(1.6, 0.9 + 0.24 * len(instances)))


def load(run: Run) -> str:
    """Busy share and KV in use, and requests running and waiting, over time."""
    line = run["timeline"]

    def draw(axes: Axes) -> None:
        at_s = line["at_s"]
        axes.plot(at_s, 100 * np.array(line["busy"]), color=_LINES[0], label="busy, %")
        axes.plot(at_s, 100 * np.array(line["kv_used"]), color=_LINES[2], label="KV in use, %")
        axes.set_ylim(0, 105)
        axes.set_ylabel("% of the cluster")
        axes.set_xlabel("seconds")
        other = axes.twinx()
        other.spines["right"].set_visible(True)
        other.plot(at_s, line["running"], color=_LINES[1], label="running")
        other.plot(at_s, line["waiting"], color=_LINES[5], label="waiting")
        other.set_ylabel("requests")
        other.set_ylim(bottom=0)
        other.grid(False)
        handles = [*axes.get_lines(), *other.get_lines()]
        axes.legend(handles, [str(h.get_label()) for h in handles], fontsize=8, ncols=4,
                    loc="lower left", bbox_to_anchor=(0, 1))  # fmt: skip

    return _svg(draw)


def _role_counts(line: dict[str, Any]) -> str:
    def draw(axes: Axes) -> None:
        present = [role for role in ROLE_COLOURS if role in line["roles"]]
        axes.stackplot(
            line["at_s"],
            [line["roles"][role] for role in present],
            colors=[ROLE_COLOURS[role] for role in present],
        )
        axes.set_xlabel("seconds")
        axes.set_ylabel("instances")
        _role_legend(axes, present)

    return _svg(draw)


def _role_legend(axes: Axes, present: Sequence[str]) -> None:
    axes.legend(
        handles=[Patch(color=ROLE_COLOURS[r], label=r.replace("_", " ")) for r in present],
        fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1),
    )  # fmt: skip


def _svg(draw: Callable[[Axes], None], height: float = 3.0) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.0, height), layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def scoped(svg: str, place: int) -> str:
    """Of several plots in one page, the ids of each begin with its place."""
    svg = re.sub(r'\bid="', f'id="p{place}-', svg)
    return re.sub(r"(url\(#|href=\"#)", rf"\1p{place}-", svg)
