"""A recorded run with one thing changed: the same requests, instances and failures, simulated.

With another policy, another number of instances or without a failure, everything that follows comes
out otherwise; what would have come of it, only a simulation can say. It is run twice, unchanged and
changed. How far the unchanged one is from what was recorded says what the other is worth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.protocol.instance import CostModel
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.policies.routing import policy_named
from penstock.simulator.build import SERVICE, Deployment
from penstock.simulator.experiment import WARM_UP_S, run
from penstock.simulator.outcome import Outcome
from penstock.simulator.quantities import seconds_of
from penstock.simulator.recorded_run import Fault, RecordedInstance, RecordedRun, summary_of
from penstock.simulator.spec import ClusterSpec, PoolSpec

#: At the least between two faults of the simulation and its beginning.
_AT_ONCE_S = 0.001
#: Fewer measured steps say little.
_ENOUGH_STEPS = 32
#: More is a slip of the finger, and would fill the memory.
_MOST_INSTANCES = 9999
CHANGES = "policy, pd, instances, ttft_slo, tpot_slo, without, speed"


@dataclass(frozen=True, slots=True)
class Case:
    """What is simulated. `copies`: further instances like the first one."""

    policy: str
    pd: str
    instances: tuple[str, ...]
    ttft_slo_s: float | None
    tpot_slo_s: float | None
    faults: tuple[Fault, ...]
    copies: int = 0
    speed: float = 1.0


@dataclass(slots=True)
class Told:
    """One way in which it went. Times in seconds; percentiles of answered requests, None where none
    was. `attained`: the share of all requests within the SLOs; None without any."""

    name: str
    ttft_s: dict[str, float] | None
    tpot_s: dict[str, float] | None
    answered: int
    requests: int
    attained: float | None
    #: Times that a sequence went on after it had lost its place, and placements by instance.
    resumed: int
    placements: dict[str, int]


@dataclass(slots=True)
class WhatIf:
    """`ttft_error`, `tpot_error`: of the unchanged simulation, in the median over requests,
    relative to what was recorded; None where nothing can be compared."""

    change: str
    recorded: Told
    unchanged: Told
    changed: Told
    ttft_error: float | None
    tpot_error: float | None
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def case_of(recorded: RecordedRun) -> Case:
    recipe = recorded.recipe
    roles = recipe.config.roles.policy
    pd = "off" if recipe.in_one_place or roles is None else "auto"
    if roles is not None and roles.static is not None:
        pd = "{}:{}".format(*roles.static)
    slos = [(s.ttft_slo_s, s.tpot_slo_s) for s in recorded.sequences.values()]
    return Case(
        policy=recipe.policy,
        pd=pd,
        instances=tuple(recorded.instances),
        ttft_slo_s=_common(recipe.config.ttft_slo_s, [ttft for ttft, _ in slos]),
        tpot_slo_s=_common(recipe.config.tpot_slo_s, [tpot for _, tpot in slos]),
        faults=tuple(recorded.faults),
    )


def _common(default: float | None, asked: Sequence[float | None]) -> float | None:
    """The service's, or what all requests have asked for alike."""
    return asked[0] if default is None and len(set(asked)) == 1 else default


def change(case: Case, words: str) -> Case:
    """`what=how` (see `CHANGES`). Raises `ConfigError`."""
    what, equals, how = words.partition("=")
    match what if equals else "":
        case "policy":
            policy_named(how)
            return replace(case, policy=how)
        case "pd":
            return replace(case, pd=how)
        case "instances":
            return _instances(case, how)
        case "ttft_slo":
            return replace(case, ttft_slo_s=seconds_of(how, "ttft_slo"))
        case "tpot_slo":
            return replace(case, tpot_slo_s=seconds_of(how, "tpot_slo"))
        case "speed":
            if not re.fullmatch(r"\d+(\.\d+)?", how) or not float(how):
                raise ConfigError(f"--change {words}: a speed is a number above 0")
            return replace(case, speed=float(how))
        case "without":
            left = tuple(fault for fault in case.faults if fault.name != how)
            if left == case.faults:
                known = ", ".join(f"{f.name} at {f.at_s:.1f} s" for f in case.faults) or "none"
                raise ConfigError(f"there is no failure {how!r} in the recording: there is {known}")
            return replace(case, faults=left)
        case _:
            raise ConfigError(f"--change {words}: write what=how, of {CHANGES}")


