"""`penstock bench`: a small load on a running OpenAI-style server, and what came of it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from penstock.cli import client
from penstock.cli.parser import Parser, count
from penstock.cli.serve import KEY_VARIABLES
from penstock.protocol.errors import EngineUnavailable, PenstockError

#: Prompts are drawn from these words; what they come to in tokens is what the server reports.
_WORDS = (
    "water", "river", "stone", "light", "garden", "winter", "letter", "morning", "silver", "road",
)  # fmt: skip
_PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Outcome:
    """One request, by the client's clock, from the moment of sending. With `error`, only that."""

    error: str = ""
    ttft_s: float = 0.0
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first."""
        if self.output_tokens < 2:
            return None
        return (self.end_s - self.ttft_s) / (self.output_tokens - 1)


def make_parser() -> Parser:
    parser = Parser("bench", "Send requests to a running server and measure. Names are vLLM's.")
    add = parser.add_argument
    add("--url", "--base-url", dest="url", help="http://127.0.0.1:8000")
    add("--api-key", metavar="KEY", help=f"else ${KEY_VARIABLES[0]}")
    add("--model", help="the server's first by default")
    add("--num-prompts", type=count, metavar="N", help="requests in all (64)")
    add("--max-concurrency", type=count, metavar="N", help="requests at once (16)")
    add("--random-input-len", dest="input_len", type=count, metavar="TOKENS",
        help="prompt length, roughly (256)")  # fmt: skip
    add("--random-output-len", dest="output_len", type=count, metavar="TOKENS",
        help="output length, exactly (64)")  # fmt: skip
    add("--seed", type=int, help="of the prompts (0)")
    add("--json", action="store_true", help="the result for programs")
    return parser


def run(arguments: list[str]) -> int:
    """0 if every request was answered, else 1."""
    options = vars(make_parser().parse(arguments))
    url = client.base_url(options.get("url", "http://127.0.0.1:8000"))
    key = options.get("api_key") or os.environ.get(KEY_VARIABLES[0])
    with client.connect(url, key) as http:
        model = options.get("model") or client.first_model(http)
        tokens_a_word = _tokens_a_word(http, model)
    dice = random.Random(options.get("seed", 0))
    num_words = max(1, round(options.get("input_len", 256) / tokens_a_word))
    prompts = [
        " ".join(dice.choices(_WORDS, k=num_words)) for _ in range(options.get("num_prompts", 64))
    ]
    body = {"model": model, "max_tokens": options.get("output_len", 64), "ignore_eos": True}
    load = _load(url, key, body, prompts, options.get("max_concurrency", 16))
    outcomes, duration_s = asyncio.run(load)
    result = summary(outcomes, duration_s)
    if options.get("json"):
        print(json.dumps(result, indent=2))
    else:
        _show(model, result)
    return 0 if result["completed"] == len(prompts) else 1


def _tokens_a_word(http: client.Http, model: str) -> float:
    """By the server's tokenizer, where it offers one."""
    response = http.post("/tokenize", json={"model": model, "prompt": " ".join(_WORDS)})
    try:
        return float(response.json()["count"]) / len(_WORDS)
    except (ValueError, KeyError, TypeError):
        return 1.0


async def _load(
    url: str, key: str | None, body: dict[str, Any], prompts: Sequence[str], concurrency: int
) -> tuple[list[Outcome], float]:
    limits = httpx.Limits(max_connections=concurrency)
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(
        base_url=url, headers=client.headers(key), timeout=client.TIMEOUT, limits=limits
    ) as http:

        async def one(prompt: str) -> Outcome:
            async with gate:
                return await _request(http, body | {"prompt": prompt})

        start_s = time.perf_counter()
        outcomes = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return list(outcomes), time.perf_counter() - start_s


async def _request(http: httpx.AsyncClient, body: dict[str, Any]) -> Outcome:
    outcome = Outcome()
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    start_s = time.perf_counter()
    try:
        async with http.stream("POST", "/v1/completions", json=asked) as response:
            if response.is_error:
                await response.aread()
                client.raise_for_status(response)
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                now_s = time.perf_counter()
                if "error" in event:
                    raise EngineUnavailable(str(event["error"]["message"]))
                if event.get("choices"):
                    outcome.ttft_s = outcome.ttft_s or now_s - start_s
                    outcome.end_s = now_s - start_s
                if usage := event.get("usage"):
                    outcome.prompt_tokens = usage["prompt_tokens"]
                    outcome.output_tokens = usage["completion_tokens"]
    except PenstockError as exc:
        outcome.error = exc.message
    except (httpx.HTTPError, ValueError, KeyError) as exc:
        outcome.error = f"{type(exc).__name__}: {exc}"
    return outcome


def summary(outcomes: Sequence[Outcome], duration_s: float) -> dict[str, Any]:
    """Times in ms. TTFT: to the first token; TPOT: a token after it; E2EL: to the last one."""
    good = [outcome for outcome in outcomes if not outcome.error]
    output_tokens = sum(outcome.output_tokens for outcome in good)
    input_tokens = sum(outcome.prompt_tokens for outcome in good)
    times = {
        "ttft_ms": [outcome.ttft_s for outcome in good],
        "tpot_ms": [outcome.tpot_s for outcome in good if outcome.tpot_s is not None],
        "e2el_ms": [outcome.end_s for outcome in good],
    }
    return {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error})[:5],
        "duration_s": duration_s,
        "request_throughput_per_s": len(good) / duration_s,
        "output_throughput_tokens_per_s": output_tokens / duration_s,
        "total_throughput_tokens_per_s": (input_tokens + output_tokens) / duration_s,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        **{name: _distribution(values) for name, values in times.items()},
    }


def _distribution(values_s: Sequence[float]) -> dict[str, float] | None:
    if not values_s:
        return None
    ordered = sorted(values_s)
    found = {"mean": sum(ordered) / len(ordered) * 1e3}
    for percent in _PERCENTILES:
        # The nearest rank: a value that was measured, not one between two.
        rank = -(-percent * len(ordered) // 100)
        found[f"p{percent}"] = ordered[rank - 1] * 1e3
    return found


def _show(model: str, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{model}: {result['completed']} requests in {result['duration_s']:.2f} s, "
        f"{result['input_tokens']} tokens in, {result['output_tokens']} out",
        markup=False,
    )
    console.print(
        f"{result['output_throughput_tokens_per_s']:.1f} output tokens/s, "
        f"{result['request_throughput_per_s']:.2f} requests/s"
    )
    table = Table("ms", "mean", *(f"p{percent}" for percent in _PERCENTILES))
    for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
        if result[name] is not None:
            row = [f"{value:.1f}" for value in result[name].values()]
            table.add_row(name.removesuffix("_ms").upper(), *row)
    console.print(table)
    for error in result["errors"]:
        console.print(f"failed: {error}", style="red", markup=False)
