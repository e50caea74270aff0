"""Traces of requests: when they came, how long their prompts and answers were.

Read from CSV or JSON lines, compressed with gzip or not, by what the columns are called:

* ours, and Azure's as published with relative times: arrival_s, input_tokens, output_tokens;
* Azure's LLM inference traces as they are: TIMESTAMP, ContextTokens, GeneratedTokens;
* Mooncake's (FAST'25): timestamp (ms), input_length, output_length, hash_ids (512-token blocks).
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from penstock.protocol.errors import ConfigError

#: Tokens to a block of `hash_ids`.
HASH_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`hash_ids`: equal leading ids are equal leading blocks of `block_tokens`; or empty."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: int = HASH_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class _Format:
    arrival: str
    input: str
    output: str
    #: Seconds to a unit of `arrival`; 0: it is a date.
    unit_s: float


_FORMATS = (
    _Format("arrival_s", "input_tokens", "output_tokens", 1.0),
    _Format("TIMESTAMP", "ContextTokens", "GeneratedTokens", 0.0),
    _Format("timestamp", "input_length", "output_length", 1e-3),
)


def read_trace(path: Path) -> list[TraceRequest]:
    """Requests in order of arrival, the first at 0 s. Raises `ConfigError` with the line at fault
    for a file that is no trace: unknown columns, times that go back, tokens that are no numbers."""
    requests: list[TraceRequest] = []
    known: _Format | None = None
    for line, row in _rows(path):
        known = known or _format_of(row, path)
        request = _request(row, known, f"{path}, line {line}")
        if requests and request.arrival_s < requests[-1].arrival_s:
            raise ConfigError(
                f"{path}, line {line}: arrives at {request.arrival_s:g} s, before the one above "
                f"({requests[-1].arrival_s:g} s): sort the trace by time"
            )
        requests.append(request)
    if not requests:
        raise ConfigError(f"{path} holds no requests")
    first_s = requests[0].arrival_s
    if first_s:
        requests = [replace(r, arrival_s=r.arrival_s - first_s) for r in requests]
    return requests


def spread_ticks(requests: list[TraceRequest]) -> list[TraceRequest]:
    """Arrivals that share a time (Mooncake's clock ticks every 3 s) spread evenly up to the next
    one; the last ones over as long as those before."""
    times = sorted({r.arrival_s for r in requests})
    if len(times) == len(requests):
        return requests
    gaps = {t: later - t for t, later in pairwise(times)}
    gaps[times[-1]] = gaps[times[-2]] if len(times) > 1 else 1.0
    sharing: dict[float, int] = {}
    for r in requests:
        sharing[r.arrival_s] = sharing.get(r.arrival_s, 0) + 1
    spread, place, before = [], 0, -1.0
    for r in requests:
        place = place + 1 if r.arrival_s == before else 0
        before = r.arrival_s
        at_s = before + gaps[before] * place / sharing[before]
        spread.append(replace(r, arrival_s=at_s))
    return spread


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, values by column)."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if _zipped(path) else path.open() as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            if start == "{":
                yield from _json_rows(path, file)
            else:
                yield from enumerate(csv.DictReader(file), start=2)
    except (OSError, EOFError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from None
    except (UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{path} is neither CSV nor JSON lines: {exc}") from None


def _zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as exc:
            raise ConfigError(f"{path}, line {number} is not JSON: {exc.msg}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number} is not a JSON object")
        yield number, row


def _format_of(row: Mapping[str, Any], path: Path) -> _Format:
    for known in _FORMATS:
        if known.arrival in row and known.input in row and known.output in row:
            return known
    near = max(_FORMATS, key=lambda f: sum(c in row for c in (f.arrival, f.input, f.output)))
    missing = [c for c in (near.arrival, near.input, near.output) if c not in row]
    raise ConfigError(
        f"{path} lacks the column {' and '.join(missing)}; it has "
        f"{', '.join(str(c) for c in row) or 'none'}. A trace has arrival_s, input_tokens and "
        "output_tokens, or the columns of Azure's or of Mooncake's traces"
    )


def _request(row: Mapping[str, Any], known: _Format, where: str) -> TraceRequest:
    if known.unit_s:
        arrival_s = _number(row, known.arrival, where) * known.unit_s
    else:
        arrival_s = _date(row[known.arrival], where)
    if arrival_s < 0:
        raise ConfigError(f"{where}: {known.arrival} is negative ({row[known.arrival]})")
    tokens = [_number(row, column, where) for column in (known.input, known.output)]
    if tokens[0] < 1 or tokens[1] < 0 or any(t != int(t) for t in tokens):
        raise ConfigError(
            f"{where}: {known.input} = {row[known.input]} and {known.output} = "
            f"{row[known.output]}: tokens are whole numbers, at least 1 of a prompt"
        )
    ids = row.get("hash_ids") or ()
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) for i in ids):
        raise ConfigError(f"{where}: hash_ids is not a list of numbers")
    # A request without an answer still has one token computed.
    return TraceRequest(arrival_s, int(tokens[0]), max(int(tokens[1]), 1), tuple(ids))


def _number(row: Mapping[str, Any], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError, KeyError):
        raise ConfigError(f"{where}: {column} is not a number: {row.get(column)!r}") from None
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {column} is {value}")
    return value


def _date(text: Any, where: str) -> float:
    try:
        whole, _, fraction = str(text).strip().partition(".")
        moment = datetime.fromisoformat(whole)
        return moment.timestamp() + float(f"0.{fraction or 0}")
    except ValueError:
        raise ConfigError(f"{where}: TIMESTAMP is not a date: {text!r}") from None
