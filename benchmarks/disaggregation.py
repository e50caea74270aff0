"""Prefill apart from decode against both together, with the production cores on a virtual clock.

    python -m benchmarks.disaggregation [--instances 2] [--seconds 20] [--json FILE]

Scheduler, hand-over, policies and roles are those that serve; steps take the time that a cost model
fitted to measured kernels says (Llama 3.1 8B in bf16 on an H100), blocks the time of a 100 Gbit
link. Everything is deterministic: one seed, one history, no clock is read. Scenarios in which a
split helps and in which it harms stand side by side. The gap is the time between two tokens as the
client sees it, of chat requests alone; its 99th percentile is what the burst of prompts spoils.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from penstock.engine.scheduler.config import SchedulerConfig
from penstock.loadgen.costs import hardware
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.protocol.request import SamplingParams
from penstock.service.cluster.roles import RoleKeeperConfig
from penstock.service.core import ServiceCoreConfig
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.service.policies.roles import RolesConfig
from penstock.service.policies.routing import least_load, slo_aware
from penstock.simulator.clients import Answer
from penstock.simulator.data_plane import DataFaults
from penstock.simulator.pacing import StepCost
from penstock.simulator.world import VOCAB_SIZE, World

#: Cost models are fitted and roles given before what is measured begins.
WARM_UP_S = 10.0
LINK_BYTES_PER_S = 100e9 / 8


@dataclass(frozen=True, slots=True)
class Scenario:
    """Chat arrives evenly at random; long prompts come `burst` at once, every `every_s`."""

    name: str
    chats_per_s: float
    chat_tokens: int = 200
    answer_tokens: int = 120
    burst: int = 0
    every_s: float = 6.0
    long_tokens: int = 8000
    long_answer_tokens: int = 40
    #: Of the link between instances, and what a client wants between two tokens.
    link: float = 1.0
    tpot_slo_s: float = 0.02


SCENARIOS = (
    Scenario("bursts of long prompts over steady decoding", 8.0, burst=6),
    Scenario("light chat, short prompts", 1.0),
    Scenario("heavier chat, short prompts", 12.0),
    Scenario("bursts, and a link a hundredth as fast", 8.0, burst=6, link=0.01),
    Scenario("bursts, and an SLO that full steps keep", 8.0, burst=6, tpot_slo_s=0.2),
)


class _Timed(Answer):
    """Notes when each token came."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self.times: list[float] = []

    def take(self, delta: TokenDelta) -> None:
        super().take(delta)
        self.times += [self._world.now] * len(delta.ids)


@dataclass(frozen=True, slots=True)
class Result:
    scenario: str
    setup: str
    requests: int
    gap_p50_s: float
    gap_p99_s: float
    tpot_p99_s: float
    chat_ttft_p99_s: float
    long_ttft_p50_s: float
    long_ttft_p99_s: float
    handovers: int
    role_changes: int


def run(scenario: Scenario, setup: str, instances: int, seconds: float) -> Result:
    """`setup`: "least-load" and "together" (all do both, placed by least load, by SLOs), "P:D",
    "auto" (roles follow the work)."""
    model = hardware("h100:llama3.1-8b:bf16")
    block_s = BLOCK_TOKENS * model.kv_bytes_per_token / (LINK_BYTES_PER_S * scenario.link)
    world = World(1, data_faults=DataFaults(block_s=block_s))
    names = [f"i{n}" for n in range(instances)]
    c = model.cost
    for name in names:
        world.add_instance(
            name,
            num_blocks=model.kv_tokens // BLOCK_TOKENS,
            cost=StepCost(
                c.base_s, c.per_token_s, c.per_row_s, c.per_context_token_s, c.per_attention_s
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=16_384
            ),
            host=name,
            num_windows=0,
            means=("tcp",),
        )
    whole = setup in ("least-load", "together")
    policy = least_load if setup == "least-load" else slo_aware
    core = world.add_service("s", names, policy=policy, config=_service(scenario, setup, whole))
    if not whole:
        core.lead(1, 0.0)
    draw = random.Random(7)
    chats, longs = [], []
    for number, at_s in enumerate(_poisson(draw, scenario.chats_per_s, WARM_UP_S + seconds)):
        chats.append(_submit(world, draw, f"c{number}", scenario, at_s, long=False))
    at_s, number = WARM_UP_S / 2, 0
    while scenario.burst and at_s < WARM_UP_S + seconds:
        for _ in range(scenario.burst):
            longs.append(_submit(world, draw, f"l{number}", scenario, at_s, long=True))
            at_s, number = at_s + 0.01, number + 1
        at_s += scenario.every_s
    end_s = WARM_UP_S + seconds + 15.0
    while world.now < end_s and not (world.now > WARM_UP_S + seconds and len(core.journal) == 0):
        world.run(world.now + 1.0)
        world.history.clear()
    return _result(scenario, setup, chats, longs, core.placement.num_handovers, core.roles)