def _instances(case: Case, how: str) -> Case:
    if not re.fullmatch(r"[+-]?\d{1,9}", how):
        raise ConfigError(f"--change instances={how}: write +1, -1 or a number")
    have = len(case.instances) + case.copies
    wanted = have + int(how) if how[0] in "+-" else int(how)
    if not 1 <= wanted <= _MOST_INSTANCES:
        raise ConfigError(
            f"--change instances={how}: {wanted} instances; there may be 1 to {_MOST_INSTANCES}"
        )
    kept = case.instances[:wanted]
    faults = tuple(fault for fault in case.faults if fault.instance in kept)
    return replace(case, instances=kept, copies=wanted - len(kept), faults=faults)


def what_if(recorded: RecordedRun, changes: Sequence[str], seed: int = 0) -> WhatIf:
    """Raises `ConfigError` for a change that makes no sense, and where the recording does not say
    how long steps take."""
    before = after = case_of(recorded)
    for words in changes:
        after = change(after, words)
    requests = recorded.trace()
    unchanged, outcome = _simulate(recorded, before, requests, seed, "simulated, unchanged", after)
    changed, _ = _simulate(recorded, after, requests, seed, "simulated, changed", after)
    ttft_s, tpot_s = _recorded_times(recorded)
    notes = []
    if recorded.num_refused:
        notes.append(
            f"{recorded.num_refused} requests were refused then; how long their answers would have "
            "been nobody knows, so they are left out everywhere"
        )
    return WhatIf(
        change=", ".join(changes),
        recorded=_tell_recorded(recorded, ttft_s, tpot_s, after),
        unchanged=unchanged,
        changed=changed,
        ttft_error=_median_error(outcome.ttft_s, ttft_s),
        tpot_error=_median_error(outcome.tpot_s, tpot_s),
        faults=list(recorded.faults),
        notes=notes,
    )


# --- simulating -----------------------------------------------------------------------------------


def _simulate(
    recorded: RecordedRun,
    case: Case,
    requests: Sequence[TraceRequest],
    seed: int,
    name: str,
    judged_by: Case,
) -> tuple[Told, Outcome]:
    """All are judged by the SLOs of `judged_by`, so that numbers can be compared."""
    requests = [replace(r, arrival_s=r.arrival_s / case.speed) for r in requests]
    kept: list[Deployment] = []

    def prepare(deployment: Deployment) -> None:
        kept.append(deployment)
        for fault in case.faults:
            _arrange(deployment, fault, recorded.began_s, case.speed)

    with TemporaryDirectory() as folder:
        outcome = run(_spec(recorded, case, Path(folder)), requests, seed=seed, prepare=prepare)
    placements = {
        _plain(instance.name): instance.outcomes.num_started
        for instance in kept[0].service.instances.values()
    }
    answered = np.array([f in ("stop", "length") for f in outcome.finish])
    told = Told(
        name=name,
        ttft_s=summary_of(outcome.ttft_s.tolist()),
        tpot_s=summary_of(outcome.tpot_s.tolist()),
        answered=int(answered.sum()),
        requests=len(requests),
        attained=_attained(outcome.ttft_s, outcome.tpot_s, answered, judged_by),
        resumed=outcome.resumed,
        placements=placements,
    )
    return told, outcome


def _spec(recorded: RecordedRun, case: Case, folder: Path) -> ClusterSpec:
    names = {name: name for name in case.instances}
    first = next(iter(recorded.instances))
    names |= {f"{first}-copy-{number + 1}": first for number in range(case.copies)}
    pools = [
        _pool(recorded.instances[like], _cost(recorded, like), name, folder)
        for name, like in names.items()
    ]
    config = recorded.recipe.config
    return ClusterSpec(
        name="incident",
        pools=tuple(pools),
        policy=case.policy,
        pd=case.pd,
        ttft_slo_s=case.ttft_slo_s,
        tpot_slo_s=case.tpot_slo_s,
        admission=case.ttft_slo_s is not None,
        kv_index=recorded.recipe.kv_index,
        max_queue=config.max_queue,
    )


