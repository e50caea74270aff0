"""`penstock plan TRACE`: the cheapest cluster that serves a trace within its SLOs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from penstock.cli import process
from penstock.cli.parser import Parser, count
from penstock.cli.simulate import jobs_of, number_of, progress_bar, read, wide, window_of, words_of
from penstock.loadgen import costs
from penstock.protocol.errors import ConfigError
from penstock.service.policies.routing import policy_named
from penstock.simulator.crew import Crew, Progress
from penstock.simulator.experiment import MODES
from penstock.simulator.planner import MODEL_ERROR, Measure, Planner, Question
from penstock.simulator.prices import DEFAULT_USD, SOURCE, prices_of
from penstock.simulator.quantities import counted, ms, slos_of
from penstock.simulator.report.html import to_json
from penstock.simulator.report.table import NONE, number, share

_WINDOW_S = 300.0
EXIT_NONE = 1

_DESCRIPTION = """Find the cheapest cluster (GPU type, count, tensor parallelism, prefill and decode
together or apart) that keeps enough requests of a trace within TTFT and TPOT, by simulating the
production cores. The search looks at the busiest stretch of the trace; what it finds is tried on
the whole trace, on traces like it (the same arrivals, lengths dealt out anew), and with slower and
faster GPUs than the cost models say. `--json` prints the report and nothing else."""


def make_parser() -> Parser:
    usual = ", ".join(f"{gpu} {usd:g}" for gpu, usd in DEFAULT_USD.items())
    known = dict.fromkeys(":".join(name.split(":")[:3]) for name in costs.known_hardware())
    parser = Parser(
        "plan",
        _DESCRIPTION,
        epilog=f"Prices by default, US dollars a GPU and hour: {usual}\n  ({SOURCE})\n"
        "Cost models (gpu:model:dtype) that are known:\n  " + "\n  ".join(known),
    )
    add = parser.add_argument
    add("trace", metavar="TRACE", help="when requests came, and how long they were")
    add("--slo", metavar="TIMES", help="ttft=1s,tpot=50ms")
    add("--attainment", metavar="SHARE", help="of requests that are to be within both (0.9)")
    add("--hardware", metavar="GPU[,GPU...]", help="of " + ", ".join(DEFAULT_USD) + " (h100,h200)")
    add("--model", metavar="NAME", help="llama3.1-8b, llama3.1-70b, ... (llama3.1-8b)")
    add("--dtype", metavar="DTYPE[,DTYPE...]", help="bf16, fp8 (bf16)")
    add("--prices", metavar="PRICES", help="h100=2.5,h200=3.5, or a YAML or JSON file with them")
    add("--max-gpus", type=count, metavar="N", help="no cluster has more (64)")
    add("--speed", metavar="X", help="the trace X times as fast (1)")
    add("--window", metavar="TIME",
        help="the busiest stretch that the search looks at, as in 10m, or all (5m)")  # fmt: skip
    add("--seeds", type=count, metavar="N", help="traces that a plan has to hold on (3)")
    add("--model-error", metavar="SHARE",
        help=f"by which steps may be slower, or faster, than modelled ({MODEL_ERROR})")  # fmt: skip
    add("--policy", metavar="NAME", help="where requests go (slo-aware)")
    add("--max-num-batched-tokens", type=count, metavar="N", help="as in serve (2048)")
    add("--max-num-seqs", type=count, metavar="N", help="as in serve (256)")
    add("--link-gbit", metavar="X", help="between two instances, for KV (100)")
    add("--mode", choices=tuple(MODES), help="as in simulate (scale)")
    add("--jobs", type=count, metavar="N", help="processes at once (as many as CPUs)")
    add("--json", action="store_true", help="the result for programs")
    return parser


def run(arguments: Sequence[str]) -> int:
    """0 with a plan; 1 if no cluster of at most so many GPUs does."""
    flags = make_parser().parse(arguments)
    question = _question(flags)
    requests = read(flags.trace, number_of(getattr(flags, "speed", "1"), "--speed"))
    with (
        process.interruptible(),
        Crew(requests, Measure(question.wanted), jobs_of(flags)) as crew,
        _bars() as tell,
    ):
        report = Planner(question, requests, crew).plan(tell)
    report = {"trace": Path(flags.trace).name} | report
    if hasattr(flags, "json"):
        print(to_json(report))
    else:
        _print(report, wide(Console(soft_wrap=True)))
    return 0 if report["plans"] else EXIT_NONE


def _question(flags: Namespace) -> Question:
    if not hasattr(flags, "slo"):
        raise ConfigError("which SLO? --slo ttft=1s,tpot=50ms")
    ttft_s, tpot_s = slos_of(flags.slo)
    gpus = tuple(words_of(flags, "hardware")) or ("h100", "h200")
    prices = prices_of(getattr(flags, "prices", None))
    for gpu in gpus:
        costs.matching_hardware(gpu)  # raises where there is no cost model of it
    if without := [gpu for gpu in gpus if gpu not in prices]:
        raise ConfigError(f"there is no price of {', '.join(without)}: --prices {without[0]}=...")
    wanted = number_of(getattr(flags, "attainment", "0.9"), "--attainment")
    if wanted > 1:
        raise ConfigError(f"--attainment {wanted:g} is a share of the requests, at most 1")
    policy = getattr(flags, "policy", "slo-aware")
    policy_named(policy)
    return Question(
        hardware=gpus,
        model=getattr(flags, "model", "llama3.1-8b"),
        dtypes=tuple(words_of(flags, "dtype")) or ("bf16",),
        gpu_hour={gpu: prices[gpu] for gpu in gpus},
        ttft_slo_s=ttft_s,
        tpot_slo_s=tpot_s,
        wanted=wanted,
        max_gpus=getattr(flags, "max_gpus", 64),
        window_s=window_of(flags, _WINDOW_S),
        seeds=getattr(flags, "seeds", 3),
        mode=getattr(flags, "mode", "scale" if "scale" in MODES else "exact"),
        policy=policy,
        max_num_batched_tokens=getattr(flags, "max_num_batched_tokens", 2048),
        max_num_seqs=getattr(flags, "max_num_seqs", 256),
        kv_gbit=number_of(getattr(flags, "link_gbit", "100"), "--link-gbit"),
        model_error=number_of(getattr(flags, "model_error", str(MODEL_ERROR)), "--model-error"),
    )


@contextmanager
def _bars() -> Iterator[Callable[[str], Progress]]:
    """One bar, which each part of the work begins anew."""
    with progress_bar("planning") as bar:

        def tell(what: str) -> Progress:
            return lambda shares: bar(shares, what)

        yield tell


def _print(report: dict[str, Any], console: Console) -> None:
    slo, busiest = report["slo"], report["busiest"]
    wanted = f"{100 * slo['attainment']:g}%"
    lines = [
        f"{report['trace']}: {counted(report['requests'], 'request')} in "
        f"{report['seconds']:,.0f} s; "
        f"{wanted} of them within TTFT {ms(slo['ttft_s'])} and TPOT {ms(slo['tpot_s'])}",
    ]
    if not busiest["is_whole"]:
        lines.append(
            f"busiest stretch: {busiest['requests']:,} requests in {busiest['seconds']:,.0f} s, "
            f"{number(busiest['requests_per_s'])} a second"
        )
    console.print(Text("\n".join(lines) + "\n"))
    if not report["plans"]:
        console.print(Text(_nothing(report)))
        return
    console.print(_table(report))
    console.print(Text("\n" + "\n".join(_verdict(report))))


def _table(report: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    error = f"{100 * report['model_error']:.0f}%"
    heads = ("", "instances", "of", "pd", "GPUs", "$/h", "$/M out", "in SLO, busiest (least)",
             "whole trace (least)", f"steps {error} slower", f"{error} faster", "busy")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head in ("", "of", "pd") else "right")
    for place, plan in enumerate(report["plans"]):
        cells = (
            "  " if place else "->",
            str(plan["instances"]),
            plan["hardware"],
            plan["pd"],
            str(plan["gpus"]),
            number(plan["cost_per_hour"], 2),
            number(plan["cost_per_million_output_tokens"], 2),
            f"{share(plan['busiest']['mean'])} ({share(plan['busiest']['least'])})",
            f"{share(plan['whole']['mean'])} ({share(plan['whole']['least'])})",
            share(plan["slower"]),
            share(plan["faster"]),
            share(plan["busy"]),
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _verdict(report: dict[str, Any]) -> list[str]:
    best, wanted = report["plans"][0], report["slo"]["attainment"]
    error = f"{100 * report['model_error']:.0f}%"
    lines = [f"plan: {_name(best)}, ${best['cost_per_hour']:,.2f} an hour"]
    if (less := best["one_less"]) is not None:
        lines.append(f"  - {_name(less)} keeps {share(less['attainment'])}: not enough")
    elif best["instances"] == best["least_instances"]:
        lines.append("  - fewer cannot do the work, however it is scheduled")
    spread = best["busiest"]
    lines.append(
        f"  - over {report['seeds']} traces like this one: {share(spread['least'])} to "
        f"{share(spread['most'])} in the busiest stretch"
    )
    if best["slower"] >= wanted:
        lines.append(f"  - it holds with steps {error} slower than the cost model says")
    else:
        more = best["one_more_if_slower"]
        holds = "holds" if more["attainment"] >= wanted else "is not enough either:"
        lines.append(
            f"  - with steps {error} slower than the cost model says it keeps "
            f"{share(best['slower'])}; then {_name(more)} {holds} ({share(more['attainment'])})"
        )
    lines += [
        f"  - {_name(row)} kept {share(row['attainment'])} where the search looked, and failed "
        "on the traces that it was tried on after that"
        for row in report["failed"]
    ]
    lines += [f"  - left out: {name}, {why}" for name, why in report["left_out"].items()]
    lines.append(f"  - {report['runs']} simulations")
    return lines


def _nothing(report: dict[str, Any]) -> str:
    near, most = report["nearest"], counted(report["max_gpus"], "GPU")
    wanted = f"{100 * report['slo']['attainment']:g}%"
    if near is None:
        return (
            f"no cluster of up to {most} could do this work: it takes "
            f"{report['least_gpus']} or more (--max-gpus {report['least_gpus']})"
        )
    ttft, tpot = (NONE if near[k] is None else ms(near[k]) for k in ("ttft_s", "tpot_s"))
    return (
        f"no cluster of up to {most} keeps {wanted} within the SLO. The nearest "
        f"is {_name(near)}, with {share(near['attainment'])}: {wanted} of its requests have a TTFT "
        f"of up to {ttft}, and {wanted} a TPOT of up to {tpot}. It takes more GPUs (--max-gpus), "
        "an SLO that is nearer to these times, or a smaller --attainment"
    )


def _name(row: dict[str, Any]) -> str:
    how = {"off": "prefill and decode together", "auto": "pd auto"}.get(
        row["pd"], f"pd {row['pd']}"
    )
    return f"{row['instances']} × {row['hardware']}, {how}"
