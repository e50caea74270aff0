"""Traces of requests: when they came, how long their prompts and answers were.

Read from CSV or JSON lines, compressed with gzip or not, by what the columns are called:

* ours, and Azure's as published with relative times: arrival_s, input_tokens, output_tokens;
* Azure's LLM inference traces as they are: TIMESTAMP, ContextTokens, GeneratedTokens;
* Mooncake's (FAST'25): timestamp (ms), input_length, output_length, hash_ids (512-token blocks);
* requests with images drawn from ServeGen: arrival_s, text_tokens, image_tokens (one number for
  each image, with | between), output_tokens. Images count as that many tokens of the prompt;
* BurstGPT's: Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type, and
  maybe Session ID. Requests without a response have failed, and are left out.

`read_lengths` reads files without times (ShareGPT's lengths), `read_rates` times without requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

from penstock.loadgen.files import write_whole
from penstock.loadgen.rows import Row, date, number, read_rows
from penstock.protocol.errors import ConfigError

#: Tokens to a block of `hash_ids`.
HASH_BLOCK_TOKENS = 512
#: More tokens than this in one prompt are a mistake in the file.
MAX_TOKENS = 1 << 24
#: So is a trace that lasts longer: ten years.
_LONGEST_S = 10 * 366 * 86400.0


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`hash_ids`: equal leading ids are equal leading blocks of `block_tokens`; or empty."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: int = HASH_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Rates:
    """Arrivals per second in windows one after the other; the last one is as long as that before.
    `start_s` begins at 0 and grows."""

    start_s: tuple[float, ...]
    per_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Format:
    arrival: str
    input: tuple[str, ...]
    output: str
    #: The arrival in seconds.
    time_s: Callable[[Row, str, str], float]
    #: Rows without an output are requests that failed.
    leaves_out_failed: bool = False
    session: str = ""
    #: What is known of the clock: seconds that its tick has at most; 0: times are what they say.
    tick_s: float = 0.0
    #: Where there are hash ids, all blocks of a prompt have one.
    covers_prompts: bool = False
    #: Only where all times are in whole seconds: as published, or as someone has rounded them.
    ticks_if_whole: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.arrival, *self.input, self.output)


def _milliseconds(row: Row, column: str, where: str) -> float:
    return number(row, column, where) * 1e-3


_OURS = _Format("arrival_s", ("input_tokens",), "output_tokens", number)
_FORMATS = (
    _OURS,
    _Format(
        "TIMESTAMP", ("ContextTokens",), "GeneratedTokens", date, tick_s=1.0, ticks_if_whole=True
    ),
    _Format(
        "timestamp",
        ("input_length",),
        "output_length",
        _milliseconds,
        tick_s=3.0,
        covers_prompts=True,
    ),
    _Format("arrival_s", ("text_tokens", "image_tokens"), "output_tokens", number),
    _Format(
        "Timestamp", ("Request tokens",), "Response tokens", number, True, "Session ID", 1.0, True
    ),
)
_KNOWN = (
    "A trace has arrival_s, input_tokens and output_tokens, or the columns of Azure's, Mooncake's, "
    "ServeGen's or BurstGPT's traces"
)


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The (first `limit`) requests in order of arrival, the first at 0 s.

    Raises `ConfigError` with the line at fault for a file that is no trace: unknown columns, times
    that go back or are negative, tokens that are no numbers.
    """
    requests = list(islice(_requests(path), limit))
    if not requests:
        raise ConfigError(f"{path} holds no requests")
    first_s = requests[0].arrival_s
    if first_s:
        requests = [replace(r, arrival_s=r.arrival_s - first_s) for r in requests]
    return requests


def read_lengths(path: Path) -> list[tuple[int, int]]:
    """(prompt, output) tokens of each row of a trace, or of a file without times. Raises
    `ConfigError`."""
    found, known = [], None
    for line, row in read_rows(path):
        known = known or _lengths_format(row, path)
        tokens = _tokens(row, known, f"{path}, line {line}")
        if tokens is not None:
            found.append(tokens)
    if not found:
        raise ConfigError(f"{path} holds no lengths")
    return found


def has_times(path: Path) -> bool:
    """False for a file that holds lengths and nothing more. Raises `ConfigError`."""
    _, row = next(read_rows(path), (0, {}))
    return _lengths_of(row) is None or any(set(f.columns) <= row.keys() for f in _FORMATS)