def _service(scenario: Scenario, setup: str, whole: bool) -> ServiceCoreConfig:
    # No TTFT SLO: nobody is refused, and everybody is measured.
    config = ServiceCoreConfig(tpot_slo_s=scenario.tpot_slo_s)
    if whole:
        return config
    policy = RolesConfig(pause_s=1.0, tpot_slo_s=scenario.tpot_slo_s)
    if setup != "auto":
        prefill, decode = map(int, setup.split(":"))
        policy = replace(policy, static=(prefill, decode))
    return replace(config, roles=RoleKeeperConfig(policy=policy))


def _poisson(draw: random.Random, rate: float, until_s: float) -> list[float]:
    times, at_s = [], 1.0 + draw.expovariate(rate)
    while at_s < until_s:
        times.append(at_s)
        at_s += draw.expovariate(rate)
    return times


def _submit(
    world: World, draw: random.Random, name: str, scenario: Scenario, at_s: float, *, long: bool
) -> tuple[float, _Timed]:
    size = scenario.long_tokens if long else scenario.chat_tokens
    answer = scenario.long_answer_tokens if long else scenario.answer_tokens
    size, answer = (max(2, round(n * draw.uniform(0.5, 1.5))) for n in (size, answer))
    prompt = [draw.randrange(1, VOCAB_SIZE) for _ in range(size)]
    sampling = SamplingParams(max_tokens=answer, ignore_eos=True)
    timed = _Timed(world)
    world.submit("s", GenerationSpec(name, prompt, sampling), at_s, timed)
    return at_s, timed


def _result(scenario, setup, chats, longs, handovers, roles) -> Result:
    for at_s, outcome in chats + longs:
        assert outcome.finish == {0: ["length"]}, (at_s, outcome.finish)
    chats = [(at_s, o) for at_s, o in chats if at_s >= WARM_UP_S]
    longs = [(at_s, o) for at_s, o in longs if at_s >= WARM_UP_S]
    gaps = np.concatenate([np.diff(o.times) for _, o in chats])
    tpot = [(o.times[-1] - o.times[0]) / (len(o.times) - 1) for _, o in chats]
    chat_ttft = [o.times[0] - at_s for at_s, o in chats]
    long_ttft = [o.times[0] - at_s for at_s, o in longs] or [0.0]
    return Result(
        scenario.name,
        setup,
        len(chats) + len(longs),
        float(np.quantile(gaps, 0.5)),
        float(np.quantile(gaps, 0.99)),
        float(np.quantile(tpot, 0.99)),
        float(np.quantile(chat_ttft, 0.99)),
        float(np.quantile(long_ttft, 0.5)),
        float(np.quantile(long_ttft, 0.99)),
        handovers,
        roles.num_changes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of virtual time, measured")
    parser.add_argument("--json", type=Path, help="also write the results there")
    flags = parser.parse_args()
    count = flags.instances
    half = count // 2
    setups = ["least-load", "together", f"1:{count - 1}", f"{half}:{count - half}", "auto"]
    began = time.perf_counter()
    results = []
    for scenario in SCENARIOS:
        print(f"\n{scenario.name}")
        print(
            f"{'':<10}{'gap p50':>10}{'gap p99':>10}{'TPOT p99':>10}{'chat TTFT p99':>15}"
            f"{'long p50':>10}{'long p99':>10}{'handovers':>11}"
        )
        for setup in dict.fromkeys(setups):
            r = run(scenario, setup, count, flags.seconds)
            results.append(r)
            ms = (r.gap_p50_s, r.gap_p99_s, r.tpot_p99_s, r.chat_ttft_p99_s, r.long_ttft_p50_s)
            cells = [f"{1e3 * value:.1f} ms" for value in (*ms, r.long_ttft_p99_s)]
            print(
                f"{setup:<10}{cells[0]:>10}{cells[1]:>10}{cells[2]:>10}{cells[3]:>15}"
                f"{cells[4]:>10}{cells[5]:>10}{r.handovers:>11}",
                flush=True,
            )
    print(f"\n{time.perf_counter() - began:.0f} s of real time")
    if flags.json:
        rows = [{name: getattr(r, name) for name in Result.__slots__} for r in results]
        flags.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
