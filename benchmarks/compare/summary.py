"""From raw records to medians, same-round ratios, fractions of the floor and goodput. Pure.

A record is one run of one task by one engine: `engine`, `task`, `wave` and `repeat`, what the
worker said (`elapsed_s`, `num_tokens`, `first_token_s`), and the probes around it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Record = Mapping[str, Any]
#: Metrics of which less is better; of the rest, more.
LESS_IS_BETTER = ("ttft_s", "tpot_ms")


def metrics(record: Record) -> dict[str, float]:
    """A single stream has times to its first token and per token after it; a batch a rate."""
    if record["context_tokens"] is None:
        return {"output_tok_s": record["num_tokens"] / record["elapsed_s"]}
    first_s, steps = record["first_token_s"], record["num_tokens"] - 1
    return {"ttft_s": first_s, "tpot_ms": 1e3 * (record["elapsed_s"] - first_s) / steps}


def floor_ms(read_bytes: float, bandwidth_gb_s: float) -> float:
    """Least time of a step that reads so many bytes once."""
    return read_bytes / bandwidth_gb_s / 1e6


def summarise(
    records: Sequence[Record],
    weight_bytes: Mapping[str, int],
    kv_bytes_per_token: int,
    reference: str | None,
) -> dict[str, dict[str, dict[str, float]]]:
    """engine -> task -> figure. Beside each metric's median stand `METRIC_ratio`, the median of its
    ratios to the reference's in the same round, and of a stream the times per token over two
    floors: of the weights alone, and of the weights with the context's keys and values."""
    rounds = {(r["wave"], r["repeat"], r["task"], r["engine"]): r for r in records}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for engine, task in dict.fromkeys((r["engine"], r["task"]) for r in records):
        own = [r for r in records if (r["engine"], r["task"]) == (engine, task)]
        figures: dict[str, float] = {"rounds": len(own)}
        for name in metrics(own[0]):
            figures[name] = median(metrics(r)[name] for r in own)
            pairs = [(r, rounds.get((r["wave"], r["repeat"], task, reference))) for r in own]
            ratios = [metrics(r)[name] / metrics(other)[name] for r, other in pairs if other]
            if ratios:
                figures[f"{name}_ratio"] = median(ratios)
        if "tpot_ms" in figures:
            weights = weight_bytes[engine]
            context = own[0]["context_tokens"] * kv_bytes_per_token
            figures["over_floor"] = median(_over_floor(r, weights) for r in own)
            figures["over_floor_with_kv"] = median(_over_floor(r, weights + context) for r in own)
        figures["bandwidth_gb_s"] = median(r["bandwidth_gb_s"] for r in own)
        figures["matrix_tflops"] = median(r["matrix_tflops"] for r in own)
        found.setdefault(engine, {})[task] = figures
    return found


def _over_floor(record: Record, read_bytes: float) -> float:
    return metrics(record)["tpot_ms"] / floor_ms(read_bytes, record["bandwidth_gb_s"])


def same_round_ratios(
    records: Sequence[Record], pairs: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
    """For each (ours, theirs), task and metric: the median of same-round ratios."""
    rounds = {(r["wave"], r["repeat"], r["task"], r["engine"]): metrics(r) for r in records}
    tasks = list(dict.fromkeys(r["task"] for r in records))
    found = []
    for (ours, theirs), task in itertools.product(pairs, tasks):
        both = [
            (rounds[key], rounds[other])
            for key in rounds
            if key[2:] == (task, ours) and (other := (*key[:3], theirs)) in rounds
        ]
        for name in both[0][0] if both else ():
            ratio = median(mine[name] / other[name] for mine, other in both)
            row = {"ours": ours, "theirs": theirs, "task": task, "metric": name}
            found.append({**row, "ratio": ratio, "rounds": len(both)})
    return found


def agreement(ids: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, dict[str, int]]:
    """How many prompts each engine goes on with the token, and with the tokens, that most engines
    go on with. Random weights have narrow margins: some differ between two orders of summation."""
    usual = [_commonest(continuations) for continuations in zip(*ids.values(), strict=True)]
    usual_first = [_commonest([c[:1] for c in all_]) for all_ in zip(*ids.values(), strict=True)]
    return {
        engine: {
            "prompts": len(usual),
            "same_first_token": sum(
                tuple(a[:1]) == b for a, b in zip(found, usual_first, strict=True)
            ),
            "same_tokens": sum(tuple(a) == b for a, b in zip(found, usual, strict=True)),
        }
        for engine, found in ids.items()
    }


def _commonest(continuations: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Of equally common ones the first."""
    return Counter(map(tuple, continuations)).most_common(1)[0][0]


def worth_repeating(
    records: Iterable[Record], engine: str, task: str, slow_s: float, always: Sequence[str]
) -> bool:
    """A task that has taken an engine longer than `slow_s` is not repeated: its first run says
    enough. Ours and the reference are always repeated."""
    own = [r["elapsed_s"] for r in records if (r["engine"], r["task"]) == (engine, task)]
    return not own or engine in always or max(own) <= slow_s


# --- online ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must meet to count."""

    ttft_s: float = 5.0
    tpot_ms: float = 250.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its client saw it, in seconds after it was due. `finished_s` None: it failed,
    or was not finished when the run was over."""

    num_tokens: int
    first_token_s: float | None
    finished_s: float | None

    @property
    def tpot_ms(self) -> float | None:
        if self.first_token_s is None or self.finished_s is None or self.num_tokens < 2:
            return None
        return 1e3 * (self.finished_s - self.first_token_s) / (self.num_tokens - 1)

    def meets(self, objective: Objective) -> bool:
        if self.finished_s is None or self.first_token_s is None:
            return False
        return self.first_token_s <= objective.ttft_s and (self.tpot_ms or 0.0) <= objective.tpot_ms


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank: a value that was measured. NaN of nothing."""
    if not values:
        return math.nan
    rank = max(1, math.ceil(share * len(values)))
    return sorted(values)[rank - 1]


def summarise_online(
    outcomes: Sequence[Outcome], window_s: float, objective: Objective
) -> dict[str, float]:
    """Goodput: requests that arrived in the window and met the objective, per second of it."""
    good = sum(outcome.meets(objective) for outcome in outcomes)
    first_s = [o.first_token_s for o in outcomes if o.first_token_s is not None]
    tpot_ms = [o.tpot_ms for o in outcomes if o.tpot_ms is not None]
    found = {
        "requests": len(outcomes),
        "finished": sum(o.finished_s is not None for o in outcomes),
        "attainment": good / len(outcomes) if outcomes else math.nan,
        "goodput_per_s": good / window_s,
    }
    for share in (0.5, 0.9, 0.99):
        found[f"ttft_p{share * 100:.0f}_s"] = percentile(first_s, share)
        found[f"tpot_p{share * 100:.0f}_ms"] = percentile(tpot_ms, share)
    return found


def best_goodput(online: Sequence[Record]) -> dict[str, dict[str, float]]:
    """engine -> the rate at which its goodput was highest, and that goodput."""
    best: dict[str, dict[str, float]] = {}
    for row in online:
        if row["goodput_per_s"] > best.get(row["engine"], {}).get("goodput_per_s", -1.0):
            best[row["engine"]] = {k: row[k] for k in ("rate_per_s", "goodput_per_s", "attainment")}
    return best
