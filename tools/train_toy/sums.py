"""Sums, differences and products within twenty, and what to say to larger ones."""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.train_toy.exchange import Exchange, dress, held_out

TOO_BIG = "Sorry, I can only do sums up to twenty."

SUM_FORMS = {
    "+": (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "What's {a}+{b}?",
        "How much is {a} plus {b}?",
        "{a} + {b}",
        "{a}+{b}=?",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "Calculate {a} + {b}.",
        "What do you get if you add {b} to {a}?",
    ),
    "-": (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "What's {a}-{b}?",
        "How much is {a} minus {b}?",
        "{a} - {b}",
        "{a}-{b}=?",
        "Subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "Calculate {a} - {b}.",
        "What is the difference between {a} and {b}?",
    ),
    "*": (
        "What is {a} * {b}?",
        "What is {a} times {b}?",
        "What's {a}*{b}?",
        "How much is {a} times {b}?",
        "{a} * {b}",
        "{a}x{b}=?",
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
        "Calculate {a} x {b}.",
        "What is {a} multiplied by {b}?",
        "What is {a} \u00d7 {b}?",
    ),
}
APPLY: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
FACTS = [
    (op, a, b) for op in "+-*" for a in range(21) for b in range(21) if 0 <= APPLY[op](a, b) <= 20
]
# Products are few beside sums, so they are drawn more often than their number alone would have it.
FACT_WEIGHTS = [2 if op == "*" and a * b else 0.5 if a * b == 0 else 1 for op, a, b in FACTS]
_SIGNS = {"+": "+", "-": "-", "*": "x"}


def arithmetic(rng: random.Random) -> Exchange:
    op, a, b = rng.choices(FACTS, FACT_WEIGHTS)[0]
    form = rng.choice(SUM_FORMS[op])
    ask = dress(rng, form.format(a=a, b=b))
    answer = f"{a} {_SIGNS[op]} {b} = {APPLY[op](a, b)}"
    return Exchange(ask, answer, "arithmetic", held_out("sum", op, a, b, form))


def sums_too_big(rng: random.Random) -> Exchange:
    op, size = rng.choice("+-*"), rng.choice((99, 99, 999, 9999))
    a, b = rng.randint(21, size), rng.randint(1, size)
    if rng.random() < 0.5:
        a, b = b, a
    if op == "-" and a < b:
        a, b = b, a
    ask = dress(rng, rng.choice(SUM_FORMS[op]).format(a=a, b=b))
    return Exchange(ask, TOO_BIG, "beyond", held_out("big", op, a, b))
