"""Predicted against actual times, with the production cores on a virtual clock."""

from __future__ import annotations

import random

import numpy as np
import pytest

from penstock.protocol.request import SamplingParams
from penstock.service.generation import GenerationSpec
from penstock.service.policies.routing import POLICIES, ClusterView, Decision, RouteRequest
from penstock.simulator.pacing import StepCost
from penstock.simulator.world import VOCAB_SIZE, World

COSTS = {
    "small": StepCost(base_s=0.004, per_token_s=2e-5, per_row_s=1e-4),
    "slow prompts": StepCost(base_s=0.002, per_token_s=2e-4, per_row_s=5e-5),
    "with context": StepCost(0.003, 4e-5, 1e-4, per_context_token_s=2e-7, per_attention_s=5e-8),
}


def predicted_and_actual(
    cost: StepCost, seed: int, *, rate: float, count: int, policy: str = "least-load"
) -> np.ndarray:
    """(requests, 2) seconds to the first token, of two instances under Poisson arrivals; the first
    third, in which cost models are fitted, is left out."""
    world = World(seed)
    for name in ("a", "b"):
        world.add_instance(name, num_blocks=2048, cost=cost)
    decisions: list[Decision] = []

    def noted(view: ClusterView, request: RouteRequest) -> Decision:
        decisions.append(POLICIES[policy](view, request))
        return decisions[-1]

    core = world.add_service("s", ["a", "b"], policy=noted)
    draw = random.Random(seed)
    at_s = 1.0
    for number in range(count):
        at_s += draw.expovariate(rate)
        prompt = [draw.randrange(1, VOCAB_SIZE) for _ in range(int(draw.paretovariate(1.2) * 40))]
        sampling = SamplingParams(max_tokens=draw.randrange(5, 80), ignore_eos=True)
        spec = GenerationSpec(f"r{number}", prompt[:900], sampling)
        world.submit("s", spec, at_s)
    world.run(at_s + 30.0)
    pairs = []
    for number in range(count // 3, count):
        (choice,) = core.explain(f"r{number}").choices
        assert choice.predicted_ttft_s is not None and choice.ttft_s is not None
        pairs.append((choice.predicted_ttft_s, choice.ttft_s))
    assert len(decisions) == count
    return np.array(pairs)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("rate", [5.0, 40.0], ids=["light", "busy"])
def test_the_first_token_comes_when_it_is_predicted_to(cost: StepCost, rate: float) -> None:
    predicted, actual = predicted_and_actual(cost, 1, rate=rate, count=300).T
    relative = np.abs(predicted - actual) / actual
    assert np.median(relative) < 0.2
    assert np.quantile(relative, 0.9) < 0.8
    # And it tells what is long from what is short.
    assert np.corrcoef(predicted, actual)[0, 1] > 0.8
