"""Lengths and arrivals. Sources and licences of the traces' slices: benchmarks/data/README.md."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
SHAREGPT = DATA / "sharegpt_lengths.csv"
AZURE_CONVERSATION = DATA / "azure2023_conversation_lengths.csv"


@dataclass(frozen=True)
class Lengths:
    input_tokens: int
    output_tokens: int

    def scaled(self, divisor: int) -> Lengths:
        """Both divided, and at least 4 tokens: a time per output token needs a few."""
        return Lengths(max(4, self.input_tokens // divisor), max(4, self.output_tokens // divisor))


@dataclass(frozen=True)
class Arrival:
    at_s: float
    prompt_ids: list[int]
    max_tokens: int


def read_lengths(file: Path) -> list[Lengths]:
    with file.open(newline="", encoding="ascii") as opened:
        rows = csv.DictReader(line for line in opened if not line.startswith("#"))
        return [Lengths(int(row["input_tokens"]), int(row["output_tokens"])) for row in rows]


def random_prompt(draw: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    """Ids of no meaning, none of them of the first hundred, where special tokens like to live."""
    return [draw.randrange(100, vocab_size - 100) for _ in range(num_tokens)]


def poisson_arrivals(
    lengths: list[Lengths], rate_per_s: float, window_s: float, seed: int, vocab_size: int
) -> Iterator[Arrival]:
    """A Poisson process given how many arrive, which makes its times uniform: goodput is then never
    above the rate by luck. Each request has lengths drawn from `lengths`, and a prompt of its own.
    """
    draw = random.Random(seed)
    for at_s in sorted(draw.uniform(0.0, window_s) for _ in range(round(rate_per_s * window_s))):
        drawn = draw.choice(lengths)
        prompt_ids = random_prompt(draw, drawn.input_tokens, vocab_size)
        yield Arrival(at_s, prompt_ids, drawn.output_tokens)
