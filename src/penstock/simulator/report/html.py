"""A report as one HTML file that needs nothing else: tables, and plots as SVG where it can."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from html import escape
from types import ModuleType
from typing import Any

from penstock.simulator.report.table import (
    COLUMNS,
    cells,
    headline,
    name_of,
    number,
    pool_lines,
    share,
    sweep_lines,
)

NO_PLOTS = "There are no plots: pip install matplotlib, where penstock is, brings what draws them."
#: Runs with plots of their own.
_DETAILED = 24
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }}
th, td {{ padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; }}
th {{ vertical-align: bottom; }}
.left {{ text-align: left; }}
.wide {{ overflow-x: auto; }}
svg {{ max-width: 100%; height: auto; }}
h2 {{ margin-top: 2.5rem; }}
pre {{ overflow-x: auto; border: 1px solid var(--line); padding: 0.8rem; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def render(report: dict[str, Any]) -> str:
    """The page. Names in it may come from anybody: all text is escaped."""
    plots = find_plots()
    about = report["about"]
    parts = [
        _tag("h1", "Simulation: " + about["cluster_name"]),
        _tag("p", headline(about)),
        _table(report),
        *(_tag("p", line) for line in report["unmet"]),
    ]
    if plots is None:
        parts.append(_tag("p", NO_PLOTS))
    parts += _sweep(report, plots)
    if plots is not None:
        parts += _distributions(report, plots)
    for run in report["runs"][:_DETAILED]:
        parts += _run(run, plots)
    if len(report["runs"]) > _DETAILED:
        left = len(report["runs"]) - _DETAILED
        parts.append(_tag("p", f"{left} further runs stand in report.json with their time lines."))
    parts += [_tag("h2", "The cluster"), _tag("pre", about["cluster"])]
    parts.append(_tag("p", "Made by penstock " + about["penstock"] + "."))
    if plots is not None:
        parts = [
            plots.scoped(part, place) if part.startswith("<svg") else part
            for place, part in enumerate(parts)
        ]
    return _PAGE.format(title=escape("Simulation: " + about["cluster_name"]), body="\n".join(parts))


def find_plots() -> ModuleType | None:
    """None without matplotlib."""
    try:
        from penstock.simulator.report import plots
    except ImportError as exc:
        if (exc.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
    return plots


def _tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _table(report: dict[str, Any]) -> str:
    heads = "".join(
        f'<th{_class(c.left)} title="{escape(c.means)}">{escape(c.title)}</th>' for c in COLUMNS
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f"<td{_class(c.left)}>{escape(cell)}</td>" for c, cell in zip(COLUMNS, cells(run))
        )
        + "</tr>"
        for run in report["runs"]
    )
    return _wide(f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>")


def _class(left: bool) -> str:
    return ' class="left"' if left else ""


def _wide(rows: str) -> str:
    return f'<div class="wide"><table>\n{rows}\n</table></div>'


def _sweep(report: dict[str, Any], plots: ModuleType | None) -> list[str]:
    if not report["sweep"]:
        return []
    parts = [_tag("h2", "Attainment over rate"), _list(sweep_lines(report))]
    if plots is not None:
        parts += _in_groups(report["sweep"], plots.MAX_CURVES, plots.attainment)
    rows = "".join(
        f'<tr><td class="left">{escape(line["policy"])}</td>'
        f'<td class="left">{escape(line["pd"])}</td>'
        f"<td>{number(p['rate_per_s'], 2)}</td><td>{share(p['attainment'])}</td></tr>"
        for line in report["sweep"]
        for p in line["points"]
    )
    head = (
        '<tr><th class="left">policy</th><th class="left">pd</th><th>req/s</th><th>in SLO</th></tr>'
    )
    return [*parts, _wide(head + rows)]


def _distributions(report: dict[str, Any], plots: ModuleType) -> list[str]:
    slo, parts = report["about"]["slo"], [_tag("h2", "Distributions"), '<div class="plots">']
    for key, title, slo_s in (
        ("ttft_cdf_s", "TTFT", slo["ttft_s"]),
        ("tpot_cdf_s", "TPOT", slo["tpot_s"]),
    ):

        def draw(runs: list[dict[str, Any]], of: tuple[Any, ...] = (key, title, slo_s)) -> str:
            return str(plots.cdf(runs, *of))

        parts += _in_groups(report["runs"], plots.MAX_CURVES, draw)
    return [*parts, "</div>"]


def _run(run: dict[str, Any], plots: ModuleType | None) -> list[str]:
    parts = [_tag("h2", name_of(run)), _list(pool_lines(run))]
    if plots is not None and run["timeline"]["at_s"]:
        parts += [plots.roles(run), plots.load(run)]
    if changes := run["role_changes"]:
        said = [f"{c['at_s']:,.1f} s: {c['instance']} is {c['role']}" for c in changes]
        inside = _tag("summary", f"{len(changes)} changes of role") + _list(said)
        parts.append(f"<details>{inside}</details>")
    parts.append(
        _tag("p", f"digest {run['simulated']['digest']}") if run["simulated"]["digest"] else ""
    )
    return parts


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(_tag("li", line) for line in lines) + "</ul>"


def _in_groups(
    items: list[dict[str, Any]], most: int, draw: Callable[[list[dict[str, Any]]], str]
) -> list[str]:
    return [draw(items[first : first + most]) for first in range(0, len(items), most)]


def to_json(report: dict[str, Any]) -> str:
    """Strict JSON: no NaN, no infinity."""
    return json.dumps(report, indent=1, allow_nan=False)
