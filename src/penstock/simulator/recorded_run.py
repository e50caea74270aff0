"""What a recording says of requests, instances and failures: a simulation of it begins there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from penstock.loadgen.traces import TraceRequest
from penstock.protocol.effects import Reply
from penstock.protocol.errors import ConfigError
from penstock.protocol.instance import CostModel, InstanceCard
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.cluster.instances import Instance
from penstock.service.recipe import CoreRecipe
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
    """An instance was away from `at_s` on until `until_s` (inf: for good). `kind`: "silence", where
    the same process came back, which nobody had heard; "drain", "removal" and "refusal", where that
    was an order; else "crash". `noticed`: somebody told the service, so that it had not to wait."""

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
    watch = _Watch(run)
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
        watch.look(replay, moment)
    run.num_resumed = replay.core.placement.num_resumed
    if not run.sequences:
        raise ConfigError(f"{replay.recording.path} holds no requests that were accepted")
    return run


class _Watch:
    """What becomes of the instances, by how the replayed service sees them."""

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        #: First tokens of a name's earlier lives in the cluster, and of the present one.
        self._before: dict[str, int] = {}
        self._present: dict[str, int] = {}

    def look(self, replay: Replay, moment: Moment) -> None:
        present = replay.core.instances
        for name, instance in present.items():
            self._look_at(instance, moment, replay.began_s or 0.0)
            self._count(name, instance.outcomes.num_started)
        for name, known in self._run.instances.items():
            if name not in present and known.gone is None:
                self._lost(known, "removal", moment.at_s)

    def _look_at(self, instance: Instance, moment: Moment, began_s: float) -> None:
        run, name, card = self._run, instance.name, instance.card
        known = run.instances.get(name)
        heard_s = instance.heard_s - began_s
        if instance.state in ("active", "suspect") and card is not None:
            if known is None:
                known = run.instances[name] = RecordedInstance(name, card, heard_s, card.cost)
            if card.incarnation != known.card.incarnation and known.gone is None:
                self._lost(known, "crash", None)  # its successor was here before it was missed
            if known.gone is not None:
                self._returned(known, card, moment.at_s)
            if instance.load is not None and instance.load.cost.num_steps:
                known.cost = instance.load.cost
            known.heard_s = heard_s
        elif known is not None and known.gone is None and instance.state in _AWAY:
            told = moment.name in ("on_instance_lost", "on_drained", "on_instance_refused")
            self._lost(known, _AWAY[instance.state], moment.at_s if told else None)

    def _lost(self, instance: RecordedInstance, kind: str, told_s: float | None) -> None:
        """`told_s`: when somebody said so; None: it had fallen silent."""
        faults = self._run.faults
        before = sum(fault.instance == instance.name for fault in faults)
        name = f"{instance.name}-{kind}" + (f"-{before + 1}" if before else "")
        at_s = instance.heard_s if told_s is None else told_s
        instance.gone = Fault(name, instance.name, kind, at_s, noticed=told_s is not None)
        faults.append(instance.gone)

    @staticmethod
    def _returned(known: RecordedInstance, card: InstanceCard, now: float) -> None:
        gone = known.gone
        assert gone is not None
        gone.until_s = now
        if known.card.incarnation == card.incarnation:
            gone.name, gone.kind = gone.name.replace(f"-{gone.kind}", "-silence"), "silence"
        known.card, known.gone = card, None

    def _count(self, name: str, started: int) -> None:
        if started < self._present.get(name, 0):
            self._before[name] = self._before.get(name, 0) + self._present[name]
        self._present[name] = started
        self._run.placements[name] = self._before.get(name, 0) + started


#: States in which an instance does nothing, and what to call it.
_AWAY = {"lost": "crash", "refused": "refusal", "drained": "drain"}


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