def _cost(recorded: RecordedRun, name: str) -> CostModel:
    """What the instance has measured; if that is next to nothing, what its like has."""
    own = recorded.instances[name]
    if own.cost.num_steps >= _ENOUGH_STEPS:
        return own.cost
    kind = own.card.device, own.card.model_digest
    alike = [
        i.cost for i in recorded.instances.values() if (i.card.device, i.card.model_digest) == kind
    ]
    cost = max(alike, key=lambda found: found.num_steps)
    if not cost.base_s + cost.per_token_s + cost.per_row_s:
        raise ConfigError(
            f"neither {name} nor its like had measured any steps when the recording ended: nothing "
            "is known of how long they take"
        )
    return cost


def _pool(instance: RecordedInstance, cost: CostModel, name: str, folder: Path) -> PoolSpec:
    """A pool of this one instance: what its card says, and how long steps take."""
    card = instance.card
    terms: dict[str, Any] = {
        term: max(getattr(cost, term), 0.0)
        for term in (
            "base_s", "per_token_s", "per_row_s", "per_context_token_s", "per_attention_s",
        )
    }  # fmt: skip
    terms["kv_tokens"] = card.num_blocks * BLOCK_TOKENS
    terms["kv_bytes_per_token"] = card.layout.block_bytes // card.layout.block_tokens
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(terms))
    return PoolSpec(
        name=name,
        count=1,
        hardware=str(path),
        max_num_batched_tokens=card.max_num_batched_tokens,
        max_num_seqs=card.max_num_seqs,
        max_model_len=card.max_model_len,
    )


def _plain(name: str) -> str:
    """ "engine-0-0" is the only one of the pool "engine-0"."""
    return name.removesuffix("-0")


def _arrange(deployment: Deployment, fault: Fault, began_s: float, speed: float) -> None:
    """The failure happens in the simulated world when it happened in the recorded one."""
    world, name = deployment.world, f"{fault.instance}-0"
    if name not in deployment.instances:
        return
    at_s = max(WARM_UP_S + (fault.at_s - began_s) / speed, _AT_ONCE_S)
    for_s = fault.until_s - fault.at_s
    if at_s + for_s < WARM_UP_S:
        return  # over before the first request came
    if fault.kind == "silence":
        world.at(at_s, lambda: world.stop(name, for_s))
        return
    world.at(at_s, lambda: world.kill(name, noticed_by=SERVICE if fault.noticed else None))
    if for_s != float("inf"):
        world.at(at_s + for_s, lambda: deployment.start_again(name))


# --- comparing ------------------------------------------------------------------------------------


def _recorded_times(recorded: RecordedRun) -> tuple[np.ndarray, np.ndarray]:
    sequences = recorded.sequences.values()
    ttft_s = np.array([s.first_s - s.arrival_s for s in sequences])
    gaps = np.array([s.output_tokens - 1 if s.output_tokens > 1 else np.nan for s in sequences])
    return ttft_s, np.array([s.end_s - s.first_s for s in sequences]) / gaps


def _tell_recorded(
    recorded: RecordedRun, ttft_s: np.ndarray, tpot_s: np.ndarray, judged_by: Case
) -> Told:
    answered = np.array([s.finish in ("stop", "length") for s in recorded.sequences.values()])
    return Told(
        name="recorded",
        ttft_s=summary_of(ttft_s.tolist()),
        tpot_s=summary_of(tpot_s.tolist()),
        answered=int(answered.sum()),
        requests=len(answered),
        attained=_attained(ttft_s, tpot_s, answered, judged_by),
        resumed=recorded.num_resumed,
        placements=dict(recorded.placements),
    )


def _attained(
    ttft_s: np.ndarray, tpot_s: np.ndarray, answered: np.ndarray, case: Case
) -> float | None:
    if case.ttft_slo_s is None and case.tpot_slo_s is None:
        return None
    ttft_slo_s = np.inf if case.ttft_slo_s is None else case.ttft_slo_s
    tpot_slo_s = np.inf if case.tpot_slo_s is None else case.tpot_slo_s
    kept = answered & (ttft_s <= ttft_slo_s) & (np.isnan(tpot_s) | (tpot_s <= tpot_slo_s))
    return float(kept.mean())


def _median_error(simulated: np.ndarray, recorded: np.ndarray) -> float | None:
    # What took no time at all (one tick of a recorded clock) has no relative error.
    told = np.isfinite(simulated) & np.isfinite(recorded) & (recorded > 0)
    errors = np.abs(simulated[told] - recorded[told]) / recorded[told]
    return float(np.median(errors)) if len(errors) else None
