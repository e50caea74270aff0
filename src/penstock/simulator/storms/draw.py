"""The storm of a seed.

Each seed leaves out most kinds of fault and has more of the rest: storms that are all alike hide
what shows only where one kind is not in another's way (swarm testing; Groce, Zhang, Eide, Chen and
Regehr, ISSTA 2012).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import get_args

from penstock.protocol.instance import Role
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.simulator.storms.storm import (
    INSTANCES,
    REGISTRY,
    Ask,
    Assignment,
    Crash,
    Cut,
    Drain,
    Fault,
    Halt,
    Hang,
    Lead,
    Leave,
    Noise,
    Raise,
    RegistryLoss,
    ScaleUp,
    Shape,
    Skew,
    Slow,
    SpoilTiers,
    Storm,
    TakeBack,
)

#: Instances attach, and roles are given, before the first request.
FIRST_ASK_S = 0.6
_ROLES = tuple(role for role in get_args(Role) if role != "encode")


def storm_of(seed: int) -> Storm:
    draw = random.Random(seed)
    shape = shape_of(draw)
    span_s = draw.choice((0.5, 2.0, 4.0))
    num_asks = draw.randint(16, 28) if draw.random() < 0.15 else draw.randint(4, 14)
    asks = tuple(ask_of(draw, shape, number, span_s) for number in range(num_asks))
    storm = Storm(seed=seed, shape=shape, asks=asks)
    kinds = draw.sample(kinds_for(shape), k=draw.choice((1, 1, 2, 2, 3, 4)))
    faults: list[Fault] = []
    for _ in range(draw.choice((0, 1, 2, 3, 4, 6, 10))):
        if draw.random() < 0.6:  # while something is done for a request
            at_s = rounded(draw.choice(asks).at_s + draw.expovariate(1 / 0.06))
        else:
            at_s = rounded(draw.uniform(FIRST_ASK_S - 0.3, FIRST_ASK_S + span_s + 2.0))
        faults.append(draw.choice(kinds)(draw, storm, at_s))
    return Storm(seed=seed, shape=shape, asks=asks, faults=in_order(faults))


def rounded(seconds: float) -> float:
    return round(seconds, 4)


def shape_of(draw: random.Random) -> Shape:
    num_instances = draw.choice((2, 2, 3, 3, 3, 4, 5))
    return Shape(
        num_instances=num_instances,
        num_services=draw.choice((1, 1, 1, 2)),
        policy=draw.choice(
            ("in-turn", "in-turn", "in-turn", "slo-aware", "kv-aware", "least-load")
        ),
        pd=draw.choice(("off", "off", "auto", f"1:{num_instances - 1}", f"{num_instances - 1}:1")),
        registry=draw.random() < 0.35,
        num_blocks=draw.choice((20, 24, 32, 48, 96, 160)),
        num_windows=draw.choice((0, 8, 64)),
        host_blocks=draw.choice((0, 0, 8, 40)),
        disk_blocks=draw.choice((0, 0, 30)),
        means=draw.choice((("map", "tcp"), ("map", "tcp"), ("tcp",), ("map",), ())),
        num_hosts=draw.choice((1, 1, 2)),
        max_num_seqs=draw.choice((2, 4, 8)),
        max_num_batched_tokens=draw.choice((32, 128, 512)),
        max_chunk_tokens=draw.choice((None, None, 16)),
        enable_prefix_caching=draw.random() < 0.9,
        max_queue=draw.choice((1024, 1024, 1024, 6)),
        max_waiting=draw.choice((1024, 1024, 1024, 3)),
        ttft_slo_s=draw.choice((None, None, None, 0.5)),
        max_run_steps=draw.choice((1, 1, 16)),
        latency_s=draw.choice((0.0002, 0.0002, 0.004, 0.05)),
        credit_window=draw.choice((512, 512, 48)),
        job_fails=draw.choice((0.0, 0.0, 0.0, 0.1)),
        job_hangs=draw.choice((0.0, 0.0, 0.0, 0.03)),
        block_spoilt=draw.choice((0.0, 0.0, 0.0, 0.05)),
    )


def ask_of(draw: random.Random, shape: Shape, number: int, span_s: float) -> Ask:
    """A request fits the smallest pool there is, alone."""
    most_tokens = shape.num_blocks * BLOCK_TOKENS - 1
    shared = draw.choice((0, 0, 16, 48, 96, 160))
    own = draw.choice((1, 15, 16, 17, 40, 90, 200))
    max_tokens = min(draw.choice((1, 2, 5, 17, 33, 60, 100)), most_tokens // 2)
    shared = min(shared, most_tokens - max_tokens - 1)
    return Ask(
        number=number,
        at_s=rounded(FIRST_ASK_S + draw.choice((draw.random(), draw.random() ** 4, 0.0)) * span_s),
        service=draw.choice(shape.services),
        family=draw.choice((0, 0, 1)),
        shared_tokens=shared,
        own_tokens=min(own, most_tokens - max_tokens - shared),
        max_tokens=max_tokens,
        n=draw.choice((1, 1, 1, 2, 3)),
        request_class=draw.choice(("online", "online", "offline")),
        cancel_after_s=rounded(draw.random() ** 2 * 3) if draw.random() < 0.12 else None,
        budget_s=draw.choice((0.3, 1.0, 4.0)) if draw.random() < 0.1 else None,
    )


# --- kinds of fault ------------------------------------------------------------------------------

Kind = Callable[[random.Random, Storm, float], Fault]


def kinds_for(shape: Shape) -> list[Kind]:
    kinds: list[Kind] = [
        *(_crash, _crash, _crash, _halt, _slow, _cut, _cut_some, _cut_one_way, _noise),
        *(_raise, _raise, _hang, _skew, _drain, _scale_up, _assignment),
        *(_crash_service, _leave),
    ]
    if shape.num_windows and "map" in shape.means:
        kinds += [_take_back, _take_back, _take_back]
    if shape.host_blocks or shape.disk_blocks:
        kinds.append(_spoil_tiers)
    if shape.registry:
        kinds += [_registry_loss, _registry_cut]
    else:
        kinds += [_lead, _assignment]
    return kinds


def _for_s(draw: random.Random) -> float:
    """Below, between and above what makes an instance suspect (1.25) and lost (2.5)."""
    return rounded(draw.choice((0.05, 0.4, 1.5, 2.4, 3.2, 6.0)) * draw.uniform(0.8, 1.2))


def _crash(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    again_after_s = rounded(draw.choice((0.01, 0.5, 1.2, 3.0)) * draw.uniform(0.8, 1.2))
    return Crash(
        at_s=at_s,
        node=draw.choice(storm.shape.instances),
        noticed=draw.random() < 0.5,
        words_arrive=draw.random() < 0.5,
        again_after_s=again_after_s if draw.random() < 0.75 else None,
    )


def _crash_service(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    node = draw.choice(storm.shape.services)
    return Crash(at_s=at_s, node=node, again_after_s=rounded(draw.uniform(0.1, 4.0)))


def _leave(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    service = draw.choice(storm.shape.services)
    return Leave(at_s=at_s, service=service, again_after_s=rounded(draw.uniform(0.1, 4.0)))


def _halt(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    node = draw.choice((*storm.shape.instances, *storm.shape.services))
    return Halt(at_s=at_s, node=node, for_s=_for_s(draw))


def _slow(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    node, factor = draw.choice(storm.shape.instances), draw.choice((3.0, 20.0, 100.0))
    return Slow(at_s=at_s, node=node, factor=factor, for_s=rounded(draw.uniform(0.2, 3.0)))


def _hang(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    return Hang(at_s=at_s, node=draw.choice(storm.shape.instances))


def _raise(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    return Raise(at_s=at_s, node=draw.choice(storm.shape.instances), count=draw.choice((1, 1, 2)))


def _cut(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    one, other = draw.sample((*storm.shape.instances, *storm.shape.services), 2)
    return Cut(at_s=at_s, these=(one,), those=(other,), for_s=_for_s(draw))


def _cut_one_way(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    one, other = draw.sample((*storm.shape.instances, *storm.shape.services), 2)
    return Cut(at_s=at_s, these=(one,), those=(other,), for_s=_for_s(draw), one_way=True)


def _cut_some(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    everybody = [*storm.shape.instances, *storm.shape.services]
    draw.shuffle(everybody)
    middle = draw.randrange(1, len(everybody))
    these, those = everybody[:middle], everybody[middle:]
    return Cut(at_s=at_s, these=tuple(these), those=tuple(those), for_s=_for_s(draw))


def _noise(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    return Noise(
        at_s=at_s,
        for_s=rounded(draw.uniform(0.3, 4.0)),
        loss=draw.choice((0.0, 0.01, 0.05, 0.2)),
        duplicate=draw.choice((0.0, 0.1, 0.3)),
        jitter_s=draw.choice((0.0, 0.005, 0.1)),
        reorder=draw.choice((0.0, 0.0, 0.02, 0.2)),
        late_s=draw.choice((0.2, 2.0)),
    )


def _take_back(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    node, overwrites = draw.choice(storm.shape.instances), draw.random() < 0.7
    return TakeBack(at_s=at_s, node=node, overwrites=overwrites)


def _spoil_tiers(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    return SpoilTiers(at_s=at_s, node=draw.choice(storm.shape.instances))


def _skew(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    return Skew(
        at_s=at_s,
        node=draw.choice((*storm.shape.instances, *storm.shape.services)),
        jump_s=draw.choice((0.0, 0.3, 2.0, 10.0)),
        drift=draw.choice((0.0, -0.04, -0.01, 0.01, 0.04)),
        for_s=rounded(draw.uniform(0.5, 4.0)),
    )


def _drain(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    service, node = draw.choice(storm.shape.services), draw.choice(storm.shape.instances)
    return Drain(at_s=at_s, service=service, node=node, out=draw.random() < 0.5)


def _scale_up(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    free = INSTANCES[storm.shape.num_instances :]
    return ScaleUp(at_s=at_s, node=free[0]) if free else _crash(draw, storm, at_s)


def _assignment(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    service, node = draw.choice(storm.shape.services), draw.choice(storm.shape.instances)
    return Assignment(at_s=at_s, service=service, node=node, role=draw.choice(_ROLES))


def _lead(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    return Lead(at_s=at_s, service=draw.choice(storm.shape.services))


def _registry_loss(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    return RegistryLoss(at_s=at_s, for_s=_for_s(draw))


def _registry_cut(draw: random.Random, storm: Storm, at_s: float) -> Fault:
    node = draw.choice((*storm.shape.instances, *storm.shape.services))
    return Cut(at_s=at_s, these=(node,), those=(REGISTRY,), for_s=_for_s(draw))


def in_order(faults: list[Fault]) -> tuple[Fault, ...]:
    return tuple(sorted(faults, key=lambda fault: fault.at_s))
