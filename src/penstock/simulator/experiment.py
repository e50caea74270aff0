"""One run: a cluster, a trace, a seed, and what came of it.

    outcome = run(spec, requests, seed=7)

The cores, policies and books are those of production; only the clock, the network and the device
are simulated.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from penstock.engine.core import CoreConfig
from penstock.loadgen.prompts import prompt_ids
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.protocol.request import SamplingParams
from penstock.service.generation import GenerationSpec
from penstock.simulator.build import SERVICE, Deployment, build, limits
from penstock.simulator.faults import schedule
from penstock.simulator.outcome import Outcome, RoleChange, Sample
from penstock.simulator.record import Records
from penstock.simulator.spec import ClusterSpec
from penstock.simulator.world import World

#: Instances attach and roles are given before the first arrival.
WARM_UP_S = 3.0
SAMPLE_EVERY_S = 1.0
#: Samples between two looks for cycles among what is new.
COLLECT_EVERY = 30
#: Virtual seconds without a word to anybody after which those who wait are not waited for.
STALLED_AFTER_S = 600.0
MODES = {
    "exact": CoreConfig(recounts_when_idle=False),
    "scale": CoreConfig(recounts_when_idle=False, max_run_steps=1024, max_run_s=1.0),
}


def run(
    spec: ClusterSpec,
    requests: Iterable[TraceRequest],
    *,
    seed: int = 0,
    mode: str = "exact",
    progress: Callable[[float], None] = lambda share: None,
    prepare: Callable[[Deployment], None] = lambda deployment: None,
) -> Outcome:
    """`requests` in the order of arrival; an iterator is asked for each when its time comes, so
    that a trace need not be in memory. `progress` is told what share of a sequence has arrived,
    `prepare` is given what has been built before anything happens in it.

    Raises `ConfigError` for a cluster that cannot hold its model or a request (of a sequence before
    anything is run), and for a trace that goes back in time.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    whole = requests if isinstance(requests, Sequence) else None
    arrivals = _checked(whole or requests, spec)
    if whole is not None:
        arrivals = iter(list(arrivals))
    deployment = build(spec, seed, MODES[mode])
    prepare(deployment)
    idle_faults = schedule(deployment, spec.faults, WARM_UP_S)
    world, service = deployment.world, deployment.service
    records, notes = Records(world, WARM_UP_S), _Notes(deployment)
    waiting = _Arrivals(world, records, arrivals)
    with _few_collections():
        _to_the_end(deployment, waiting, records, notes, len(whole or ()), progress)
    stats = deployment.stats()
    return Outcome(
        spec=spec,
        seed=seed,
        mode=mode,
        instances=tuple(deployment.instances),
        **records.columns(),
        samples=notes.samples,
        role_changes=notes.role_changes,
        handovers=service.placement.num_handovers,
        resumed=service.placement.num_resumed,
        preemptions=sum(s.preemptions for s in stats),
        computed_tokens=sum(s.scheduled_tokens for s in stats),
        busy_s=np.array([deployment.busy_s(name) for name in deployment.instances]),
        end_of_run_s=world.now - WARM_UP_S,
        gaps=records.gaps,
        idle_faults=idle_faults,
        events=world.events.num_done,
        digest=world.digest.hexdigest(),
        wall_s=time.perf_counter() - began_s,
        cpu_s=time.process_time() - began_cpu_s,
    )


def _to_the_end(
    deployment: Deployment,
    arrivals: _Arrivals,
    records: Records,
    notes: _Notes,
    num_requests: int,
    progress: Callable[[float], None],
) -> None:
    """`num_requests`: 0 where that is not known."""
    world, journal = deployment.world, deployment.service.journal
    while not arrivals.ended or len(journal):
        world.run(world.now + SAMPLE_EVERY_S)
        notes.sample()
        progress(len(records) / num_requests if num_requests else 0.0)
        if len(notes.samples) % COLLECT_EVERY == 0:
            gc.collect(0)
        if arrivals.ended and world.now - records.last_word_s > STALLED_AFTER_S:
            raise AssertionError(f"{len(journal)} requests wait for ever")


@contextmanager
def _few_collections() -> Iterator[None]:
    """A world has millions of objects and makes next to no cycles: looking through all of them
    again and again would take a sixth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _checked(requests: Iterable[TraceRequest], spec: ClusterSpec) -> Iterator[TraceRequest]:
    """Raises `ConfigError` for one that came before the one ahead of it, or that does not fit."""
    bounds = limits(spec)
    last_s = 0.0
    for number, request in enumerate(requests):
        if not request.arrival_s >= last_s:
            raise ConfigError(
                f"request {number} of the trace comes at {request.arrival_s} s, before the one "
                f"ahead of it ({last_s} s): sort the trace by its times"
            )
        last_s = request.arrival_s
        for bound in bounds:
            bound.check(number, request.input_tokens, request.output_tokens)
        yield request


class _Arrivals:
    """Each request is made when its time comes, and then the next one is looked at."""

    def __init__(self, world: World, records: Records, requests: Iterator[TraceRequest]) -> None:
        self._world, self._records, self._requests = world, records, requests
        self.ended = False
        self._look_ahead()
        if self.ended:
            raise ConfigError("the trace holds no requests")

    def _look_ahead(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self.ended = True
        else:
            self._world.at(WARM_UP_S + request.arrival_s, partial(self._arrive, request))

    def _arrive(self, request: TraceRequest) -> None:
        number = len(self._records)
        wanted = GenerationSpec(
            str(number),
            prompt_ids(request, number),
            SamplingParams(max_tokens=request.output_tokens, ignore_eos=True, seed=number),
            ttft_slo_s=None,
        )
        self._world.submit_now(SERVICE, wanted, self._records.add(request))
        self._look_ahead()


class _Notes:
    """What every instance does, sampled; and changes of roles, when they happen."""

    def __init__(self, deployment: Deployment) -> None:
        self.samples: list[Sample] = []
        self.role_changes: list[RoleChange] = []
        self._deployment = deployment
        self._world, self._instances = deployment.world, deployment.instances
        self._roles = {name: str(core.role) for name, core in self._instances.items()}
        self._roles_now = tuple(self._roles.values())
        self._busy_s = np.zeros(len(self._instances))
        self._sampled_s = 0.0
        self._world.watch(self._look_at)

    def _look_at(self, name: str) -> None:
        core = self._instances.get(name)
        if core is not None and core.role != self._roles[name]:
            self._roles[name] = core.role
            self._roles_now = tuple(self._roles.values())
            self.role_changes.append(RoleChange(self._world.now - WARM_UP_S, name, core.role))

    def sample(self) -> None:
        world = self._world
        schedulers = [core.scheduler for core in self._instances.values()]
        pools = [scheduler.pool for scheduler in schedulers]
        num_here = [scheduler.num_here() for scheduler in schedulers]
        busy_s = np.array([self._deployment.busy_s(name) for name in self._instances])
        assert (busy_s >= self._busy_s).all(), "an instance has computed less than before"
        busy = (busy_s - self._busy_s) / (world.now - self._sampled_s)
        self._busy_s, self._sampled_s = busy_s, world.now
        self.samples.append(
            Sample(
                at_s=world.now - WARM_UP_S,
                roles=self._roles_now,
                busy=busy.astype(np.float32),
                running=np.array([running for running, _ in num_here], np.int32),
                waiting=np.array([waiting for _, waiting in num_here], np.int32),
                kv_used=np.array([p.num_held / p.num_blocks for p in pools], np.float32),
            )
        )
