"""Us and the installed rivals on one checkpoint, alternated: the command is
`python -m benchmarks.compare`; docs/benchmarks.md says how to install rivals and read the results.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.compare import machine, plot, report
from benchmarks.compare.checkpoint import make_model, sizes
from benchmarks.compare.engines import GIB, Bench, Variant, choose, find_pythons, in_waves
from benchmarks.compare.memory import torch_alone_bytes
from benchmarks.compare.offline import Found, Rounds
from benchmarks.compare.online import OnlineConfig, run_online
from benchmarks.compare.probes import Probe
from benchmarks.compare.summary import (
    agreement,
    best_goodput,
    same_round_ratios,
    summarise,
)
from benchmarks.compare.tasks import TASKS

EXTRA_TASKS = ("start", "online")
#: Left free of engines: this process with its probe, the page cache of what they map, the system.
HEADROOM_BYTES = 3 * GIB


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    add = parser.add_argument
    add("--engines", nargs="+", default=["*"], metavar="NAME", help="names or patterns: 'llama*'")
    add("--tasks", nargs="+", default=["*"], metavar="NAME",
        help=f"names or patterns of {', '.join((*TASKS, *EXTRA_TASKS))}")  # fmt: skip
    add("--repeats", type=int, default=3, help="rounds (3)")
    add("--slow-s", type=float, default=10.0,
        help="what takes a rival longer than this is run once, not in each round (10)")  # fmt: skip
    add("--reference", default="vllm", help="whom ratios are to (vllm)")
    cache = Path.home() / ".cache" / "penstock" / "rivals"
    add("--rivals", type=Path, default=cache, help="folder of install_rivals.sh's venvs")
    for kind in ("vllm", "openvino", "llama", "transformers"):
        add(f"--{kind}-python", type=Path, help=f"instead of RIVALS/{kind}/bin/python")
    default_model = Path(tempfile.gettempdir()) / "penstock-bench-0.6b"
    add("--model", type=Path, default=default_model, help="a Qwen3 checkpoint; made if absent")
    add("--threads", type=int, default=machine.describe()["cpus"], help="for each engine")
    add("--kv-gib", type=int, default=1, help="KV cache of each engine (1)")
    add("--eager", action="store_true", help="vLLM without compiling, to try things out")
    add("--rates", type=float, nargs="+", default=list(OnlineConfig.rates_per_s),
        metavar="PER_S", help="of online arrivals")  # fmt: skip
    add("--window-s", type=float, default=OnlineConfig.window_s, help="of arrivals at each rate")
    add("--online-engines", nargs="+", default=["penstock", "vllm"], metavar="NAME")
    default_out = Path("benchmarks/results") / f"{date.today().isoformat()}-compare.json"
    add("--out", type=Path, default=default_out, help="results; the plot is put beside them")
    options = parser.parse_args(arguments)
    try:
        options.variants = choose(options.engines)
        options.online_variants = choose(options.online_engines)
        options.chosen = choose_tasks(options.tasks)
    except ValueError as exc:
        parser.error(str(exc))
    return options


def choose_tasks(patterns: Sequence[str]) -> list[str]:
    """Raises ValueError for a pattern that matches none."""
    names = (*TASKS, *EXTRA_TASKS)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"no task is called {pattern!r}: there are {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for; what was measured by then if it is interrupted."""
    make_model(options.model)
    said = {k: getattr(options, f"{k}_python") for k in ("vllm", "openvino", "llama")}
    said["transformers"] = options.transformers_python
    bench = Bench(
        model=options.model.resolve(),
        sizes=sizes(options.model),
        pythons=find_pythons(options.rivals, said),
        num_threads=options.threads,
        kv_bytes=options.kv_gib * GIB,
        eager=options.eager,
    )
    found, online = Found(), Online()
    offline_variants = installed(options.variants, bench, found)
    try:
        tasks = [TASKS[name] for name in options.chosen if name in TASKS]
        if tasks or "start" in options.chosen:
            run_offline(options, bench, offline_variants, tasks, found)
            report.write(results(options, bench, found, online), options.out)
        if "online" in options.chosen:
            variants = installed(options.online_variants, bench, found)
            config = OnlineConfig(tuple(options.rates), options.window_s)
            online.rows, online.ready_s, missing = run_online(bench, variants, config, say)
            found.missing |= missing
    except KeyboardInterrupt:
        say("interrupted: what follows is what there is")
    return results(options, bench, found, online)


