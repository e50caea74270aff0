"""What a recording says of requests, instances and failures: a simulation of it begins there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from penstock.loadgen.traces import TraceRequest
from penstock.protocol.codec import Message
from penstock.protocol.effects import Reply
from penstock.protocol.errors import ConfigError
from penstock.protocol.instance import Attached, CostModel, InstanceCard, Load
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.recipe import CoreRecipe
from penstock.service.recording import message_of
from penstock.simulator.incident import Moment, Replay


@dataclass(slots=True)
class RecordedSequence:
    """One choice of a request. Times in seconds on the recording's clock; NaN: it never came to
    that. `finish` is "" for one that was still running when the recording ended."""

    key: str
    arrival_s: float
    prompt_ids: list[int]
    ttft_slo_s: float | None
    tpot_slo_s: float | None
    first_s: float = math.nan
    end_s: float = math.nan
    output_tokens: int = 0
    finish: str = ""


@dataclass(slots=True)
class Fault:
    """An instance was away from `at_s` on until `until_s` (inf: for good). "crash": another process
    came back, or none; "silence": the same process, which nobody had heard. `noticed`: somebody
    told the service, so that it had not to wait."""

    name: str
    instance: str
    kind: str
    at_s: float
    until_s: float = math.inf
    noticed: bool = False


@dataclass(slots=True)
class RecordedInstance:
    name: str
    card: InstanceCard
    heard_s: float
    cost: CostModel
    gone: Fault | None = None


@dataclass(slots=True)
class RecordedRun:
    """`num_refused` requests were not accepted and are none of `sequences`."""

    recipe: CoreRecipe
    sequences: dict[str, RecordedSequence] = field(default_factory=dict)
    instances: dict[str, RecordedInstance] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    num_refused: int = 0
    num_resumed: int = 0
    seconds: float = 0.0
    #: By instance, those that came to a first token.
    placements: dict[str, int] = field(default_factory=dict)

    @property
    def began_s(self) -> float:
        """The first arrival."""
        return next(iter(self.sequences.values())).arrival_s

    def trace(self) -> list[TraceRequest]:
        """The sequences in order of arrival, the first at 0 s. Prompts are told apart as far as
        whole KV blocks of theirs differ; nothing of what they say is left."""
        numbers = _Numbers()
        return [
            TraceRequest(
                s.arrival_s - self.began_s,
                len(s.prompt_ids),
                max(s.output_tokens, 1),
                numbers.of(s.prompt_ids),
                BLOCK_TOKENS,
            )
            for s in self.sequences.values()
        ]


def collect(replay: Replay) -> RecordedRun:
    """Replays to the end. Raises `ConfigError` where it comes out otherwise than recorded, or where
    there are no requests."""
    run = RecordedRun(replay.recording.header.recipe)
    states: dict[str, str] = {}
    for moment in replay:
        if moment.difference:
            raise ConfigError(
                f"{replay.recording.path} does not replay as it was recorded (step "
                f"{moment.number}: {moment.difference}): replay it without --change first"
            )
        run.seconds = moment.at_s
        _take_in(run, moment)
        for effect in moment.effects:
            if isinstance(effect, Reply):
                _reply(run, moment.at_s, effect)
        for name, instance in replay.core.instances.items():
            if instance.state != states.get(name):
                states[name] = instance.state
                if instance.state == "lost" and name in run.instances:
                    told_s = moment.at_s if moment.name == "on_instance_lost" else None
                    _lost(run, run.instances[name], told_s)
    run.num_resumed = replay.core.placement.num_resumed
    run.placements = {i.name: i.outcomes.num_started for i in replay.core.instances.values()}
    if not run.sequences:
        raise ConfigError(f"{replay.recording.path} holds no requests that were accepted")
    return run


def _take_in(run: RecordedRun, moment: Moment) -> None:
    call: Any = moment.call
    if moment.name == "submit":
        if moment.raised:
            run.num_refused += 1
            return
        for choice in range(call.spec.n):
            key = f"{call.spec.request_id}/{choice}"
            run.sequences[key] = RecordedSequence(
                key,
                moment.at_s,
                call.spec.prompt_ids,
                call.spec.ttft_slo_s,
                call.spec.tpot_slo_s,
            )
    elif moment.name == "cancel":
        for choice in itertools.count() if call.choice is None else (call.choice,):
            sequence = run.sequences.get(f"{call.request_id}/{choice}")
            if sequence is None:
                break
            if not sequence.finish:
                sequence.finish, sequence.end_s = "cancelled", moment.at_s
    elif moment.name == "on_message":
        _heard(run, call.peer, message_of(call), moment.at_s)


def _heard(run: RecordedRun, peer: str, message: Message, now: float) -> None:
    if isinstance(message, Attached):
        _attached(run, message.card, peer, now)
    instance = run.instances.get(peer)
    if instance is None:
        return
    instance.heard_s = now
    own = isinstance(message, Load) and message.incarnation == instance.card.incarnation
    if isinstance(message, Load) and own and message.cost.num_steps:
        instance.cost = message.cost


def _attached(run: RecordedRun, card: InstanceCard, name: str, now: float) -> None:
    known = run.instances.get(name)
    if known is None:
        run.instances[name] = RecordedInstance(name, card, now, card.cost)
        return
    same = known.card.incarnation == card.incarnation
    if known.gone is None and not same:
        _lost(run, known, None)  # its successor was here before anybody missed it
    if known.gone is not None:
        known.gone.until_s = now
        if same:
            known.gone.kind = "silence"
            known.gone.name = known.gone.name.replace("-crash", "-silence")
        known.gone = None
    known.card = card


def _lost(run: RecordedRun, instance: RecordedInstance, told_s: float | None) -> None:
    """`told_s`: when somebody said so; None: it had fallen silent."""
    before = sum(fault.instance == instance.name for fault in run.faults)
    name = f"{instance.name}-crash" + (f"-{before + 1}" if before else "")
    at_s = instance.heard_s if told_s is None else told_s
    instance.gone = Fault(name, instance.name, "crash", at_s, noticed=told_s is not None)
    run.faults.append(instance.gone)


def _reply(run: RecordedRun, now: float, reply: Reply) -> None:
    delta = reply.event
    sequence = run.sequences.get(f"{reply.request_id}/{delta.choice}")
    if sequence is None:
        return
    if delta.ids:
        if not sequence.output_tokens:
            sequence.first_s = now
        sequence.output_tokens += len(delta.ids)
    if delta.finish is not None:
        sequence.finish, sequence.end_s = delta.finish, now


class _Numbers:
    """Prefixes of whole blocks as numbers, in the order in which they were seen."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}

    def of(self, ids: list[int]) -> tuple[int, ...]:
        found: list[int] = []
        parent = -1
        for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            block = parent, tuple(ids[start : start + BLOCK_TOKENS])
            parent = self._known.setdefault(block, len(self._known))
            found.append(parent)
        return tuple(found)


def summary_of(values: Iterable[float]) -> dict[str, float] | None:
    """Percentiles of what is there; None where nothing is."""
    found = sorted(v for v in values if not math.isnan(v))
    if not found:
        return None
    return {f"p{p}": found[max(0, -(-p * len(found) // 100) - 1)] for p in (50, 90, 99)}
