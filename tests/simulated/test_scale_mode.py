"""Runs of steps as one event: histories agree with those of single steps.

Where placements do not depend on what instances say, all tokens come when they would, to rounding.
While an instance has not learnt what its steps cost, a step may begin with a newcomer that would
have been in the next one. Policies that look at running tokens see them up to a second late; there
the histories part, and what is compared is what they amount to. (Of 500 requests two histories with
other placements differ by a few percent in any case.)
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from penstock.engine.core import CoreConfig
from penstock.loadgen.traces import HASH_BLOCK_TOKENS, TraceRequest
from penstock.simulator.build import SERVICE, Deployment
from penstock.simulator.experiment import WARM_UP_S, run
from penstock.simulator.network import NetworkFaults
from penstock.simulator.outcome import Outcome
from penstock.simulator.spec import ClusterSpec, LinkSpec, PoolSpec
from tests.simulated.test_smoke import storm

HARDWARE = "h100:llama3.1-8b:bf16:tp1"
#: The longest step there is here: 2,048 tokens of prompts beside what decodes.
LONGEST_STEP_S = 0.06


def cluster(count: int, *, kv_tokens: int | None = None, **fields: object) -> ClusterSpec:
    pool = PoolSpec(count=count, hardware=HARDWARE, kv_tokens=kv_tokens)
    known = {"policy": "round-robin", "pd": "off", "kv_index": False}
    # Without jitter, which is drawn for each message, and of those there are not as many.
    return ClusterSpec(pools=(pool,), link=LinkSpec(jitter_s=0.0), **{**known, **fields})  # type: ignore[arg-type]


def trace(count: int, rate: float, *, seed: int = 1, shared: bool = False) -> list[TraceRequest]:
    draw = random.Random(seed)
    at_s, made = 0.0, []
    for number in range(count):
        at_s += draw.expovariate(rate)
        tokens, hash_ids = draw.randrange(20, 3000), ()
        if shared:
            chat, turns = draw.randrange(12), draw.randrange(1, 5)
            hash_ids = (*(100 * chat + turn for turn in range(turns)), 10_000 + number)
            tokens = HASH_BLOCK_TOKENS * turns + draw.randrange(1, HASH_BLOCK_TOKENS)
        output_tokens = int(min(400, 1 + draw.expovariate(1 / 100)))
        made.append(TraceRequest(at_s, tokens, output_tokens, hash_ids))
    return made


def both(spec: ClusterSpec, requests: list[TraceRequest], prepare=None) -> tuple[Outcome, Outcome]:
    more = {} if prepare is None else {"prepare": prepare}
    exact, scale = (run(spec, requests, mode=mode, **more) for mode in ("exact", "scale"))
    assert scale.events < exact.events / 3
    return exact, scale


def agree(exact: Outcome, scale: Outcome, *, to_rounding: float) -> None:
    """The same tokens, and that share of them at the same times; others within a step."""
    assert exact.finish == scale.finish
    np.testing.assert_array_equal(exact.output_tokens, scale.output_tokens)
    np.testing.assert_array_equal(exact.cached_tokens, scale.cached_tokens)
    assert exact.preemptions == scale.preemptions
    assert exact.handovers == scale.handovers
    assert exact.computed_tokens == pytest.approx(scale.computed_tokens, rel=1e-3)
    for name in ("first_s", "end_s"):
        apart_s = np.abs(getattr(exact, name) - getattr(scale, name))
        apart_s = apart_s[~np.isnan(apart_s)]
        assert apart_s.max() <= LONGEST_STEP_S
        assert (apart_s < 1e-6).mean() >= to_rounding


@pytest.mark.parametrize("count", [3, 50])
def test_in_turn(count: int) -> None:
    """Prompts arrive in the middle of runs, and sequences end in it."""
    agree(*both(cluster(count), trace(250, rate=8.0 * count)), to_rounding=0.95)


def test_pools_that_are_too_small() -> None:
    exact, scale = both(cluster(2, kv_tokens=16_000), trace(250, rate=20.0))
    assert exact.preemptions > 0
    agree(exact, scale, to_rounding=0.9)


def test_prompts_here_and_decode_there() -> None:
    exact, scale = both(cluster(4, pd="1:3"), trace(250, rate=12.0))
    assert exact.handovers > 200
    agree(exact, scale, to_rounding=0.95)


def test_shared_prefixes() -> None:
    exact, scale = both(cluster(3, kv_index=True), trace(250, rate=20.0, shared=True))
    assert exact.cached_tokens.sum() > 0.3 * exact.input_tokens.sum()
    agree(exact, scale, to_rounding=0.9)


def test_cancelled_in_the_middle_of_runs() -> None:
    """Of the others all is as it would have been: the batch is smaller from the same step on."""
    requests = trace(200, rate=15.0)
    gone = range(3, 200, 7)

    def prepare(deployment: Deployment) -> None:
        for number in gone:
            at_s = WARM_UP_S + requests[number].arrival_s + 0.05 + number / 199
            deployment.world.at(at_s, partial(deployment.world.cancel, SERVICE, str(number), at_s))

    exact, scale = both(cluster(3), requests, prepare)
    stayed = [n for n in range(200) if n not in gone]
    assert sum(exact.finish[n] == "" for n in gone) > 10
    assert exact.finish == scale.finish
    apart_s = np.abs(exact.end_s - scale.end_s)[stayed]
    assert apart_s.max() <= LONGEST_STEP_S
    assert (apart_s < 1e-6).mean() >= 0.95


@pytest.mark.parametrize("policy", ["least-load", "slo-aware"])
def test_policies_that_see_tokens_late(policy: str) -> None:
    spec = cluster(6, policy=policy, ttft_slo_s=1.0, tpot_slo_s=0.05)
    exact, scale = both(spec, trace(500, rate=40.0))
    assert exact.finish == scale.finish
    np.testing.assert_array_equal(exact.output_tokens, scale.output_tokens)
    for name in ("ttft_s", "tpot_s"):
        ours, theirs = getattr(scale, name), getattr(exact, name)
        assert np.nanmean(ours) == pytest.approx(np.nanmean(theirs), rel=0.04)
        assert np.nanmedian(ours) == pytest.approx(np.nanmedian(theirs), rel=0.04)
    attained = [o.attained(0.1, 0.02).mean() for o in (exact, scale)]
    assert attained[0] == pytest.approx(attained[1], abs=0.02)


def test_what_instances_say_in_the_middle_of_a_run() -> None:
    """Their load is that of the steps that have begun."""
    requests = trace(120, rate=10.0)
    said: list[dict[tuple[int, str], tuple[float, ...]]] = []

    def prepare(deployment: Deployment) -> None:
        loads: dict[tuple[int, str], tuple[float, ...]] = {}
        said.append(loads)

        def listen(moment: int) -> None:
            for name, core in deployment.instances.items():
                load = core.load(deployment.world.now)
                loads[moment, name] = (
                    load.step, load.running_tokens, load.decode_context_tokens,
                    load.kv_blocks_used, load.waiting_tokens, round(load.step_end_in_s, 5),
                )  # fmt: skip

        for moment in range(150):
            deployment.world.at(WARM_UP_S + 0.0777 * moment, partial(listen, moment))

    both(cluster(3), requests, prepare)
    exact, scale = said
    later = [key for key in exact if key[0] > 40]  # they know by then what steps cost
    assert sum(exact[key][1] > 0 for key in later) > 100
    same = sum(exact[key] == scale[key] for key in later)
    assert same >= 0.9 * len(later)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_right_whatever_befalls_a_run(seed: int) -> None:
    """Kills, lost and doubled frames, preemption, stop tokens, with KV whose content is checked."""
    faults = NetworkFaults(duplicate=0.02, loss=0.01)
    storm(seed, faults, num_blocks=48, engine=CoreConfig(max_run_steps=40))


def test_runs_are_no_longer_than_asked_for() -> None:
    steps: list[int] = []

    def prepare(deployment: Deployment) -> None:
        core = deployment.instances["gpu-0"]
        core.config = replace(core.config, max_run_steps=7)
        deployment.world.watch(lambda name: steps.append(_last_steps(deployment, name)))

    run(cluster(1), trace(20, rate=2.0), mode="scale", prepare=prepare)
    assert max(steps) == 7


def _last_steps(deployment: Deployment, name: str) -> int:
    core = deployment.instances.get(name)
    return core._flights.last.batch.steps if core is not None and len(core._flights) else 0
