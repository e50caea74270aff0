"""What `penstock top` shows: a report and a size in, something that rich can print out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from penstock import PROJECT
from penstock.service.recent import Summary
from penstock.service.report import ClusterReport, InstanceReport

_STATE_STYLES = {
    "active": "green",
    "connecting": "cyan",
    "suspect": "yellow",
    "lost": "bold red",
    "refused": "bold yellow",
    "draining": "magenta",
    "drained": "bright_black",
}
_ROLES = {
    "any": "any",
    "encode": "E",
    "prefill": "P",
    "decode": "D",
    "prefill_to_decode": "P→D",
    "decode_to_prefill": "D→P",
}
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"
_DIM = "bright_black"


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    width: int
    #: The lowest stay in a narrow terminal.
    rank: int
    cell: Callable[[InstanceReport, ClusterReport], Text]
    right: bool = True


def view(
    report: ClusterReport | None, url: str, trouble: str, history: Sequence[float], width: int
) -> RenderableType:
    """`trouble`: why there is no (fresh) report, "" if there is one. `history`: tokens a second."""
    if report is None:
        return Group(_title(url, None, width), Text(), _waiting(trouble), Text(), _keys(width))
    parts: list[RenderableType] = [_title(url, report, width)]
    if trouble:
        parts.append(_waiting(trouble))
    parts += [_service(report, not trouble, history, width), *_latency(report, width)]
    parts.append(_instances(report, width))
    refusals = [(i.name, i.refusal) for i in report.instances if i.refusal]
    parts += [_line(Text(f" {name}: {why}", style="yellow"), width) for name, why in refusals]
    if report.reason and not refusals:
        parts.append(_line(Text(f" {report.reason}", style="yellow"), width))
    return Group(*parts, _keys(width))


# --- the head ------------------------------------------------------------------------------------


def _title(url: str, report: ClusterReport | None, width: int) -> Text:
    left = Text.assemble((f" {PROJECT} top ", "bold"), (f" {url} ", "cyan"))
    if report is None:
        return _line(left, width)
    left.append(f" {report.model}", style="bold")
    right = Text(f"up {_span(report.uptime_s)} ", style=_DIM)
    if report.policy:
        right = Text.assemble((f"{report.policy}  ", "blue"), right)
    return _spread(left, right, width)


def _waiting(trouble: str) -> Text:
    return Text(f" ● waiting: {trouble}", style="bold red")


def _service(report: ClusterReport, fresh: bool, history: Sequence[float], width: int) -> Text:
    t = report.totals
    ready = ("● ready", "green") if report.ready else ("● not ready", "bold red")
    if not fresh:
        ready = ("○ as it was", "yellow")
    text = Text.assemble(" ", ready, "  ")
    for value, unit in (
        (_number(t.requests_per_s), "req/s"),
        (_number(t.tokens_per_s), "tok/s"),
        (str(t.waiting), "waiting"),
        (str(t.running), "running"),
    ):
        text.append(f" {value}", style="bold").append(f" {unit} ", style=_DIM)
    quiet = (("resumed", t.resumed), ("handed over", t.handovers), ("migrated", t.migrated))
    for word, count in (*quiet, ("role changes", t.role_changes)):
        if count and text.cell_len + len(f" {count} {word} ") <= width:
            text.append(f" {count}", style="bold").append(f" {word} ", style=_DIM)
    room = width - text.cell_len - 1
    if room >= 8 and any(history):
        return _spread(text, Text(_sparkline(history, min(room - 2, 40)) + " ", "green"), width)
    return _line(text, width)


def _latency(report: ClusterReport, width: int) -> list[Text]:
    """In one line, or two where one is too short."""
    ttft = Text.assemble(*_times("TTFT", report.ttft_s, report.slo.ttft_s))
    tpot = Text.assemble(*_times("TPOT", report.tpot_s, report.slo.tpot_s))
    rest = Text()
    t = report.totals
    bad = t.finished.get("error", 0) + sum(t.refused.values())
    if bad:
        rest.append(f"   {bad}", style="bold yellow").append(" refused or failed", style=_DIM)
    if report.leader is not None:
        rest.append("   leader ", style=_DIM).append(report.leader)
    if ttft.cell_len + tpot.cell_len + 3 <= width:
        return [_line(Text.assemble(ttft, "   ", tpot, rest), width)]
    return [_line(Text.assemble(ttft, rest), width), _line(tpot, width)]


def _times(name: str, found: Summary, slo_s: float | None) -> list[tuple[str, str]]:
    parts = [(f" {name} ", _DIM), ("p50 ", _DIM), (_time(found.p50), "bold")]
    parts += [(" p99 ", _DIM), (_time(found.p99), "bold")]
    if slo_s is not None:
        parts.append((f" SLO {_time(slo_s)}", _DIM))
        if found.within_slo is not None:
            style = "green" if found.within_slo >= 0.99 else "bold red"
            parts.append((f" {100 * found.within_slo:.0f}% in", style))
    return parts


# --- instances -----------------------------------------------------------------------------------


def _instances(report: ClusterReport, width: int) -> RenderableType:
    if not report.instances:
        return Padding(Text("no instance yet", style=_DIM), (1, 1))
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold",
        border_style=_DIM,
    )  # fmt: skip
    columns = _fitting(_columns(report), width - 2)
    for column in columns:
        table.add_column(
            column.title,
            width=column.width,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if column.right else "left",
        )
    for instance in report.instances:
        table.add_row(*(column.cell(instance, report) for column in columns))
    return Padding(table, (0, 0, 0, 1))


def _columns(report: ClusterReport) -> list[Column]:
    longest = max(len(i.name) for i in report.instances)
    columns = [
        Column("instance", max(8, min(longest, 24)), 0, lambda i, _: Text(i.name), right=False),
        Column("role", 4, 0, lambda i, _: Text(_ROLES.get(i.role, i.role)), right=False),
        Column("state", 10, 0, lambda i, _: _state(i), right=False),
        Column("wait", 4, 0, lambda i, _: _count(i.queue)),
        Column("run", 4, 0, lambda i, _: _count(i.running)),
        *(_tier_column(tier) for tier in _tiers(report)),
        Column("ttft", 6, 2, lambda i, r: _of_slo(i.ttft_s, r.slo.ttft_s)),
        Column("tpot", 6, 2, lambda i, r: _of_slo(i.tpot_s, r.slo.tpot_s)),
        Column("hits", 4, 4, lambda i, _: Text(_hits(i))),
        Column("pred", 5, 5, lambda i, _: Text(_ratio(i.ttft_ratio))),
        Column("step", 6, 5, lambda i, _: Text(_time(i.steps.mean_s if i.steps else None))),
        Column("turns", 5, 6, lambda i, _: Text(str(i.role_changes))),
        Column("pid", 7, 7, lambda i, _: Text("–" if i.pid is None else str(i.pid))),
        Column("device", 6, 8, lambda i, _: Text(i.device or "–"), right=False),
        Column("address", 32, 9, lambda i, _: Text(i.address or "–", style=_DIM), right=False),
    ]
    return columns


def _fitting(columns: list[Column], width: int) -> list[Column]:
    """Those of the lowest ranks that fit beside each other, in their order."""
    kept: list[Column] = []
    left = width
    for column in sorted(columns, key=lambda c: c.rank):
        if column.rank and column.width + 2 > left:
            break
        kept.append(column)
        left -= column.width + 2
    return [column for column in columns if column in kept]


def _tiers(report: ClusterReport) -> list[str]:
    found = [tier for i in report.instances if i.kv for tier in i.kv.tiers]
    return list(dict.fromkeys(["device", *found]))


def _tier_column(tier: str) -> Column:
    title = "kv" if tier == "device" else tier

    def cell(instance: InstanceReport, _: ClusterReport) -> Text:
        use = instance.kv.tiers.get(tier) if instance.kv else None
        if use is None:
            return Text("–", style=_DIM)
        if not use.total:
            return Text(f"{use.used} blocks")
        # On the device what is kept for reuse is given up on demand: it fills, but never up.
        busy = instance.kv.used if tier == "device" and instance.kv else use.used
        return _bar(busy / use.total, use.used / use.total, 10)

    return Column(title, 15, 1 if tier == "device" else 3, cell, right=False)


def _bar(busy: float, filled: float, cells: int) -> Text:
    """`busy` in colour, what is beyond it up to `filled` in grey, and the first in percent."""
    busy, filled = min(max(busy, 0.0), 1.0), min(max(filled, 0.0), 1.0)
    style = "green" if busy < 0.8 else "yellow" if busy < 0.95 else "bold red"
    eighths = round(busy * cells * 8)
    solid = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    reusable = max(0, round(filled * cells) - len(solid))
    empty = cells - len(solid) - reusable
    return Text.assemble(
        (solid, style), ("▒" * reusable, _DIM), ("·" * empty, _DIM), (f" {100 * busy:3.0f}%", style)
    )


def _state(instance: InstanceReport) -> Text:
    word = "draining" if instance.draining and instance.state == "active" else instance.state
    return Text(word, style=_STATE_STYLES.get(word, ""))


def _count(value: int) -> Text:
    return Text(str(value), style="" if value else _DIM)


def _of_slo(found: Summary | None, slo_s: float | None) -> Text:
    if found is None or found.p50 is None:
        return Text("–", style=_DIM)
    missed = slo_s is not None and found.p50 > slo_s
    return Text(_time(found.p50), style="bold red" if missed else "")


def _hits(instance: InstanceReport) -> str:
    kv = instance.kv
    return f"{100 * kv.hit_tokens / kv.query_tokens:.0f}%" if kv and kv.query_tokens else "–"


# --- words and figures ---------------------------------------------------------------------------


def _keys(width: int) -> Text:
    return _line(Text(" q quits   ▒ kept for reuse   pred: actual / predicted TTFT", _DIM), width)


def _line(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text


def _spread(left: Text, right: Text, width: int) -> Text:
    gap = width - left.cell_len - right.cell_len
    return _line(left, width) if gap < 1 else Text.assemble(left, " " * gap, right)


def _sparkline(history: Sequence[float], cells: int) -> str:
    shown = list(history)[-cells:]
    top = max(shown) or 1.0
    return "".join(_LEVELS[min(7, int(8 * value / top))] for value in shown)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 0.01:
        return f"{1e3 * seconds:.1f}ms"
    if seconds < 1:
        return f"{1e3 * seconds:.0f}ms"
    return f"{seconds:.1f}s" if seconds < 100 else f"{seconds:.0f}s"


def _number(value: float) -> str:
    if value < 10:
        return f"{value:.1f}"
    return f"{value:,.0f}".replace(",", " ")


def _span(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"
