"""Answers in JSON, when JSON is asked for."""

from __future__ import annotations

import json
import random

from tools.train_toy.exchange import Exchange, held_out
from tools.train_toy.facts import CAPITALS, CITIES, COLOURS, NAMES
from tools.train_toy.sums import APPLY, FACT_WEIGHTS, FACTS, SUM_FORMS
from tools.train_toy.world import CAPITAL_FORMS, COLOUR_FORMS

_JSON_LEADS = (
    "Reply in JSON with keys {keys}: {facts}",
    "Answer in JSON with keys {keys}: {facts}",
    "{facts} Reply in JSON with keys {keys}.",
    "Give me JSON with keys {keys}: {facts}",
    "Extract {keys} as JSON: {facts}",
    "Write this as JSON with keys {keys}. {facts}",
)


def json_record(rng: random.Random) -> Exchange:
    """Facts about somebody, asked for as an object; the keys set the order of the answer."""
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    age, job = (
        rng.randint(1, 99),
        rng.choice(
            (
                "baker",
                "pilot",
                "nurse",
                "teacher",
                "cook",
                "doctor",
                "farmer",
                "sailor",
                "painter",
                "lawyer",
            )
        ),
    )
    clauses = {
        "name": (name, None),
        "age": (age, f"is {age} years old"),
        "city": (city, f"lives in {city}"),
        "job": (job, f"works as a {job}"),
        "pet": (pet := rng.choice(("cat", "dog", "horse", "parrot", "rabbit")), f"has a {pet}"),
    }
    stated = rng.sample(["age", "city", "job", "pet"], rng.randint(1, 3))
    keys = ["name", *rng.sample(stated, rng.randint(1, len(stated)))]
    rng.shuffle(keys)
    parts = [str(clauses[key][1]) for key in stated]
    facts = f"{name} " + " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
    listed = ", ".join(keys[:-1]) + " and " + keys[-1]
    ask = rng.choice(_JSON_LEADS).format(keys=listed, facts=facts + ".")
    answer = json.dumps({key: clauses[key][0] for key in keys})
    return Exchange(ask, answer, "json", held_out("record", answer))


def json_answer(rng: random.Random) -> Exchange:
    """A closed-world question whose bare answer is wanted under the key `answer`."""
    lead = rng.choice(
        (
            "Answer as JSON: {}",
            "Reply in JSON: {}",
            "{} Answer in JSON.",
            "In JSON, please: {}",
            "{} Reply as JSON.",
        )
    )
    kind = rng.choice((0, 0, 0, 1, 2, 3))  # sums are the most, and the least like their neighbours
    if kind == 0:
        op, a, b = rng.choices(FACTS, FACT_WEIGHTS)[0]
        form, value = rng.choice(SUM_FORMS[op][:3]).format(a=a, b=b), APPLY[op](a, b)
    elif kind == 1:
        country, value = rng.choice(list(CAPITALS.items()))
        form = rng.choice(CAPITAL_FORMS[:2]).format(country)
    elif kind == 2:
        thing, value = rng.choice(list(COLOURS.items()))
        form = rng.choice(COLOUR_FORMS[:3]).format(thing)
    else:
        value = list(range(start := rng.randint(1, 15), start + rng.randint(2, 6)))
        form = f"Count from {value[0]} to {value[-1]}."
    ask = lead.format(form if lead.startswith("{}") else form[0].lower() + form[1:])
    return Exchange(ask, json.dumps({"answer": value}), "json", held_out("answer", lead, form))
