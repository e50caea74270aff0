"""`penstock bench`: a load on a running OpenAI-style server, and what came of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from penstock.cli import client, trace_flags
from penstock.cli.parser import Parser, count, seconds
from penstock.cli.serve import KEY_VARIABLES
from penstock.loadgen.generate import PREFIX, arrivals
from penstock.loadgen.live import (
    GOODPUT_METRICS,
    PERCENTILES,
    TIMEOUT_S,
    Outcome,
    Shot,
    play,
    summary,
)
from penstock.loadgen.prompts import NUM_IDS, prompt_ids
from penstock.loadgen.sources import open_trace
from penstock.loadgen.traces import TraceRequest, has_times, read_lengths
from penstock.protocol.errors import ConfigError, EngineUnavailable

__all__ = ["Outcome", "make_parser", "run", "summary"]

#: Prompts are drawn from these words; what they come to in tokens is what the server reports.
_WORDS = (
    "water", "river", "stone", "light", "garden", "winter", "letter", "morning", "silver", "road",
)  # fmt: skip
#: Requests at once, where nothing says when they come.
_CONCURRENCY = 16
#: Sent later than this, a load is not the one that was asked for.
_LATE_MS = 100.0
_CONNECT_S = 10.0


def make_parser() -> Parser:
    parser = Parser(
        "bench",
        "Send requests to a running server and measure: random prompts, or those of a trace when\n"
        "they came, with what they shared. Names are vLLM's.",
        epilog=trace_flags.EPILOG,
    )
    add = parser.add_argument
    add("--url", "--base-url", dest="url", help="http://127.0.0.1:8000")
    add("--api-key", metavar="KEY", help=f"else ${KEY_VARIABLES[0]}")
    add("--model", help="the server's first by default")
    add("--trace", metavar="TRACE", help="requests of a file, or generate:...")
    trace_flags.add_cut_flags(parser, limit="--num-prompts")
    add("--num-prompts", "--limit", dest="num_prompts", type=count, metavar="N",
        help="requests in all (64, or all of a trace)")  # fmt: skip
    add("--max-concurrency", type=count, metavar="N",
        help=f"requests at once ({_CONCURRENCY}; no bound where they have times)")  # fmt: skip
    add("--request-rate", type=_rate, metavar="X",
        help="requests a second, instead of the times of a trace; inf: all at once")  # fmt: skip
    add("--burstiness", type=_rate, metavar="X",
        help="of --request-rate: shape of the gamma distribution of gaps (1)")  # fmt: skip
    add("--random-input-len", dest="input_len", type=count, metavar="TOKENS",
        help="prompt length, roughly (256)")  # fmt: skip
    add("--random-output-len", dest="output_len", type=count, metavar="TOKENS",
        help="output length, exactly (64)")  # fmt: skip
    add("--goodput", nargs="+", type=_slo, metavar="NAME:MS",
        help="how many requests keep these times: ttft:500 tpot:50 e2el:9000")  # fmt: skip
    add("--metric-percentiles", type=_percentiles, metavar="P,P", help="50,90,99")
    add("--timeout", type=seconds, metavar="SECONDS",
        help=f"a request without its whole answer by then has failed ({TIMEOUT_S:g})")  # fmt: skip
    add("--seed", type=int, help="of prompts and arrivals (0)")
    add("--json", action="store_true", help="the result for programs")
    return parser


def run(arguments: list[str]) -> int:
    """0 if every request was answered, else 1; interrupted, 128 and the signal's number, with what
    was measured until then."""
    options = vars(make_parser().parse(arguments))
    _check(options)
    url = client.base_url(options.get("url", "http://127.0.0.1:8000"))
    key = options.get("api_key") or os.environ.get(KEY_VARIABLES[0])
    requests = _requests(options["trace"], options) if "trace" in options else None
    timeout_s = options.get("timeout", TIMEOUT_S)
    with client.connect(url, key, httpx.Timeout(timeout_s, connect=_CONNECT_S)) as http:
        model = options.get("model") or client.first_model(http)
        if requests is None:
            shots = _random(http, model, options)
        else:
            shots = _traced(http, model, requests, options)
    timed = "trace" in options or "request_rate" in options
    concurrency = options.get("max_concurrency", None if timed else _CONCURRENCY)
    body = {"model": model, "ignore_eos": True}
    shots = [Shot(shot.at_s, body | dict(shot.body)) for shot in shots]
    outcomes, duration_s, by = asyncio.run(_load(url, key, shots, concurrency, timeout_s))
    result = summary(
        outcomes,
        duration_s,
        slos_s=dict(options.get("goodput", ())),
        percentiles=options.get("metric_percentiles", PERCENTILES),
    )
    result["interrupted_by"] = None if by is None else by.name
    result["given_up"] = len(shots) - len(outcomes)
    if options.get("json"):
        print(json.dumps(result, indent=2))
    else:
        _show(model, result)
    if by is not None:
        return 128 + by
    return 0 if result["completed"] == len(shots) else 1


def _check(options: Mapping[str, Any]) -> None:
    for name in ("speed", "window"):
        if name in options and "trace" not in options:
            raise ConfigError(f"--{name} is about a trace: give one with --trace")
    if "trace" in options and ("input_len" in options or "output_len" in options):
        raise ConfigError("a trace has its own lengths: leave out --random-input-len and its like")
    if "request_rate" in options and "speed" in options:
        raise ConfigError("--request-rate sets when requests come, --speed too: choose one")
    if "burstiness" in options and options.get("request_rate", float("inf")) == float("inf"):
        raise ConfigError("--burstiness is about the gaps of a --request-rate: give one")


# --- what is sent, and when -----------------------------------------------------------------------


def _traced(
    http: client.Http, model: str, requests: Sequence[TraceRequest], options: Mapping[str, Any]
) -> list[Shot]:
    num_ids = _num_ids(http, model)
    times = [r.arrival_s for r in requests]
    if "request_rate" in options:
        times = _arrivals(len(requests), options)
    return [
        _shot(at_s, prompt_ids(r, number, num_ids=num_ids), r.output_tokens)
        for number, (at_s, r) in enumerate(zip(times, requests))
    ]


def _requests(source: str, options: Mapping[str, Any]) -> list[TraceRequest]:
    limit = options.get("num_prompts")
    is_file = not source.startswith(PREFIX)
    if is_file and "request_rate" in options and not has_times(Path(source)):
        return [TraceRequest(0.0, *lengths) for lengths in read_lengths(Path(source))[:limit]]
    return open_trace(
        source, speed=options.get("speed", 1.0), window_s=options.get("window"), limit=limit
    )


def _random(http: client.Http, model: str, options: Mapping[str, Any]) -> list[Shot]:
    dice = random.Random(options.get("seed", 0))
    num_words = max(1, round(options.get("input_len", 256) / _tokens_a_word(http, model)))
    number = options.get("num_prompts", 64)
    prompts = [" ".join(dice.choices(_WORDS, k=num_words)) for _ in range(number)]
    times = _arrivals(number, options)
    output = options.get("output_len", 64)
    return [_shot(at_s, prompt, output) for at_s, prompt in zip(times, prompts)]


def _shot(at_s: float, prompt: str | list[int], output_tokens: int) -> Shot:
    return Shot(at_s, {"prompt": prompt, "max_tokens": output_tokens})


def _arrivals(number: int, options: Mapping[str, Any]) -> list[float]:
    """Seconds from the start."""
    rate = options.get("request_rate", math.inf)
    if rate == math.inf:
        return [0.0] * number
    cv = 1 / math.sqrt(options.get("burstiness", 1.0))
    return arrivals(number, rate, cv, options.get("seed", 0))


def _num_ids(http: client.Http, model: str) -> int:
    """Prompts are of ids below this: all but toys have as many."""
    for num_ids in (NUM_IDS, 256, 64):
        body = {"model": model, "tokens": [num_ids - 1]}
        if _ask(http, "/detokenize", body).status_code != 400:
            return num_ids  # or it offers no such thing
    return NUM_IDS


def _tokens_a_word(http: client.Http, model: str) -> float:
    """By the server's tokenizer, where it offers one."""
    response = _ask(http, "/tokenize", {"model": model, "prompt": " ".join(_WORDS)})
    try:
        number = int(response.json()["count"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        number = 0
    return number / len(_WORDS) if number > 0 else 1.0


def _ask(http: client.Http, path: str, body: Mapping[str, Any]) -> httpx.Response:
    """Whatever it answers. Raises `EngineUnavailable` where it does not."""
    try:
        return http.post(path, json=body)
    except httpx.HTTPError as exc:
        what = str(exc) or type(exc).__name__
        raise EngineUnavailable(f"{http.base_url} does not answer {path}: {what}") from None


async def _load(
    url: str, key: str | None, shots: Sequence[Shot], concurrency: int | None, timeout_s: float
) -> tuple[list[Outcome], float, signal.Signals | None]:
    """What was answered, in how many seconds, and the signal that ended it early."""
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=url, headers=client.headers(key), timeout=client.TIMEOUT, limits=limits
    ) as http:
        stop = asyncio.Event()
        with _stops(stop) as came:
            outcomes, duration_s = await play(
                http,
                shots,
                concurrency=concurrency,
                timeout_s=timeout_s,
                ended=_progress(len(shots)),
                stop=stop,
            )
    return outcomes, duration_s, came[0] if came else None


@contextmanager
def _stops(stop: asyncio.Event) -> Iterator[list[signal.Signals]]:
    """Ctrl-C and SIGTERM set `stop` and are put into the list, unless they were ignored anyway."""
    came: list[signal.Signals] = []

    def take(number: signal.Signals) -> None:
        came.append(number)
        stop.set()

    loop = asyncio.get_running_loop()
    wanted = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    for number in wanted:
        loop.add_signal_handler(number, take, number)
    try:
        yield came
    finally:
        for number in wanted:
            loop.remove_signal_handler(number)


def _progress(total: int) -> Callable[[int], None]:
    if not sys.stderr.isatty():
        return lambda done: None

    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} answered", end=end, file=sys.stderr, flush=True)

    return show


