"""`python -m penstock.simulator.storms SEED`: play the storm of a seed; if it fails, say so in one
line, and make it smaller."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from dataclasses import replace

from penstock.simulator.storms.draw import storm_of
from penstock.simulator.storms.hurricanes import hurricane_of
from penstock.simulator.storms.play import Verdict, play
from penstock.simulator.storms.shrink import Shrinker
from penstock.simulator.storms.storm import Storm


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.getLogger("penstock").setLevel(logging.CRITICAL)
    drawn, flag = (hurricane_of, "--hurricane ") if options.hurricane else (storm_of, "")
    seeds: range = options.seeds
    failed = 0
    began_s = time.perf_counter()
    for seed in seeds:
        storm = _only(drawn(seed), options.only)
        verdict = play(storm, until_s=options.until)
        if len(seeds) == 1 and verdict.ok:
            print(storm)
            print(_summary(verdict))
        if not verdict.ok:
            failed += 1
            print(
                f"seed {seed}: {verdict.failure} [{verdict.where}] at {verdict.failed_at_s:.4f} s"
            )
            print(f"    python -m penstock.simulator.storms {flag}{seed}", flush=True)
            if len(seeds) == 1:
                print(verdict.trace)
                smallest = Shrinker(play).shrink(verdict)
                print(f"fails in the same way, at {smallest.failed_at_s:.4f} s:")
                print(f"    {smallest.failure}")
                print(smallest.storm)
    took_s = time.perf_counter() - began_s
    print(f"{len(seeds)} storms, {failed} failed, {1000 * took_s / len(seeds):.0f} ms each")
    return 1 if failed else 0


def _only(storm: Storm, only: tuple[int, ...] | None) -> Storm:
    if only is None:
        return storm
    most = len(storm.faults) - 1
    if beyond := [number for number in only if number > most]:
        _parser().error(f"--only {beyond[0]}: the faults of this storm are 0 to {most}")
    return replace(storm, faults=tuple(storm.faults[number] for number in only))


def _summary(v: Verdict) -> str:
    return (
        f"{v.num_events} events, {v.handovers} handovers, {v.resumed} resumed, {v.migrated} "
        f"migrated, {v.preemptions} preemptions, {v.errors} errors, digest {v.digest[:16]}"
    )


def _seeds(text: str) -> range:
    match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", text)
    found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a seed nor like 0-999")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"(\d{1,9}(,\d{1,9})*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0,2")
    return tuple(int(number) for number in text.split(",") if number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m penstock.simulator.storms")
    parser.add_argument("seeds", type=_seeds, help="SEED, or FIRST-LAST")
    parser.add_argument("--hurricane", action="store_true", help="many faults at once")
    parser.add_argument(
        "--only", type=_numbers, help="leave out all faults but these, by number: 0,2"
    )
    parser.add_argument("--until", type=float, help="stop after so many virtual seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
