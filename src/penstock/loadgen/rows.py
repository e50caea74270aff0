"""Rows of a table in a file: CSV or JSON lines, compressed with gzip or not."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from penstock.protocol.errors import ConfigError

Row = Mapping[str, Any]
#: What no column may be called.
_TOO_MANY = "\0"


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, values by column). Raises `ConfigError` for what is no such file."""
    try:
        with _open(path) as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            # A list is no row, but JSON, and said to be so.
            if start in ("{", "["):
                yield from _json_rows(path, file)
            else:
                yield from _csv_rows(path, file)
    except (OSError, EOFError, zlib.error) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from None
    except (UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{path} is neither CSV nor JSON lines: {exc}") from None


def number(row: Row, column: str, where: str) -> float:
    """Finite. Raises `ConfigError`."""
    found: Any = row.get(column)
    if found is None:
        raise ConfigError(f"{where}: {column} has no value")
    try:
        value = math.nan if isinstance(found, bool) else float(found)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where}: {column} is not a number: {_short(found)}") from None
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {column} is {found}")
    return value


def date(row: Row, column: str, where: str) -> float:
    """A date in seconds since 1970; without a time zone it is in UTC, where no hour comes twice.
    Fractions may have any number of digits (Azure's have seven). Raises `ConfigError`."""
    text = str(row.get(column)).strip()
    match = re.fullmatch(r"([^.]*?)(\.\d+)?(Z|[+-]\d\d:?\d\d)?", text)
    try:
        if match is None:
            raise ValueError
        moment = datetime.fromisoformat(match[1] + (match[3] or ""))
    except ValueError:
        raise ConfigError(f"{where}: {column} is not a date: {_short(text)}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() + float(match[2] or 0)


def _open(path: Path) -> Any:
    # A byte-order mark, as spreadsheets write it, is no part of the first column's name.
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if zipped:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Row]]:
    rows = csv.DictReader(lines, restkey=_TOO_MANY)
    columns = list(rows.fieldnames or [])
    if any(_is_number(c) for c in columns):
        raise ConfigError(
            f"{path} begins with {_short(', '.join(columns))}: its first line has to be a header, "
            "with the names of the columns"
        )
    if twice := [c for c in dict.fromkeys(columns) if columns.count(c) > 1]:
        raise ConfigError(f"{path} has the column {twice[0]} twice")
    for row in rows:
        too_many: Any = row.pop(_TOO_MANY, ())
        if any(value.strip() for value in too_many):
            raise ConfigError(
                f"{path}, line {rows.line_num} has {len(columns) + len(too_many)} values, and the "
                f"header has {len(columns)} columns"
            )
        yield rows.line_num, row


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip().lower() not in ("nan", "inf", "infinity")


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Row]]:
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise ConfigError(f"{path}, line {line_number} is not JSON: {exc}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {line_number} is not a JSON object")
        yield line_number, row


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
