"""`penstock simulate CLUSTER --trace FILE`: the production cores, on a virtual clock."""

from __future__ import annotations

import math
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from penstock.cli import process
from penstock.cli.parser import Parser, count
from penstock.loadgen import costs
from penstock.loadgen.files import write_whole
from penstock.loadgen.sources import open_trace
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.service.policies.routing import POLICIES
from penstock.simulator.build import check_fits
from penstock.simulator.cluster_file import read_cluster
from penstock.simulator.experiment import MODES
from penstock.simulator.quantities import seconds_of
from penstock.simulator.report import comparison, table
from penstock.simulator.report.html import find_plots, render, to_json

_OUT = "simulate-report"
T = TypeVar("T")

_DESCRIPTION = """Run a trace through the service and the engines of a cluster, with the scheduler,
policies and books of production and a cost model in place of each GPU. Several policies, splits or
speeds are compared, each with each. The report has a table, report.json and report.html."""


def make_parser() -> Parser:
    parser = Parser(
        "simulate",
        _DESCRIPTION,
        epilog="TRACE: CSV (arrival_s, input_tokens, output_tokens; or Azure's columns) or JSON\n"
        "lines (Mooncake's), plain or .gz, or generate:... (see docs/traces.md).\n"
        "CLUSTER: examples/simulate.yaml explains the fields.\n"
        "Hardware that is known:\n  " + "\n  ".join(costs.known_hardware()),
    )
    add = parser.add_argument
    add("cluster", metavar="CLUSTER", help="a YAML file")
    add("--trace", metavar="TRACE", help="when requests came, and how long they were")
    add("--speed", metavar="X[,X...]", help="the trace X times as fast; several: a sweep (1)")
    add("--policy", metavar="NAME[,NAME...]", help="of " + ", ".join(POLICIES) + " (the file's)")
    add("--pd", metavar="HOW[,HOW...]", help="of off, auto, pools and splits like 2:6 (the file's)")
    add("--seed", type=int, metavar="N", help="of message delays; one seed, one history (0)")
    add("--mode", choices=tuple(MODES),
        help="exact: every step is an event; scale: steps that only decode are taken together, for "
        "large clusters (exact)")  # fmt: skip
    add("--window", metavar="TIME", help="only the busiest stretch of the trace, as in 10m (all)")
    add("--jobs", type=count, metavar="N", help="processes at once (as many as CPUs)")
    add("--out", metavar="FOLDER", help=f"where the report goes (./{_OUT})")
    add("--json", action="store_true",
        help="print the report and nothing else; files only where --out says so")  # fmt: skip
    return parser


def run(arguments: Sequence[str]) -> int:
    flags = make_parser().parse(arguments)
    for_programs = hasattr(flags, "json")
    out = Path(flags.out if hasattr(flags, "out") else _OUT).expanduser()
    writes = hasattr(flags, "out") or not for_programs
    if str(out) == "-":
        raise ConfigError("--out is a folder: --json prints the report to standard output")
    if not hasattr(flags, "trace"):
        raise ConfigError("which trace? --trace FILE, such as examples/azure_code_5min.csv")
    runs = _tasks(flags)
    requests = read(flags.trace)
    check_fits(runs[0].spec, requests)
    if writes:
        _make_folder(out)
    with process.interruptible(), progress_bar("simulating") as tell:
        report = comparison.compare(
            runs,
            requests,
            trace=Path(flags.trace).name,
            jobs=min(jobs_of(flags), len(runs)),
            progress=tell,
        )
    if writes:
        write_whole(out / "report.json", to_json(report) + "\n")
        write_whole(out / "report.html", render(report))
    if for_programs:
        print(to_json(report))
        return 0
    console = Console(soft_wrap=True)
    table.print_tables(report, wide(console))
    console.print(f"\n{out / 'report.html'} and {out / 'report.json'} hold all of it", markup=False)
    if find_plots() is None:
        console.print(
            f"report.html is without plots: {_python()} -m pip install matplotlib, and run again",
            markup=False,
        )
    return 0


def _python() -> str:
    """The one that we run in, as short as a shell here finds it."""
    here, ours = Path.cwd(), Path(sys.executable)
    return shlex.quote(str(ours.relative_to(here) if ours.is_relative_to(here) else ours))


def _tasks(flags: Namespace) -> list[comparison.Task]:
    spec = read_cluster(Path(flags.cluster).expanduser())
    return comparison.tasks(
        spec,
        policies=words_of(flags, "policy"),
        pds=words_of(flags, "pd"),
        speeds=_speeds(flags),
        seed=getattr(flags, "seed", 0),
        mode=getattr(flags, "mode", "exact"),
        window_s=window_of(flags),
    )


def read(trace: str, speed: float = 1.0) -> list[TraceRequest]:
    """Of a file, or of `generate:...`. Raises `ConfigError` for what is no trace."""
    return open_trace(trace, speed=speed)


def words_of(flags: Namespace, name: str) -> list[str]:
    """A flag's values with commas between them, each once; [] where it is not there."""
    text: str | None = getattr(flags, name, None)
    if text is None:
        return []
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise ConfigError(f"--{name} {text} has an empty word between commas")
    return list(dict.fromkeys(found))


def _speeds(flags: Namespace) -> list[float]:
    return [number_of(word, "--speed") for word in words_of(flags, "speed")] or [1.0]


def number_of(word: str, what: str) -> float:
    """More than 0. Raises `ConfigError`."""
    try:
        value = float(word)
    except ValueError:
        raise ConfigError(f"{what} {word} is not a number") from None
    if not 0 < value < math.inf:
        raise ConfigError(f"{what} {word} has to be more than 0")
    return value


def window_of(flags: Namespace, default_s: float | None = None) -> float | None:
    """Seconds; None: all of the trace."""
    if not hasattr(flags, "window"):
        return default_s
    if flags.window == "all":
        return None
    text = f"{flags.window}s" if flags.window.replace(".", "", 1).isdigit() else flags.window
    window_s = seconds_of(text, "--window")
    if not window_s:
        raise ConfigError("--window has to be more than 0")
    return window_s


def jobs_of(flags: Namespace) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(getattr(flags, "jobs", usable or 1))


def wide(console: Console) -> Console:
    """Tables are as wide as they are where nobody looks at them in a terminal."""
    return console if console.is_terminal else Console(width=250, soft_wrap=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """On standard error, if that is a terminal. What is yielded takes how far each run is, and what
    to call the work from now on."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task(what, total=1.0)

        def tell(shares: Sequence[float], called: str = what) -> None:
            done = sum(share >= 1.0 for share in shares)
            text = f"{called} ({done}/{len(shares)})" if len(shares) > 1 else called
            bar.update(task, completed=sum(shares) / len(shares), description=text)

        yield tell


def _make_folder(out: Path) -> None:
    """Before the work, so that it is not lost."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--out {out} cannot be made: {exc.strerror}") from None