# --- words ----------------------------------------------------------------------------------------


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate above 0")
    return value


def _slo(text: str) -> tuple[str, float]:
    """ "ttft:500" in seconds."""
    match = re.fullmatch(r"([a-z0-9]+):([0-9]+(?:\.[0-9]+)?)", text)
    if match is None or match[1] not in GOODPUT_METRICS or not float(match[2]):
        names = ", ".join(GOODPUT_METRICS)
        raise argparse.ArgumentTypeError(f"{text!r} is not like ttft:500 (ms), of {names}")
    return match[1], float(match[2]) * 1e-3


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 < percent <= 100 for percent in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 50,90,99")
    return found


def _show(model: str, result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{model}: {result['completed']} requests in {result['duration_s']:.2f} s, "
        f"{result['input_tokens']} tokens in ({result['cached_tokens']} of them cached), "
        f"{result['output_tokens']} out",
        markup=False,
    )
    console.print(
        f"{result['output_throughput_tokens_per_s']:.1f} output tokens/s, "
        f"{result['request_throughput_per_s']:.2f} requests/s"
    )
    if "slo_ms" in result:
        slos = ", ".join(f"{name.upper()} {ms:g} ms" for name, ms in result["slo_ms"].items())
        console.print(
            f"within {slos}: {100 * result['slo_attainment']:.1f}%, "
            f"{result['request_goodput_per_s']:.2f} requests/s"
        )
    names = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")
    columns = next((list(result[n]) for n in names if result[n] is not None), [])
    table = Table("ms", *columns)
    for name in names:
        if result[name] is not None:
            row = [f"{value:.1f}" for value in result[name].values()]
            table.add_row(name.removesuffix("_ms").upper(), *row)
    if columns:
        console.print(table)
    late = result["sent_late_ms"]
    if late is not None and max(late.values()) > _LATE_MS:
        console.print(
            f"requests were sent up to {max(late.values()):.0f} ms late: "
            "they waited for others (--max-concurrency), or this client is too slow for the load"
        )
    if result["interrupted_by"]:
        console.print(
            f"interrupted ({result['interrupted_by']}): {result['given_up']} more were not sent, "
            "or not answered yet, and count nowhere here",
            style="red",
        )
    if result["failed"]:
        console.print(f"{result['failed']} failed", style="red")
    for error in result["errors"]:
        console.print(f"failed: {error}", style="red", markup=False)
