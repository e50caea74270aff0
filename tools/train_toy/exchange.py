"""A question and its answer, which questions are held out, and how people type."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

HELD_OUT_ONE_IN = 12


def held_out(*key: object) -> bool:
    """Whether a combination belongs to the held-out split: fixed by its content, not by a seed."""
    return zlib.crc32(repr(key).encode()) % HELD_OUT_ONE_IN == 0


@dataclass
class Exchange:
    """A user turn and its answer. `held` marks a combination that training never shows."""

    ask: str
    answer: str
    category: str
    held: bool = False


def dress(rng: random.Random, text: str) -> str:
    """The liberties people take in typing: case, final punctuation, politeness."""
    if rng.random() < 0.12:
        text = rng.choice(("Please ", "Can you tell me: ", "Hey, ", "OK, ", "Tell me, ")) + text
    roll = rng.random()
    if roll < 0.15:
        text = text.lower()
    elif roll < 0.25:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.2:
        text = text.rstrip("?.!")
    return text
