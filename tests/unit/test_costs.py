"""Cost models: those that come along are what the tools make of the data; those of live instances
are read back; and none of them predicts nonsense outside of what it was fitted to."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.cluster_reports import report
from tools import fit_costs

from penstock.cli import costs as command
from penstock.engine.cost import CostFitter, Features
from penstock.engine.scheduler.batch import Batch, BatchRow
from penstock.loadgen.costs import from_file, hardware, hardware_or_file, known_hardware
from penstock.protocol.errors import ConfigError, EngineUnavailable
from penstock.simulator.pacing import StepCost

DATA = Path(__file__).parents[1] / "data"
STEP_TIMES = DATA / "gpu_step_times.csv.gz"
KNOWN = known_hardware()


@pytest.fixture(scope="module")
def measured() -> dict[fit_costs.Name, list[fit_costs.Point]]:
    return fit_costs.read(STEP_TIMES)


def test_the_costs_that_come_along_are_what_the_tool_makes() -> None:
    made = fit_costs.costs(STEP_TIMES)["costs"]
    assert made.keys() == KNOWN.keys()
    for name, entry in made.items():
        for term in (*fit_costs.TERMS, "kv_tokens", "kv_bytes_per_token", "gpus"):
            # Libraries of linear algebra differ in the last digits.
            assert entry[term] == pytest.approx(KNOWN[name][term], rel=1e-3), (name, term)


def test_every_step_time_is_met_within_a_third(measured) -> None:
    """The worst points are those where reading weights and computing overlap best."""
    for name, points in measured.items():
        coefficients = np.array([KNOWN[str(name)][term] for term in fit_costs.TERMS])
        errors = np.abs(fit_costs.predict(coefficients, points) / fit_costs.seconds_of(points) - 1)
        assert np.median(errors) < 0.12, name
        assert np.quantile(errors, 0.95) < 0.33, name


@given(st.integers(0, 1 << 20), st.integers(1, 8192), st.integers(1, 512))
def test_more_work_takes_longer_however_far_from_the_data(
    context: int, new_tokens: int, rows: int
) -> None:
    for name in ("h100:llama3.1-8b:bf16:tp1", "h200:llama3.1-70b:fp8:tp8", "a100:qwen3-32b:bf16"):
        model = hardware(name)

        def seconds(context: int, new: int, rows: int, model=model) -> float:
            end = context + new
            return model.step_s(rows * new, rows, rows * end, rows * new * end)

        here_s = seconds(context, new_tokens, rows)
        assert here_s > 0
        assert here_s < seconds(context + 1, new_tokens, rows)
        assert here_s < seconds(context, new_tokens + 1, rows)
        assert here_s < seconds(context, new_tokens, rows + 1)


@pytest.mark.parametrize("model", ["h100:llama3.1-70b:fp8", "h200:qwen3-32b:bf16"])
def test_more_gpus_are_faster_and_hold_more_but_never_in_proportion(model: str) -> None:
    tps = [tp for tp in (1, 2, 4, 8) if f"{model}:tp{tp}" in KNOWN]
    assert len(tps) >= 3
    for fewer, more in pairwise(tps):
        a, b = hardware(f"{model}:tp{fewer}"), hardware(f"{model}:tp{more}")
        assert a.kv_tokens < b.kv_tokens
        for new, rows, context in ((4096, 1, 4096), (2048, 1, 65536), (64, 64, 64 * 2048)):
            slow_s = a.step_s(new, rows, context, new * context)
            fast_s = b.step_s(new, rows, context, new * context)
            assert slow_s * fewer / more < fast_s < slow_s


def test_a_prefix_that_is_cached_saves_time_but_is_still_read() -> None:
    model = hardware("h100:llama3.1-8b:bf16")
    whole_s = model.prefill_s(16384)
    rest_s = model.step_s(2048, 1, 16384, 2048 * 16384)
    alone_s = model.step_s(2048, 1, 2048, 2048 * 2048)
    assert alone_s < rest_s < whole_s


def test_a_name_without_tp_is_the_fewest_gpus() -> None:
    assert hardware("h200:llama3.1-70b:bf16").name == "h200:llama3.1-70b:bf16:tp2"
    with pytest.raises(ConfigError, match=r"may be h200:llama3\.1-70b:bf16:tp2, .*: say which"):
        hardware("h200:llama3.1-70b")


# --- of a live instance --------------------------------------------------------------------------


def live(num_steps: int = 500, **changes):
    """A report of three instances, of which engine-2 says what its steps cost."""
    found = report(3)
    _, _, instance = found.instances
    fitter, cost = CostFitter(), StepCost(0.01, 1e-4, 1e-4, 1e-7, 1e-9)
    for step in range(num_steps):
        prompt = [BatchRow(9, 0, 1 + step * 37 % 400, True)] if step % 5 == 0 else []
        rows = [BatchRow(i, 50 * step % 3000, 1, True) for i in range(1 + step % 8)]
        batch = Batch(step, [*rows, *prompt])
        fitter.observe(Features.of(batch), cost.of(batch).total_s)
    instance.cost = fitter.model()
    assert instance.kv is not None
    instance.kv.tiers["device"].total_bytes = 1000 * 16 * 2048
    instance.max_running, instance.max_num_batched_tokens = 64, 1024
    return [msgspec.structs.replace(i, **changes) for i in found.instances]


def test_what_an_instance_says_of_itself_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(command.as_file(command.choose(live(), None))))
    model = hardware_or_file(str(path))
    assert model.kv_tokens == 16_000
    assert model.kv_bytes_per_token == 2048
    assert (model.step_tokens, model.max_running) == (1024, 64)
    assert model.cost.base_s == pytest.approx(0.01, rel=0.05)
    assert model.step_s(100, 1, 100, 10_000) == pytest.approx(0.02011, rel=0.05)
    assert replace(model, name="") == replace(from_file(path), name="")


@pytest.mark.parametrize("sigma", [0.1, 0.4])
def test_noise_makes_a_model_neither_quicker_nor_slower(sigma: float) -> None:
    """Steps of a busy machine: right on average is what counts, and what a client sees."""
    dice, fitter, cost = random.Random(7), CostFitter(), StepCost(0.02, 2.5e-4, 0.0, 0.0, 1e-7)
    for step in range(2000):
        rows = [BatchRow(i, dice.randrange(50, 400), 1, True) for i in range(1 + step % 5)]
        if step % 10 == 0:
            rows.append(BatchRow(9, 0, dice.randrange(20, 256), True))
        batch = Batch(step, rows)
        noise = dice.lognormvariate(-sigma * sigma / 2, sigma)  # of mean one
        fitter.observe(Features.of(batch), cost.of(batch).total_s * noise)
    for row in (BatchRow(0, 200, 1, True), BatchRow(0, 0, 128, True)):
        batch = Batch(0, [row])
        found = fitter.predict(Features.of(batch))
        assert found is not None
        assert found.total_s == pytest.approx(cost.of(batch).total_s, rel=0.12)


def test_an_instance_that_has_computed_little_is_not_believed() -> None:
    with pytest.raises(EngineUnavailable, match="engine-2 has computed 20 steps, too few"):
        command.choose(live(20), None)
    with pytest.raises(EngineUnavailable, match="no instance has said yet"):
        command.choose([], None)
    with pytest.raises(ConfigError, match=r"other is not among the instances \(engine-0, engine"):
        command.choose(live(), "other")


def test_a_file_in_which_steps_take_no_time_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"kv_tokens": 1000}))
    with pytest.raises(ConfigError, match="a step of one token takes no time"):
        hardware_or_file(str(path))
