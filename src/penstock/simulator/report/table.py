"""The comparison as tables of text: what the terminal and the HTML both show.

A report is `comparison.compare`'s dict; a column turns one of its runs into the text of one cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from penstock.simulator.quantities import counted
from penstock.simulator.report.unmet import held_line

Run = dict[str, Any]
#: For what does not exist.
NONE = "–"


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    cell: Callable[[Run], str]
    #: What it is, for whoever points at it.
    means: str
    left: bool = False


def number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}%"


def _ms(times: dict[str, float | None]) -> str:
    """p50/p90/p99 in milliseconds."""
    values = [times[p] for p in ("p50", "p90", "p99")]
    if values[0] is None:
        return NONE
    digits = 0 if values[0] >= 0.1 else 1
    return " / ".join(number(None if v is None else 1e3 * v, digits) for v in values)


def _cost(run: Run) -> str:
    return NONE if run["cost"] is None else number(run["cost"]["usd_per_million_output_tokens"], 2)


def _speed(run: Run) -> str:
    return f"{run['speed']:g}"


COLUMNS = (
    Column("policy", lambda r: str(r["policy"]), "where requests go", left=True),
    Column("pd", lambda r: str(r["pd"]), "prefill and decode apart?", left=True),
    Column("speed", _speed, "times as fast as the trace was recorded"),
    Column("req/s", lambda r: number(r["rate_per_s"], 2), "requests that arrive a second"),
    Column("in SLO", lambda r: share(r["attainment"]), "requests within both SLOs"),
    Column("goodput req/s", lambda r: number(r["goodput_per_s"], 2), "requests a second in SLO"),
    Column("tok/s", lambda r: number(r["goodput_tokens_per_s"]), "their output tokens a second"),
    Column("TTFT ms p50/p90/p99", lambda r: _ms(r["ttft_s"]), "time to the first token"),
    Column("TPOT ms p50/p90/p99", lambda r: _ms(r["tpot_s"]), "time per token after the first"),
    Column("busy", lambda r: share(r["utilisation"]["mean"]), "time that instances computed"),
    Column("KV hits", lambda r: share(r["kv_hit_rate"]), "prompt tokens found in a cache"),
    Column("turns", lambda r: str(len(r["role_changes"])), "changes of role"),
    Column("moved", lambda r: str(r["handovers"]), "hand-overs from prefill to decode"),
    Column("preempted", lambda r: str(r["preemptions"]), "sequences that gave up their KV"),
    Column("no answer", lambda r: str(r["refused"] + r["failed"]), "requests refused or failed"),
    Column("$/M out", _cost, "price of the GPUs over a million output tokens"),
    Column(
        "sim speed",
        lambda r: f"{r['simulated']['seconds_per_wall_s']:,.0f}×",
        "simulated seconds per real second",
    ),
)
#: The first columns say which run it is; narrower terminals get the rest in two tables.
_KEYS, _HALF, _WIDE = 3, 9, 175


def cells(run: Run) -> list[str]:
    return [column.cell(run) for column in COLUMNS]


def pool_lines(run: Run) -> list[str]:
    """ "h100: 4 busy 38.0%, KV 2.1% (at most 9.0%)" of each pool, then of each role; and what was
    held where the SLO was not."""
    use = run["utilisation"]
    lines = [
        f"{p['name']}: {counted(p['instances'], 'instance')} of {p['hardware']}, "
        f"busy {share(p['busy'])}, "
        f"KV {share(p['kv_used_mean'])} (at most {share(p['kv_used_max'])})"
        for p in use["pools"]
    ]
    if len(use["roles"]) > 1:
        lines += [
            f"as {r['role'].replace('_', ' ')}: {number(r['instances_mean'])} instances on "
            f"average, busy {share(r['busy'])}"
            for r in use["roles"]
        ]
    return lines + [line for line in [held_line(run), *run["idle_faults"]] if line]


def name_of(run: Run) -> str:
    return f"{run['policy']}, pd {run['pd']}, speed {run['speed']:g}"


def sweep_lines(report: dict[str, Any]) -> list[str]:
    """ "slo-aware, pd auto: 90% in SLO up to 31.2 req/s" """
    lines = []
    for line in report["sweep"]:
        wanted = f"{100 * line['wanted']:g}% within the SLO"
        rates = [p["rate_per_s"] for p in line["points"]]
        shares = [p["attainment"] for p in line["points"]]
        if line["rate_per_s"] is not None:
            said = f"{wanted} up to {number(line['rate_per_s'], 2)} req/s"
        elif shares[0] < line["wanted"]:
            said = f"less than {wanted} already at {number(rates[0], 2)} req/s"
        else:
            said = f"{wanted} even at {number(rates[-1], 2)} req/s"
        lines.append(f"{line['policy']}, pd {line['pd']}: {said}")
    return lines


def print_tables(report: dict[str, Any], console: Console) -> None:
    about = report["about"]
    console.print(Text(headline(about)))
    halves = (COLUMNS[:_KEYS] + COLUMNS[_KEYS:_HALF], COLUMNS[:_KEYS] + COLUMNS[_HALF:])
    for columns in (COLUMNS,) if console.width >= _WIDE else halves:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column.title, justify="left" if column.left else "right")
        for run in report["runs"]:
            table.add_row(*(Text(column.cell(run)) for column in columns))
        console.print(table)
    for run in report["runs"]:
        console.print(
            Text(f"\n{name_of(run)}"), *(Text(f"  {x}") for x in pool_lines(run)), sep="\n"
        )
    if report["sweep"]:
        console.print(Text("\n" + "\n".join(sweep_lines(report))))
    if report["unmet"]:
        console.print(Text("\n" + "\n".join(report["unmet"])))


def headline(about: dict[str, Any]) -> str:
    slo = about["slo"]
    wanted = [
        f"{name.upper()} {1e3 * slo[key]:g} ms"
        for name, key in (("ttft", "ttft_s"), ("tpot", "tpot_s"))
        if slo[key] is not None
    ]
    return (
        f"{about['cluster_name']}: {counted(about['instances'], 'instance')}, "
        f"{counted(about['gpus'], 'GPU')}; {about['trace']}: "
        f"{counted(about['requests'], 'request')} in {about['trace_seconds']:,.0f} s, "
        f"{about['mean_input_tokens']:,.0f} + {about['mean_output_tokens']:,.0f} tokens on average;"
        f" SLO: {', '.join(wanted) or 'none'}"
    )