class Online:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ready_s: dict[str, float] = {}


def installed(variants: Sequence[Variant], bench: Bench, found: Found) -> list[Variant]:
    for variant in variants:
        if variant.kind not in bench.pythons and variant.name not in found.missing:
            say(f"{variant.name} is skipped: not installed (benchmarks/compare/install_rivals.sh)")
            found.missing[variant.name] = "not installed"
    return [variant for variant in variants if variant.kind in bench.pythons]


def run_offline(
    options: argparse.Namespace,
    bench: Bench,
    variants: list[Variant],
    tasks: list[Any],
    found: Found,
) -> None:
    for variant in variants:  # sizes of converted files are needed to plan
        prepare(bench, variant, found)
    variants = [v for v in variants if v.name not in found.missing]
    needs = {v.name: bench.resident_bytes(v) for v in variants}
    room = machine.memory_bytes("MemAvailable") - HEADROOM_BYTES
    waves = in_waves(variants, needs, room, options.reference)
    for wave in waves:
        say("resident together: " + ", ".join(variant.name for variant in wave))
    rounds = Rounds(bench, Probe(options.threads), found, say)
    repeats = options.repeats if tasks else 0
    always = ("penstock", options.reference)
    rounds.run(waves, tasks, repeats, options.slow_s, always, twice="start" in options.chosen)


def prepare(bench: Bench, variant: Variant, found: Found) -> None:
    try:
        bench.prepare(variant, say)
    except subprocess.CalledProcessError as exc:
        say(f"{variant.name} is skipped: {exc.stderr.decode(errors='replace')[-500:]}")
        found.missing[variant.name] = "the checkpoint could not be converted"


def results(
    options: argparse.Namespace, bench: Bench, found: Found, online: Online
) -> dict[str, Any]:
    config = OnlineConfig()
    alone_bytes = torch_alone_bytes() if found.memory else 0
    overheads = {
        # The KV pool is shared memory, of exactly the size asked for: it is not in here.
        name: memory["private_bytes"] - alone_bytes - found.weight_bytes[name]
        for name, memory in found.memory.items()
        if name.startswith("penstock")
    }
    return {
        "machine": machine.describe(),
        "versions": found.versions,
        "options": {
            "threads": options.threads,
            "repeats": options.repeats,
            "slow_s": options.slow_s,
            "kv_bytes": bench.kv_bytes,
            "reference": options.reference,
            "vllm_eager": options.eager,
            "vllm_preloads": [p.name for p in bench.preloads()] if "vllm" in bench.pythons else [],
            "online_window_s": options.window_s,
            "online_lengths": f"Azure Conversation's lengths / {config.divisor}",
            "objective": asdict(config.objective),
        },
        "summary": summarise(
            found.records,
            found.weight_bytes,
            bench.sizes.kv_bytes_per_token,
            options.reference,
        ),
        "ratios": same_round_ratios(found.records, pairs(options.variants)),
        "online": online.rows,
        "best_goodput": best_goodput(online.rows),
        "server_ready_s": online.ready_s,
        "process": report.process_rows(found.starts_s, found.memory, found.weight_bytes, overheads),
        "torch_alone_bytes": alone_bytes,
        "weight_bytes": found.weight_bytes,
        "memory": found.memory,
        "agreement": agreement(found.same_model_ids),
        "same_model_ids": found.same_model_ids,
        "missing": found.missing,
        "records": found.records,
    }


def pairs(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """Ours beside each rival that reads weights of as many bits."""
    ours = [v for v in variants if v.kind == "penstock"]
    rivals = [v for v in variants if v.kind != "penstock"]
    return [(a.name, b.name) for a in ours for b in rivals if a.bits == b.bits]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Engines are ended with us, also when we are told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = run(options)
    print("\n".join(report.lines(found)))
    report.write(found, options.out)
    say(f"written: {options.out}")
    plot.write(found, options.out.with_suffix(".png"), say)
    return 0 if found["records"] or found["online"] or found["process"] else 1


if __name__ == "__main__":
    sys.exit(main())
