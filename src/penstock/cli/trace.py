"""`penstock trace`: what a trace is like; and traces written, cut, made up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.cli.parser import Parser
from penstock.cli.trace_flags import EPILOG, add_cut_flags, requests_of
from penstock.loadgen.statistics import describe
from penstock.loadgen.traces import write_trace


def make_parser() -> Parser:
    parser = Parser(
        "trace",
        "Say what a trace of requests is like, and write it (or a part of it, or one made up) to\n"
        "a file that `simulate`, `plan`, `advise` and `bench` read.",
        epilog=EPILOG,
    )
    parser.add_argument("trace", metavar="TRACE", help="a file, or generate:...")
    add_cut_flags(parser)
    parser.add_argument("--out", metavar="FILE", help="write it there")
    parser.add_argument("--json", action="store_true", help="the result for programs")
    return parser


def run(arguments: Sequence[str]) -> int:
    said = vars(make_parser().parse(arguments))
    requests = requests_of(said["trace"], said)
    if "out" in said:
        write_trace(Path(said["out"]), requests)
    found = describe(requests)
    print(json.dumps(found, indent=1) if "json" in said else _text(said, found))
    return 0


def _text(said: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    rate, cv = found["requests_per_s"], found["gap_cv"]
    lines = [
        f"{said['trace']}: {found['requests']} requests in {found['seconds']:.0f} s"
        + (f", {rate:.2f} a second" if rate is not None else ""),
    ]
    if cv is not None:
        lines.append(
            f"bursts: the gaps have a CV of {cv:.2f}; the busiest 10 s have "
            f"{found['peak_to_mean_10s']:.1f} times the mean"
        )
    for what in ("input", "output"):
        t = found[f"{what}_tokens"]
        lines.append(
            f"{what} tokens: mean {t['mean']:.0f}, p50 {t['p50']:.0f}, p99 {t['p99']:.0f}, longest "
            f"{t['max']:.0f}, {t['total']:.3g} in all"
        )
    lines.append(f"{100 * found['reusable_share']:.1f}% of the prompts' tokens were seen before")
    if "out" in said:
        lines.append(f"written to {said['out']}")
    return "\n".join(lines)
