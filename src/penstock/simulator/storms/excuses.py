"""When a request may be refused, and when it may end with an error: only if, at some moment of its
life, no instance could be counted on. Any single failure ends in tokens."""

from __future__ import annotations

from penstock.simulator.storms.storm import (
    SERVICES,
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
    Skew,
    Slow,
    SpoilTiers,
    Storm,
    TakeBack,
)

#: Until all have noticed that a fault is over.
_AFTERWARDS_S = 3.0
#: From so many lost frames on nothing can be promised.
_LOUD = 0.05


#: Two clocks may tell a deadline so differently.
_SAME_TIME_S = 0.01


def num_sequences(storm: Storm) -> int:
    return sum(ask.n for ask in storm.asks)


def may_refuse(storm: Storm, ask: Ask, code: str, refused_s: float) -> bool:
    """Its service is down, or has a bound: on its queue, or on the time to a first token."""
    if code == "overloaded":
        shape = storm.shape
        asked = ask.ttft_slo_s is not None or shape.ttft_slo_s is not None
        return (asked and shape.refuses_late) or shape.max_queue < num_sequences(storm)
    return code == "engine_unavailable" and any(
        fault.at_s <= refused_s
        and (refused_s <= fault.over_s or fault.again_after_s is None)
        and ask.service == (fault.node if isinstance(fault, Crash) else fault.service)
        for fault in storm.faults
        if isinstance(fault, Crash | Leave)
    )


def is_over_budget(storm: Storm, ask: Ask, ended_s: float) -> bool:
    """A clock that is wrong may find so too early."""
    if ask.budget_s is None:
        return False
    skewed = any(isinstance(fault, Skew) for fault in storm.faults)
    return skewed or ended_s >= ask.at_s + ask.budget_s - _SAME_TIME_S


def may_fail(storm: Storm, ask: Ask, ended_s: float) -> bool:
    spans = [span for fault in storm.faults if (span := _span(storm, fault, ask.service))]
    begin_s = ask.at_s
    moments = [begin_s, *(s for _, s, _ in spans if begin_s < s <= ended_s)]
    for moment_s in moments:
        out: set[str] = set()  # only asked whether it has everybody
        for who, from_s, to_s in spans:
            if from_s <= moment_s <= to_s:
                out.update(who)
        if out.issuperset(storm.shape.instances):
            return True
    return False


def _span(storm: Storm, fault: Fault, service: str) -> tuple[tuple[str, ...], float, float] | None:
    """Who cannot be counted on, from when, until when."""
    everybody = storm.shape.instances
    until_s = fault.over_s + _AFTERWARDS_S
    match fault:
        case Crash(node=node, again_after_s=None) if node not in SERVICES:
            return (node,), fault.at_s, float("inf")
        case Crash(node=node) | Halt(node=node) | Skew(node=node):
            if node in SERVICES:
                return (everybody, fault.at_s, until_s) if node == service else None
            return (node,), fault.at_s, _found_again_s(storm, until_s)
        case Leave(service=name):
            return (everybody, fault.at_s, until_s) if name == service else None
        case Hang(node=node):
            return (node,), fault.at_s, until_s
        case Cut(these=these, those=those):
            if service in these:
                return those, fault.at_s, until_s
            return (these, fault.at_s, until_s) if service in those else None
        case Noise(loss=loss, reorder=reorder):
            loud = loss >= _LOUD or reorder >= _LOUD
            return (everybody, fault.at_s, until_s) if loud else None
        case Drain(node=node):
            return (node,), fault.at_s, float("inf")
        case (
            Assignment()
            | Lead()
            | Raise()
            | RegistryLoss()
            | ScaleUp()
            | Slow()
            | SpoilTiers()
            | TakeBack()
        ):
            return None


def _found_again_s(storm: Storm, until_s: float) -> float:
    """Who comes back while the registry is away is found when that is back."""
    losses = [f.over_s for f in storm.faults if isinstance(f, RegistryLoss)]
    return max([until_s, *(over_s + _AFTERWARDS_S for over_s in losses)])
