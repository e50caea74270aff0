"""One storm, played: its faults happen, and everything is checked on the way and at the end."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from penstock.service.cluster.finder import IndexFinder
from penstock.service.placement import PlacementConfig
from penstock.simulator.storms.asks import Caller
from penstock.simulator.storms.checks import (
    hold,
    nothing_left_in_instance,
    nothing_left_in_service,
)
from penstock.simulator.storms.cluster import Cluster, Plant
from penstock.simulator.storms.excuses import (
    is_over_budget,
    may_fail,
    may_refuse,
    num_sequences,
)
from penstock.simulator.storms.faults import Strikes
from penstock.simulator.storms.storm import Cut, Halt, Noise, Raise, Skew, Storm

#: A request ends within this after its arrival once nothing goes wrong any more, and what all
#: requests take to compute: silence is noticed after 2.5 s, work is placed within 2 s more, and
#: what was on its way between instances is given up after 2 s, twice.
BOUND_S = 12.0
_TOKEN_S = 0.008
#: The services' clocks tick every quarter of a second.
BUDGET_LATE_S = 0.3
#: After the last end leases run out and what lingers is let go of.
SETTLE_S = 45.0
_LOOK_S = 0.5
RECOUNT_EVERY = 64
#: An index of so many forgets nothing.
_ALL_BLOCKS = 2048
MAX_FAILED_STEPS = PlacementConfig().max_failed_steps


@dataclass(slots=True)
class Verdict:
    """What came of a storm. `failure`: what did not hold, "" if everything did; `where` names the
    check, so that a smaller storm can be seen to fail in the same way."""

    storm: Storm
    failure: str = ""
    where: str = ""
    #: What the failure says, without the names and numbers that differ from storm to storm.
    words: str = ""
    failed_at_s: float = 0.0
    trace: str = ""
    digest: str = ""
    num_events: int = 0
    handovers: int = 0
    resumed: int = 0
    migrated: int = 0
    preemptions: int = 0
    errors: int = 0

    @property
    def ok(self) -> bool:
        return not self.failure


def _untouched(core: object) -> None:
    return None


def play(
    storm: Storm,
    *,
    until_s: float | None = None,
    recount_every: int = RECOUNT_EVERY,
    plant: Plant = _untouched,
) -> Verdict:
    """`until_s`: stop there, whatever is still to come. `plant(core)` is called with each core when
    it starts: tests of the checks break it there."""
    verdict = Verdict(storm)
    cluster = Cluster(storm, recount_every, plant)
    try:
        Strikes(cluster)
        if until_s is not None:
            cluster.world.run(until_s)
        else:
            _to_the_end(cluster)
    except Exception as exc:
        _tell(verdict, exc, cluster.world.now)
    finally:
        cluster.close()
    _count(verdict, cluster)
    return verdict


def _tell(verdict: Verdict, exc: Exception, now_s: float) -> None:
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if f.name != "hold"]
    verdict.failure = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    verdict.where = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].name}"
    verdict.words = words_of(verdict.failure)
    verdict.failed_at_s = now_s
    verdict.trace = "".join(traceback.format_exception(exc))


def words_of(failure: str) -> str:
    """Without numbers, and names of requests and nodes."""
    return " ".join(re.sub(r"\w*\d\w*|\b[a-z]\b|[^\w\s]", " ", failure).split())


def _count(verdict: Verdict, cluster: Cluster) -> None:
    verdict.digest = cluster.world.digest.hexdigest()
    verdict.num_events = cluster.world.events.num_done
    for service in cluster.services.values():
        verdict.handovers += service.placement.num_handovers
        verdict.resumed += service.placement.num_resumed
        verdict.migrated += service.placement.num_migrated
    for instance in cluster.instances.values():
        verdict.preemptions += instance.scheduler.stats.preemptions
    verdict.errors = sum(c.end == "error" for caller in cluster.callers for c in caller.choices)


# --- the end -------------------------------------------------------------------------------------


def _to_the_end(cluster: Cluster) -> None:
    world, storm = cluster.world, cluster.storm
    begin_s = max(storm.healed_s, storm.last_ask_s)
    work_s = sum(ask.n * (ask.max_tokens + 4) for ask in storm.asks) * _TOKEN_S
    world.run(begin_s)
    while waiting := [caller for caller in cluster.callers if caller.waits]:
        for caller in waiting:
            late_s = world.now - max(storm.healed_s, caller.ask.at_s)
            in_time = late_s <= BOUND_S + work_s
            hold(in_time, f"r{caller.ask.number} has not ended {late_s:.1f} s after all was well")
        world.run(world.now + _LOOK_S)
    for caller in cluster.callers:
        _check_end(storm, caller)
    _settle(cluster)


def _check_end(storm: Storm, caller: Caller) -> None:
    ask = caller.ask
    _check_refusal(storm, caller)
    _check_budget(storm, caller)
    num_raised = sum(fault.count for fault in storm.faults if isinstance(fault, Raise))
    for number, choice in enumerate(caller.choices):
        if choice.end != "error":
            continue
        assert choice.error is not None
        excused = is_over_budget(storm, ask, choice.ended_s)
        excused = excused or may_fail(storm, ask, choice.ended_s)
        error = f"r{ask.number}/{number} ends with {choice.error.code}"
        if choice.error.code == "engine_failed":
            excused = num_raised > MAX_FAILED_STEPS
        elif choice.error.code == "overloaded":
            excused = not choice.num_tokens and storm.shape.max_waiting < num_sequences(storm)
        else:
            hold(choice.error.code == "engine_unavailable", f"{error}: {choice.error.message}")
        hold(excused, f"{error} though an instance was well: {choice.error.message}")


def _check_refusal(storm: Storm, caller: Caller) -> None:
    refusal = caller.refusal
    if refusal is not None:
        said = f"r{caller.ask.number} is refused with {refusal.code}: {refusal.message}"
        hold(may_refuse(storm, caller.ask, refusal.code, caller.refused_s), said)


def _check_budget(storm: Storm, caller: Caller) -> None:
    """Nobody waits longer than he has said, whatever happens; but a service that stands still, or
    whose clock is wrong, cannot know."""
    ask = caller.ask
    if ask.budget_s is None or any(
        isinstance(fault, Halt | Skew) and fault.node == ask.service for fault in storm.faults
    ):
        return
    for number, choice in enumerate(caller.choices):
        late_s = choice.ended_s - ask.at_s - ask.budget_s
        hold(late_s < BUDGET_LATE_S, f"r{ask.number}/{number} is {late_s:.2f} s over its budget")


def _settle(cluster: Cluster) -> None:
    """Wait until nothing is left anywhere; say what it is if that does not come."""
    world = cluster.world
    give_up_s = world.now + SETTLE_S
    while True:
        world.run(world.now + _LOOK_S)
        try:
            _check_nothing_is_left(cluster)
            return
        except AssertionError:
            if world.now > give_up_s:
                raise


def _check_nothing_is_left(cluster: Cluster) -> None:
    world = cluster.world
    for name in cluster.up:
        node = world.node(name)
        due_s = node.due_s
        if due_s is not None:
            late_s = world.now - node.clock.world_s(due_s)
            hold(late_s < 1e-6, f"the timer of {name} is {late_s} s late")
        else:  # a service that has known nobody yet begins with the first
            knows_nobody = name in cluster.services and not cluster.services[name].instances
            hold(knows_nobody, f"{name} has set no timer")
        if name in cluster.instances:
            nothing_left_in_instance(cluster.instances[name])
        else:
            nothing_left_in_service(cluster.services[name])
    _check_that_all_know_each_other(cluster)
    _check_indices(cluster)
    if cluster.registry is not None:
        hold(not cluster.registry.troubles(), f"{cluster.registry.troubles()}")


def _check_indices(cluster: Cluster) -> None:
    """What services think that instances have cached is what they have. (Where words were lost
    that is found with the next ones, and after a storm there may be none.)"""
    if any(isinstance(fault, Cut | Noise) for fault in cluster.storm.faults):
        return
    if cluster.storm.shape.index_blocks < _ALL_BLOCKS:
        return  # it forgets what was not asked for
    for service in cluster.services.values():
        finder = service.prospects.finder
        assert isinstance(finder, IndexFinder)
        for name in cluster.up.keys() & cluster.instances.keys():
            core = cluster.instances[name]
            tiers = core.exchange.tiers
            has = {"device": len(core.scheduler.pool.keys())}
            has |= {tier: len(list(tiers.keys(tier))) for tier in tiers.tiers}
            known = {t: n for t, n in finder.index.blocks_of(name).items() if t in has}
            same = known == has or service.config.name not in cluster.up
            hold(same, f"{service.config.name} thinks that {name} has {known}: it has {has}")


def _check_that_all_know_each_other(cluster: Cluster) -> None:
    services = [core for name, core in cluster.services.items() if name in cluster.up]
    for core in services:
        for name, instance in cluster.instances.items():
            known = core.instances.get(name)
            state = known.state if known is not None else "unknown"
            if name not in cluster.up:
                hold(state not in ("active", "suspect"), f"{name} is gone and {state}")
                continue
            who = f"{core.config.name} of {name}"
            hold(state == "active", f"what is known to {who}: {state}")
            assert known is not None
            there, here = (instance.role, instance.epoch), (known.role, known.epoch)
            hold(there == here, f"what is known to {who}: {here}, and it is {there}")
    if cluster.registry is not None:
        leaders = [core.config.name for core in services if core.roles.term is not None]
        hold(len(leaders) == 1, f"these lead: {leaders}")
