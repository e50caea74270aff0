"""`penstock advise`: should prefill and decode be apart for this traffic, and how many of each?"""

from __future__ import annotations

import json
import math
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from penstock.cli.parser import Parser, count
from penstock.loadgen import costs
from penstock.loadgen.advice import Advice, Question, advise, as_dict
from penstock.loadgen.costs import InstanceModel
from penstock.loadgen.traces import read_trace, spread_ticks
from penstock.protocol.errors import ConfigError

_HARDWARE = "h100:llama3.1-8b:bf16"
_UNITS = {"ms": 1e-3, "s": 1.0}


def make_parser() -> Parser:
    parser = Parser(
        "advise",
        "Replay a trace on instances that are cost models, under the policies that `serve` uses,\n"
        "and say when prefill apart from decode (PD) is better, with which split, and why.",
        epilog="TRACE: CSV (arrival_s, input_tokens, output_tokens; or Azure's columns) or JSON\n"
        "lines (Mooncake's), plain or .gz. Hardware that is known:\n  "
        + "\n  ".join(costs.known_hardware()),
    )
    add = parser.add_argument
    add("trace", metavar="TRACE", help="when requests came, and how long they were")
    add("--instances", type=count, metavar="N", help="engine instances (4)")
    add("--hardware", metavar="NAME", help=f"a known cost model ({_HARDWARE})")
    add("--model-cost", metavar="FILE", help="or one of your own, in JSON")
    add("--slo", metavar="TIMES", help="ttft=1s,tpot=50ms")
    add("--rate", type=float, metavar="X", help="the trace X times as fast (1)")
    add("--window", type=float, metavar="SECONDS", help="only its busiest stretch (all)")
    add("--max-num-batched-tokens", dest="step_tokens", type=count, metavar="N",
        help="tokens of a step, as in serve (2048)")  # fmt: skip
    add("--max-num-seqs", dest="max_running", type=count, metavar="N",
        help="sequences of a step, as in serve (256)")  # fmt: skip
    add("--link-gbit", type=float, metavar="X", help="between two instances, for KV (100)")
    add("--json", action="store_true", help="the result for programs")
    return parser


def run(arguments: Sequence[str]) -> int:
    flags = make_parser().parse(arguments)
    ttft_s, tpot_s = _slos(getattr(flags, "slo", "ttft=1s,tpot=50ms"))
    question = Question(
        model=_model(flags),
        instances=getattr(flags, "instances", 4),
        ttft_slo_s=ttft_s,
        tpot_slo_s=tpot_s,
        link_bytes_per_s=_positive(flags, "link_gbit", 100.0) * 1e9 / 8,
        window_s=_positive(flags, "window", math.inf) if hasattr(flags, "window") else None,
        rate=_positive(flags, "rate", 1.0),
    )
    requests = spread_ticks(read_trace(Path(flags.trace)))
    for_programs = hasattr(flags, "json")

    def progress(name: str) -> None:
        if not for_programs and sys.stderr.isatty():
            print(f"\rreplaying {name:<12}", end="", file=sys.stderr, flush=True)

    advice = advise(requests, question, progress)
    if for_programs:
        print(json.dumps(as_dict(advice), indent=1))
        return 0
    if sys.stderr.isatty():
        print("\r" + " " * 24, end="\r", file=sys.stderr)
    print(_text(advice, flags.trace))
    return 0


def _model(flags: Namespace) -> InstanceModel:
    step, rows = getattr(flags, "step_tokens", 2048), getattr(flags, "max_running", 256)
    if hasattr(flags, "model_cost"):
        if hasattr(flags, "hardware"):
            raise ConfigError("--hardware and --model-cost say the same thing: give one of them")
        return costs.from_file(Path(flags.model_cost), step, rows)
    return costs.hardware(getattr(flags, "hardware", _HARDWARE), step, rows)


def _positive(flags: Namespace, name: str, default: float) -> float:
    value: float = getattr(flags, name, default)
    if not value > 0:
        raise ConfigError(f"--{name.replace('_', '-')} {value:g} has to be more than 0")
    return value


def _slos(text: str) -> tuple[float, float]:
    """ "ttft=1s,tpot=50ms" in seconds."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(ttft|tpot)=([0-9.]+)(ms|s)\s*", part)
        if match is None or match[1] in found or match[2].count(".") > 1 or match[2] == ".":
            raise ConfigError(f"--slo {text} is not like ttft=1s,tpot=50ms")
        found[match[1]] = float(match[2]) * _UNITS[match[3]]
    if len(found) < 2 or not all(found.values()):
        raise ConfigError(f"--slo {text} has to give a ttft and a tpot, both more than 0")
    return found["ttft"], found["tpot"]


def _text(advice: Advice, trace: str) -> str:
    found, work, q = as_dict(advice), advice.work, advice.question
    lines = [
        f"{trace}: {work['requests']:.0f} requests in {work['seconds']:.0f} s, "
        f"{work['mean_prompt_tokens']:.0f} prompt and {work['mean_output_tokens']:.0f} output "
        "tokens on average",
        f"{q.instances} instances of {q.model.name}; SLO: TTFT {q.ttft_slo_s:g} s, "
        f"TPOT {1e3 * q.tpot_slo_s:g} ms",
        "",
        f"{'setup':<10}{'in SLO':>8}{'TTFT p50':>11}{'p99':>9}{'TPOT p50':>11}{'p99':>8}"
        f"{'gap p99':>10}{'split':>9}{'busy':>7}",
    ]
    for row in found["setups"]:
        mark = "  <-" if row["setup"] == found["advice"] else ""
        lines.append(
            f"{row['setup']:<10}{100 * row['attained']:>7.1f}%"
            f"{1e3 * row['ttft_p50_s']:>8.0f} ms{1e3 * row['ttft_p99_s']:>6.0f} ms"
            f"{1e3 * row['tpot_p50_s']:>8.1f} ms{1e3 * row['tpot_p99_s']:>5.1f} ms"
            f"{1e3 * row['gap_p99_s']:>7.1f} ms{row['split_requests']:>9}"
            f"{100 * row['utilisation']:>6.0f}%{mark}"
        )
    if not advice.splits:
        verdict = "prefill and decode together (--pd off)"
    elif advice.best.setup.adaptive:
        verdict = "prefill apart from decode, with roles that follow the work (--pd auto)"
    else:
        verdict = f"prefill apart from decode (--pd static={advice.best.setup.name})"
    lines += ["", f"advice: {verdict}"]
    lines += [f"  - {reason}" for reason in advice.because]
    return "\n".join(lines)
