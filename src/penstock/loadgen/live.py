"""A load on a running OpenAI-style server, and what its clients saw.

Open loop: requests are sent when they are due, whether or not earlier ones were answered (a closed
loop with `concurrency` at once where that is given). Names and units are those of `vllm bench
serve`: TTFT to the first token, TPOT a token after it, ITL between two pieces of the stream, E2EL
to the last token, all from the moment of sending. An answer counts as one if its stream says that
it is over (a `finish_reason`, or [DONE]); a stream that just breaks off is a failure.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

#: Percentiles where none are asked for.
PERCENTILES = (50.0, 90.0, 99.0)
_ERRORS_KEPT = 5
#: A request that is not over after so long has failed.
TIMEOUT_S = 600.0
#: What a goodput may be asked of, in ms.
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Shot:
    """One request: when it is due, in seconds from the start, and what its body has of its own."""

    at_s: float
    body: Mapping[str, Any]


@dataclass(slots=True)
class Outcome:
    """One request, by the client's clock, from the moment of sending. With `error`, only that."""

    error: str = ""
    ttft_s: float = 0.0
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    itl_s: list[float] = field(default_factory=list)
    #: How much later it was sent than it was due.
    late_s: float = 0.0

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first."""
        if self.output_tokens < 2:
            return None
        return (self.end_s - self.ttft_s) / (self.output_tokens - 1)

    def attains(self, slos_s: Mapping[str, float]) -> bool:
        """`slos_s` by name, of `GOODPUT_METRICS`."""
        times = {"ttft": self.ttft_s, "tpot": self.tpot_s or 0.0, "e2el": self.end_s}
        return not self.error and all(times[name] <= slo for name, slo in slos_s.items())


async def play(
    http: httpx.AsyncClient,
    shots: Sequence[Shot],
    *,
    concurrency: int | None = None,
    timeout_s: float = TIMEOUT_S,
    ended: Callable[[int], None] = lambda count: None,
    stop: asyncio.Event | None = None,
) -> tuple[list[Outcome], float]:
    """What came of each of the shots, and the seconds until the last of them was answered; `ended`
    is told how many are. Every failure is an `Outcome`. Once `stop` is set nothing more is sent,
    and what is not answered by then is given up, and left out of what is returned."""
    gate = asyncio.Semaphore(concurrency or len(shots) or 1)
    start_s = time.perf_counter()
    done = 0

    async def one(shot: Shot) -> Outcome:
        nonlocal done
        await asyncio.sleep(start_s + shot.at_s - time.perf_counter())
        async with gate:
            late_s = time.perf_counter() - start_s - shot.at_s
            outcome = await request(http, shot.body, timeout_s)
        outcome.late_s = late_s
        done += 1
        ended(done)
        return outcome

    async def give_up() -> None:
        await (stop or asyncio.Event()).wait()
        for task in tasks:
            task.cancel()

    tasks = [asyncio.create_task(one(shot)) for shot in shots]
    watch = asyncio.create_task(give_up())
    try:
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        watch.cancel()
    duration_s = time.perf_counter() - start_s
    return [task.result() for task in tasks if not task.cancelled()], duration_s


async def request(
    http: httpx.AsyncClient, body: Mapping[str, Any], timeout_s: float = TIMEOUT_S
) -> Outcome:
    """One streamed completion, given up after `timeout_s`."""
    stream = _Stream()
    try:
        async with asyncio.timeout(timeout_s):
            await _read(http, body, stream)
    except TimeoutError:
        return Outcome(f"no whole answer within {timeout_s:g} s")
    except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError) as exc:
        return Outcome(f"{type(exc).__name__}: {exc}")
    outcome, times_s = stream.outcome, stream.times_s
    if outcome.error:
        return outcome
    if not times_s:
        return Outcome("the stream ended without a token")
    if not stream.is_over:
        return Outcome("the stream broke off: neither a finish_reason nor [DONE]")
    outcome.ttft_s, outcome.end_s = times_s[0], times_s[-1]
    outcome.itl_s = [later - before for before, later in pairwise(times_s)]
    return outcome


async def _read(http: httpx.AsyncClient, body: Mapping[str, Any], stream: _Stream) -> None:
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(asked).encode()
    start_s = time.perf_counter()
    async with http.stream("POST", "/v1/completions", content=content, headers=_JSON) as response:
        if response.is_error:
            await response.aread()
            stream.outcome.error = _said(response)
            return
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                stream.take(line.removeprefix("data:").strip(), time.perf_counter() - start_s)
            if stream.outcome.error:
                return


class _Stream:
    """What came of one answer so far."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self.times_s: list[float] = []
        self.is_over = False

    def take(self, data: str, at_s: float) -> None:
        """The data of one event. Raises `ValueError`, `KeyError` and `TypeError` for what is no
        event of a completion."""
        if data == "[DONE]":
            self.is_over = True
            return
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError(f"the stream has {type(event).__name__} where an object should be")
        if "error" in event:
            self.outcome.error = str(event["error"]["message"])
            return
        choices = event.get("choices") or []
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise ValueError("the stream has choices that are no list of objects")
        if choices:
            self.times_s.append(at_s)
        self.is_over |= any(choice.get("finish_reason") is not None for choice in choices)
        if usage := event.get("usage"):
            _count(self.outcome, usage)


