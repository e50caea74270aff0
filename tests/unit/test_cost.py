"""The fitted cost model against the function that made the data."""

from __future__ import annotations

import random

import numpy as np
import pytest

from penstock.engine import cost
from penstock.engine.cost import CostFitter, Features
from penstock.engine.scheduler.batch import Batch, BatchRow


def batch(draw: random.Random) -> Batch:
    rows = [BatchRow(i, draw.randrange(2000), 1, True) for i in range(draw.randrange(1, 32))]
    if draw.random() < 0.3:
        rows.append(BatchRow(99, 0, draw.randrange(1, 1024), True))
    return Batch(0, rows)


def true_s(b: Batch) -> float:
    context = sum(r.start + r.num_tokens for r in b.rows)
    attention = sum(r.num_tokens * (r.start + r.num_tokens) for r in b.rows)
    return 0.02 + 3e-4 * b.num_tokens + 2e-4 * len(b.rows) + 2e-7 * context + 1e-9 * attention


def predicted_s(fitter: CostFitter, batch: Batch) -> float | None:
    times = fitter.predict(Features.of(batch))
    return None if times is None else times.total_s


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_it_finds_the_coefficients(noise: float) -> None:
    draw = random.Random(1)
    fitter = CostFitter()
    for _ in range(600):
        b = batch(draw)
        fitter.observe(Features.of(b), true_s(b) * (1 + noise * (2 * draw.random() - 1)))
    for _ in range(50):
        b = batch(draw)
        assert predicted_s(fitter, b) == pytest.approx(true_s(b), rel=0.01 + 2 * noise)
    model = fitter.model()
    assert model.num_steps == 600
    assert model.per_token_s == pytest.approx(3e-4, rel=0.02 + 2 * noise)


def test_one_interrupted_step_is_not_believed_and_a_lasting_change_is() -> None:
    fitter = CostFitter()
    one = Batch(0, [BatchRow(0, 100, 1, True)])
    for _ in range(50):
        fitter.observe(Features.of(one), 0.1)
    fitter.observe(Features.of(one), 5.0)
    assert predicted_s(fitter, one) == pytest.approx(0.1, rel=0.3)
    for _ in range(600):
        fitter.observe(Features.of(one), 0.2)
    assert predicted_s(fitter, one) == pytest.approx(0.2, rel=0.1)


def test_nothing_is_predicted_from_nothing() -> None:
    assert predicted_s(CostFitter(), Batch(0, [BatchRow(0, 0, 1, True)])) is None


def test_many_equal_steps_keep_it_sane() -> None:
    """Without variety the forgetting must not blow the fit up."""
    fitter = CostFitter()
    one = Batch(0, [BatchRow(0, 100, 1, True)])
    for _ in range(20_000):
        fitter.observe(Features.of(one), 0.05)
    other = Batch(0, [BatchRow(i, 100, 1, True) for i in range(8)])
    predicted = predicted_s(fitter, other)
    assert predicted is not None and 0 <= predicted < 1.0


def test_no_coefficient_is_negative_and_no_other_choice_is_better() -> None:
    """The conditions of Karush, Kuhn and Tucker, which hold at the minimum and nowhere else."""
    draw = np.random.default_rng(3)
    for _ in range(200):
        rows = draw.random((12, 5))
        right = draw.normal(0.5, 1.0, 12)
        gram, moment = rows.T @ rows, rows.T @ right
        found, subset = cost._non_negative(gram, moment, guess=int(draw.integers(32)))
        assert cost._non_negative(gram, moment, subset)[0] == pytest.approx(found)
        slope = gram @ found - moment
        assert (found >= 0.0).all()
        assert slope[found > 0.0] == pytest.approx(0.0, abs=1e-3)
        assert (slope[found == 0.0] >= -1e-3).all()


def test_few_unlike_steps_predict_no_nonsense() -> None:
    """A warm-up (a short prompt, a few decodes) and then a long prompt: more work takes longer."""
    fitter = CostFitter()
    for _ in range(2):
        fitter.observe(Features.of(Batch(0, [BatchRow(0, 0, 32, True)])), 0.004)
        for i in range(3):
            fitter.observe(
                Features.of(Batch(0, [BatchRow(0, 32 + i, 1, True)])), 0.0021 - 0.0001 * i
            )
    short = predicted_s(fitter, Batch(0, [BatchRow(0, 0, 32, True)]))
    long = predicted_s(fitter, Batch(0, [BatchRow(0, 0, 400, True)]))
    assert short is not None and long is not None
    assert long > short > 0.0
    model = fitter.model()
    assert min(model.base_s, model.per_token_s, model.per_row_s, model.per_context_token_s) >= 0.0


def test_who_only_decodes_for_long_still_knows_what_a_prompt_costs() -> None:
    draw = random.Random(5)
    fitter = CostFitter()
    for _ in range(100):
        b = batch(draw)
        fitter.observe(Features.of(b), true_s(b))
    for _ in range(5000):
        rows = [BatchRow(i, draw.randrange(2000), 1, True) for i in range(draw.randrange(1, 32))]
        decode = Batch(0, rows)
        fitter.observe(Features.of(decode), true_s(decode))
    prompt = Batch(0, [BatchRow(0, 0, 1000, True)])
    assert predicted_s(fitter, prompt) == pytest.approx(true_s(prompt), rel=0.05)


def test_a_run_of_steps_is_seen_as_its_steps_are() -> None:
    """What two fitters learn from the same steps, one by one and in runs, and predict of both."""
    draw = random.Random(5)
    singly, in_runs = CostFitter(), CostFitter()
    for _ in range(60):
        b = batch(draw)
        if any(row.num_tokens > 1 for row in b.rows):
            singly.observe(Features.of(b), true_s(b))
            in_runs.observe(Features.of(b), true_s(b))
            continue
        steps = draw.randrange(1, 40)
        each = [
            Batch(0, [BatchRow(r.slot, r.start + i, 1, True) for r in b.rows]) for i in range(steps)
        ]
        run = Batch(0, b.rows, steps=steps)
        seconds = [true_s(s) for s in each]
        for step, step_s in zip(each, seconds):
            singly.observe(Features.of(step), step_s)
        in_runs.observe(Features.of(run), sum(seconds))
        if singly.model().num_steps > 300:
            for fitter in (singly, in_runs):
                times = fitter.predict(Features.of(run))
                assert times is not None and times.steps == steps
                assert times.total_s == pytest.approx(sum(seconds), rel=0.01)
                assert times.of_step(steps) == pytest.approx(seconds[-1], rel=0.01)
    assert singly.model().num_steps == in_runs.model().num_steps
