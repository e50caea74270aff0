"""`penstock advise`: should prefill and decode be apart for this traffic, and how many of each?"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from penstock.cli import process
from penstock.cli.parser import Parser, count
from penstock.cli.simulate import jobs_of, number_of, progress_bar, read, window_of
from penstock.loadgen import costs
from penstock.protocol.errors import ConfigError
from penstock.simulator.advice import Advice, Question, advise, as_dict
from penstock.simulator.experiment import MODES
from penstock.simulator.quantities import counted, slos_of

_HARDWARE = "h100:llama3.1-8b:bf16:tp1"
_WINDOW_S = 120.0


def make_parser() -> Parser:
    parser = Parser(
        "advise",
        "Run the busiest two minutes of a trace in the simulator, under the policies that `serve`\n"
        "uses, and say when prefill apart from decode (PD) is better, with which split, and why.",
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
    add("--speed", metavar="X", help="the trace X times as fast (1)")
    add("--window", metavar="TIME",
        help="the busiest stretch alone: seconds, 10m, or all (2m)",
    )  # fmt: skip
    add("--max-num-batched-tokens", dest="step_tokens", type=count, metavar="N",
        help="tokens of a step, as in serve (2048)")  # fmt: skip
    add("--max-num-seqs", dest="max_running", type=count, metavar="N",
        help="sequences of a step, as in serve (256)")  # fmt: skip
    add("--link-gbit", metavar="X", help="between two instances, for KV (100)")
    add("--jobs", type=count, metavar="N", help="processes at once (as many as CPUs)")
    add("--json", action="store_true", help="the result for programs")
    return parser


def run(arguments: Sequence[str]) -> int:
    flags = make_parser().parse(arguments)
    ttft_s, tpot_s = slos_of(getattr(flags, "slo", "ttft=1s,tpot=50ms"))
    question = Question(
        hardware=_hardware(flags),
        instances=getattr(flags, "instances", 4),
        ttft_slo_s=ttft_s,
        tpot_slo_s=tpot_s,
        step_tokens=getattr(flags, "step_tokens", 2048),
        max_running=getattr(flags, "max_running", 256),
        link_gbit=number_of(getattr(flags, "link_gbit", "100"), "--link-gbit"),
        window_s=window_of(flags, _WINDOW_S),
        speed=number_of(getattr(flags, "speed", "1"), "--speed"),
        mode="scale" if "scale" in MODES else "exact",
    )
    requests = read(flags.trace)
    with process.interruptible(), progress_bar("simulating") as tell:
        advice = advise(requests, question, jobs=jobs_of(flags), progress=tell)
    if hasattr(flags, "json"):
        print(json.dumps(as_dict(advice), indent=1))
    else:
        print(_text(advice, flags.trace))
    return 0


def _hardware(flags: Namespace) -> str:
    """Checked: a known name, or a path with a slash in it."""
    if not hasattr(flags, "model_cost"):
        return costs.hardware(getattr(flags, "hardware", _HARDWARE)).name
    if hasattr(flags, "hardware"):
        raise ConfigError("--hardware and --model-cost say the same thing: give one of them")
    path = Path(flags.model_cost).expanduser()
    costs.from_file(path)
    return str(path) if os.sep in str(path) else f"./{path}"


def _text(advice: Advice, trace: str) -> str:
    found, work, q = as_dict(advice), advice.work, advice.question
    lines = [
        f"{trace}: {counted(int(work['requests']), 'request')} in {work['seconds']:.0f} s, "
        f"{work['mean_prompt_tokens']:.0f} prompt and {work['mean_output_tokens']:.0f} output "
        "tokens on average",
        f"{counted(q.instances, 'instance')} of {q.model.name}; SLO: TTFT {q.ttft_slo_s:g} s, "
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
    elif advice.best.setup == "auto":
        verdict = "prefill apart from decode, with roles that follow the work (--pd auto)"
    else:
        verdict = f"prefill apart from decode (--pd static={advice.best.setup})"
    lines += ["", f"advice: {verdict}"]
    lines += [f"  - {reason}" for reason in advice.because]
    return "\n".join(lines)
