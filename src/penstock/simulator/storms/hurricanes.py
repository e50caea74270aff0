"""The hurricane of a seed: what storms have a few at a time, all together.

Most kinds of fault there are, more of them, and many within the same moments: a second one strikes
while the first is being recovered from. Processes of one host die at once. And there is what no
storm has: a shared store, indices that are too small, priorities, salts, SLOs of all sorts, late
requests that wait behind the others, and roles that are taken back.

Whoever has so much against him is promised less (`excuses.py` lets more requests end with an
error). Everything else holds as ever.
"""

from __future__ import annotations

import random
from dataclasses import replace

from penstock.simulator.storms.draw import (
    FIRST_ASK_S,
    ask_of,
    in_order,
    kinds_for,
    rounded,
    shape_of,
)
from penstock.simulator.storms.storm import Ask, Crash, Fault, Shape, Storm


def hurricane_of(seed: int) -> Storm:
    draw = random.Random(f"hurricane {seed}")
    shape = _richer_shape(draw, shape_of(draw))
    span_s = draw.choice((0.5, 2.0, 4.0))
    num_asks = draw.randint(8, 28)
    asks = tuple(
        _richer_ask(draw, ask_of(draw, shape, number, span_s)) for number in range(num_asks)
    )
    storm = Storm(seed=seed, shape=shape, asks=asks)
    kinds = kinds_for(shape)
    kinds = draw.sample(kinds, k=draw.randint(min(5, len(kinds)), len(kinds)))
    end_s = FIRST_ASK_S + span_s + 2.0
    moments_s = [draw.uniform(FIRST_ASK_S, end_s) for _ in range(draw.choice((1, 2, 3, 5)))]
    faults: list[Fault] = []
    for _ in range(draw.choice((4, 6, 9, 12, 18))):
        at_s = rounded(draw.choice(moments_s) + draw.expovariate(1 / 0.05))
        fault = draw.choice(kinds)(draw, storm, at_s)
        faults.append(fault)
        if isinstance(fault, Crash) and draw.random() < 0.3:
            faults += [replace(fault, node=node) for node in _beside(shape, fault.node)]
    return replace(storm, faults=in_order(faults))


def _richer_shape(draw: random.Random, shape: Shape) -> Shape:
    policies = (shape.policy, shape.policy, "split", "slo-aware", "round-robin")
    return replace(
        shape,
        policy=draw.choice(policies),
        store=draw.random() < 0.3,
        index_blocks=draw.choice((2048, 2048, 24)),
        ttft_slo_s=draw.choice((None, 0.05, 0.5)),
        tpot_slo_s=draw.choice((None, 0.01, 0.05)),
        refuses_late=draw.random() < 0.4,
        judged_after=draw.choice((20, 2)),
    )


def _richer_ask(draw: random.Random, ask: Ask) -> Ask:
    online = ask.request_class == "online"
    return replace(
        ask,
        priority=draw.choice((0, 0, 0, -1, 3)),
        salt=draw.choice(("", "", "x")),
        ttft_slo_s=draw.choice((None, None, 0.02, 0.3)) if online else None,
    )


def _beside(shape: Shape, node: str) -> list[str]:
    """The other instances of its host."""
    if node not in shape.instances:
        return []
    host = shape.instances.index(node) % shape.num_hosts
    return [name for name in shape.instances[host :: shape.num_hosts] if name != node]