_JSON = {"content-type": "application/json"}


def _count(outcome: Outcome, usage: Mapping[str, Any]) -> None:
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    outcome.prompt_tokens = _tokens("prompt_tokens", usage["prompt_tokens"])
    outcome.output_tokens = _tokens("completion_tokens", usage["completion_tokens"])
    outcome.cached_tokens = _tokens("cached_tokens", cached or 0)


def _tokens(name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"the server's usage has {name} {str(value)[:40]!r}, no number of tokens")
    return value


def _said(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{response.url} answered {response.status_code}: is this an OpenAI-style server?"


def summary(
    outcomes: Sequence[Outcome],
    duration_s: float,
    *,
    slos_s: Mapping[str, float] | None = None,
    percentiles: Sequence[float] = PERCENTILES,
) -> dict[str, Any]:
    """Times in ms. With `slos_s`: what share of all requests was answered within all of them, and
    how many of these there were a second."""
    good = [outcome for outcome in outcomes if not outcome.error]
    output_tokens = sum(outcome.output_tokens for outcome in good)
    input_tokens = sum(outcome.prompt_tokens for outcome in good)
    times = {
        "ttft_ms": [outcome.ttft_s for outcome in good],
        "tpot_ms": [outcome.tpot_s for outcome in good if outcome.tpot_s is not None],
        "itl_ms": [gap for outcome in good for gap in outcome.itl_s],
        "e2el_ms": [outcome.end_s for outcome in good],
        "sent_late_ms": [outcome.late_s for outcome in outcomes],
    }
    found: dict[str, Any] = {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": _most_frequent([outcome.error for outcome in outcomes if outcome.error]),
        "duration_s": duration_s,
        "request_throughput_per_s": len(good) / duration_s,
        "output_throughput_tokens_per_s": output_tokens / duration_s,
        "total_throughput_tokens_per_s": (input_tokens + output_tokens) / duration_s,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cached_tokens": sum(outcome.cached_tokens for outcome in good),
        **{name: distribution(values, percentiles) for name, values in times.items()},
    }
    if slos_s:
        attained = sum(outcome.attains(slos_s) for outcome in outcomes)
        found["slo_ms"] = {name: slo * 1e3 for name, slo in slos_s.items()}
        found["slo_attainment"] = attained / len(outcomes) if outcomes else None
        found["request_goodput_per_s"] = attained / duration_s
    return found


def _most_frequent(errors: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    for error in errors:
        counts[error] = counts.get(error, 0) + 1
    ordered = sorted(counts, key=lambda error: (-counts[error], error))[:_ERRORS_KEPT]
    return [
        error if counts[error] == 1 else f"{error} ({counts[error]} times)" for error in ordered
    ]


def distribution(
    values_s: Sequence[float], percentiles: Sequence[float] = PERCENTILES
) -> dict[str, float] | None:
    """Mean and percentiles in ms; None without values."""
    if not values_s:
        return None
    ordered = sorted(values_s)
    found = {"mean": sum(ordered) / len(ordered) * 1e3}
    for percent in percentiles:
        # The nearest rank: a value that was measured, not one between two.
        rank = max(1, -int(-percent * len(ordered) // 100))
        found[f"p{percent:g}"] = ordered[rank - 1] * 1e3
    return found