def read_rates(path: Path, column: str | None = None) -> Rates:
    """Of a file with window_s and one column of rates (ServeGen's have several: m_small_rps; the
    first is taken if none is named). Raises `ConfigError`."""
    starts: list[float] = []
    rates: list[float] = []
    for line, row in read_rows(path):
        where = f"{path}, line {line}"
        column = column or next((str(c) for c in row if str(c).endswith(("_rps", "_per_s"))), "rps")
        missing = [c for c in ("window_s", column) if c not in row]
        if missing:
            has = ", ".join(str(c) for c in row)
            raise ConfigError(f"{path} lacks the column {' and '.join(missing)}; it has {has}")
        start_s, per_s = number(row, "window_s", where), number(row, column, where)
        if per_s < 0:
            raise ConfigError(f"{where}: {column} is negative ({per_s:g})")
        if starts and start_s <= starts[-1]:
            raise ConfigError(f"{where}: window_s is {start_s:g}, no later than the one above")
        starts.append(start_s)
        rates.append(per_s)
    if not any(rates):
        raise ConfigError(f"{path} holds no rate above 0")
    return Rates(tuple(s - starts[0] for s in starts), tuple(rates))


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> None:
    """In our columns: CSV, or JSON lines where there are hash ids. `read_trace` reads it."""
    requests = list(requests)
    if not any(r.hash_ids for r in requests):
        lines = ["arrival_s,input_tokens,output_tokens"]
        lines += [f"{r.arrival_s:.6f},{r.input_tokens},{r.output_tokens}" for r in requests]
    else:
        lines = [json.dumps(_as_row(r), separators=(",", ":")) for r in requests]
    write_whole(path, "\n".join(lines) + "\n")


def tick_of(path: Path, requests: Sequence[TraceRequest]) -> float | None:
    """Seconds that a tick of the clock of the trace has, where its format is known for a coarse one
    (Mooncake's ticks every 3 s; dates in whole seconds). None: requests at one time came at one
    time, as they always do in arrival_s. Raises `ConfigError`."""
    _, row = next(read_rows(path), (0, {}))
    known = _format_of(row, path)
    times = sorted({r.arrival_s for r in requests})
    if not known.tick_s or len(times) == len(requests):
        return None
    if known.ticks_if_whole:
        return known.tick_s if all(t == int(t) for t in times) else None
    shortest_s = min((later - t for t, later in pairwise(times)), default=known.tick_s)
    return min(shortest_s, known.tick_s)


def spread_ticks(requests: list[TraceRequest], tick_s: float) -> list[TraceRequest]:
    """Arrivals that share a time spread evenly over the tick of the trace's clock."""
    sharing: dict[float, int] = {}
    for r in requests:
        sharing[r.arrival_s] = sharing.get(r.arrival_s, 0) + 1
    spread, place, before = [], 0, -1.0
    for r in requests:
        place = place + 1 if r.arrival_s == before else 0
        before = r.arrival_s
        at_s = before + tick_s * place / sharing[before]
        spread.append(replace(r, arrival_s=at_s))
    return spread


# --- rows -----------------------------------------------------------------------------------------


def _requests(path: Path) -> Iterator[TraceRequest]:
    known: _Format | None = None
    sessions = _Sessions()
    first_s, before_s = -1.0, 0.0
    for line, row in read_rows(path):
        where = f"{path}, line {line}"
        known = known or _format_of(row, path)
        arrival_s = known.time_s(row, known.arrival, where)
        if arrival_s < 0:
            raise ConfigError(f"{where}: {known.arrival} is negative ({row[known.arrival]})")
        if arrival_s < before_s:
            raise ConfigError(
                f"{where}: arrives at {arrival_s:g} s, before the one above ({before_s:g} s): sort "
                "the trace by time"
            )
        first_s = arrival_s if first_s < 0 else first_s
        if arrival_s - first_s > _LONGEST_S:
            raise ConfigError(
                f"{where}: {known.arrival} is {row[known.arrival]}, more than ten years after the "
                "first one"
            )
        before_s = arrival_s
        tokens = _tokens(row, known, where)
        if tokens is None:
            continue
        session = str(row.get(known.session) or "") if known.session else ""
        block_tokens = _block_tokens(row, where)
        if session:
            ids = sessions.ids(session, *tokens)
        else:
            ids = _hash_ids(row, tokens[0], block_tokens, known.covers_prompts, where)
        yield TraceRequest(arrival_s, *tokens, ids, block_tokens)


