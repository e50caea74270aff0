"""Flags of commands that take the requests of a trace."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from penstock.cli.parser import count
from penstock.loadgen.generate import seconds
from penstock.loadgen.sources import open_trace
from penstock.loadgen.traces import TraceRequest

EPILOG = """A trace is a file or made up on the spot. Files: CSV or JSON lines, plain or .gz, with
arrival_s, input_tokens and output_tokens, or the columns of Azure's, Mooncake's, ServeGen's or
BurstGPT's traces. Made up: generate:rate=4,duration=10m and any of
  cv=3              bursts: coefficient of variation of the gaps (1: Poisson)
  tide=0.5          the rate goes up and down by this share, once a period=1h
  rates=FILE:column the rate as in this file (window_s, ..._rps), maybe squeezed into a period
  input=512,input_cv=1,output=128,output_cv=1     lengths, log-normal; or lengths=FILE
  turns=4,think=30s sessions of so many turns, each beginning with all that was said before
  system=1024,systems=2   sessions begin with one of so many shared prompts
  requests=1000, max_input=128000, seed=0"""


def add_cut_flags(parser: argparse.ArgumentParser, limit: str = "--limit") -> None:
    add = parser.add_argument
    add("--speed", type=_speed, metavar="X", help="the trace X times as fast (1)")
    add("--window", type=seconds_of, metavar="SECONDS", help="only its busiest stretch (all of it)")
    if limit == "--limit":
        add("--limit", type=count, metavar="N", help="only so many requests")


def requests_of(source: str, said: Mapping[str, Any]) -> list[TraceRequest]:
    """Raises `ConfigError`."""
    return open_trace(
        source,
        speed=said.get("speed", 1.0),
        window_s=said.get("window"),
        limit=said.get("limit"),
    )


def _speed(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def seconds_of(text: str) -> float:
    try:
        return seconds(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time (90, 90s, 10m)") from None