def _format_of(row: Row, path: Path) -> _Format:
    for known in _FORMATS:
        if all(column in row for column in known.columns):
            return known
    has = ", ".join(str(c) for c in row if c is not None) or "none"
    if _lengths_of(row) is not None:
        raise ConfigError(
            f"{path} holds lengths and no times of arrival (it has {has}): give a rate, as in "
            f"generate:rate=4,duration=10m,lengths={path}"
        )
    if "window_s" in row:
        raise ConfigError(
            f"{path} holds rates of arrival and no requests (it has {has}): give lengths, as in "
            f"generate:rates={path},input=1000,output=200"
        )
    # The nearest is what it has most columns of; of several, what it lacks fewest of.
    near = max(_FORMATS, key=lambda f: (sum(c in row for c in f.columns), -len(f.columns)))
    missing = [c for c in near.columns if c not in row]
    raise ConfigError(f"{path} lacks the column {' and '.join(missing)}; it has {has}. {_KNOWN}")


def _lengths_of(row: Row) -> _Format | None:
    return next((f for f in _FORMATS if all(c in row for c in (*f.input, f.output))), None)


def _lengths_format(row: Row, path: Path) -> _Format:
    known = _lengths_of(row)
    if known is None:
        has = ", ".join(str(c) for c in row if c is not None) or "none"
        raise ConfigError(f"{path} holds no lengths: it has the columns {has}. {_KNOWN}")
    return known


def _tokens(row: Row, known: _Format, where: str) -> tuple[int, int] | None:
    """(prompt, output); None for a request that failed."""
    prompt = sum(_count(row, column, where) for column in known.input)
    output = _count(row, known.output, where)
    if known.leaves_out_failed and not output:
        return None
    if not 1 <= prompt <= MAX_TOKENS or output > MAX_TOKENS:
        raise ConfigError(
            f"{where}: {' + '.join(known.input)} = {prompt} and {known.output} = {output}: tokens "
            f"are whole numbers, at least 1 of a prompt and none above {MAX_TOKENS}"
        )
    # A request without an answer still has one token computed.
    return prompt, max(output, 1)


def _count(row: Row, column: str, where: str) -> int:
    if column == "image_tokens":
        parts = [part for part in str(row[column] or "").split("|") if part.strip()]
        return sum(_whole({column: part}, column, where) for part in parts)
    return _whole(row, column, where)


def _whole(row: Row, column: str, where: str) -> int:
    value = number(row, column, where)
    if value < 0 or value != int(value):
        raise ConfigError(
            f"{where}: {column} is {row[column]}: tokens are whole numbers, and none is negative"
        )
    return int(value)


def _block_tokens(row: Row, where: str) -> int:
    if not row.get("block_tokens"):
        return HASH_BLOCK_TOKENS
    found = int(number(row, "block_tokens", where))
    if not 16 <= found <= MAX_TOKENS:
        raise ConfigError(f"{where}: block_tokens is {found}, less than 16 or too many")
    return found


def _hash_ids(
    row: Row, input_tokens: int, block_tokens: int, covers_prompt: bool, where: str
) -> tuple[int, ...]:
    """`covers_prompt`: all of it has ids, and not only what is shared."""
    ids = row.get("hash_ids") or ()
    whole = isinstance(ids, (list, tuple)) and all(type(i) is int and i >= 0 for i in ids)
    if not whole:
        raise ConfigError(f"{where}: hash_ids is not a list of numbers from 0")
    blocks = -(-input_tokens // block_tokens)
    if len(ids) > blocks or (covers_prompt and 0 < len(ids) < input_tokens // block_tokens):
        raise ConfigError(
            f"{where}: there are {len(ids)} hash_ids for a prompt of {input_tokens} tokens: in "
            f"blocks of {block_tokens} it has {blocks}"
        )
    return tuple(ids)


class _Sessions:
    """Prompts of one conversation, as hash ids: a turn that is at least as long as the one before
    with its answer begins with those; a shorter one begins anew."""

    def __init__(self) -> None:
        self._next_id = 0
        self._turns: dict[str, tuple[int, tuple[int, ...]]] = {}

    def ids(self, session: str, input_tokens: int, output_tokens: int) -> tuple[int, ...]:
        length, ids = self._turns.get(session, (0, ()))
        if input_tokens < length:
            ids = ()
        fresh = -(-input_tokens // HASH_BLOCK_TOKENS) - len(ids)
        ids += tuple(range(self._next_id, self._next_id + fresh))
        self._next_id += fresh
        self._turns[session] = input_tokens + output_tokens, ids
        return ids


def _as_row(r: TraceRequest) -> dict[str, object]:
    row: dict[str, object] = {
        "arrival_s": round(r.arrival_s, 6),
        "input_tokens": r.input_tokens,
        "output_tokens": r.output_tokens,
    }
    if r.hash_ids:
        row["hash_ids"] = list(r.hash_ids)
    if r.block_tokens != HASH_BLOCK_TOKENS:
        row["block_tokens"] = r.block_tokens
    return row
