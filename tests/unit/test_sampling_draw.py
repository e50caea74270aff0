"""Which token is drawn, against transformers' logits warpers and exact probabilities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.engine.sampling.draw import Top, draw, invert_cdf
from penstock.engine.sampling.penalties import shapers
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.batch import NewSequence
from penstock.protocol.request import SamplingParams

VOCAB = 1000


def random_logits(seed: int, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def oracle_probabilities(logits_1V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' warpers in vLLM's order: temperature, min-p, top-k, top-p."""
    scores = TemperatureLogitsWarper(params.temperature)(None, logits_1V.clone())
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.double().softmax(-1)[0]


def our_probabilities(
    logits_1V: torch.Tensor, params: SamplingParams, points: int, **kw: int
) -> torch.Tensor:
    """The distribution of `draw` itself, measured with an even grid of uniform numbers."""
    vocab = logits_1V.shape[1]
    scaled_1V = (logits_1V - logits_1V.max()) / params.temperature
    top = Top(
        torch.tensor([params.top_k or vocab]).clamp_max(vocab),
        torch.tensor([params.top_p], dtype=torch.float64),
    )
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    counts = torch.zeros(vocab, dtype=torch.float64)
    for part in uniform.split(256):
        rows = len(part)
        ids = draw(
            scaled_1V.expand(rows, -1).contiguous(),
            part,
            torch.full((rows,), params.min_p) if params.min_p else None,
            Top(top.k.expand(rows), top.p.expand(rows)),
            **kw,
        )
        counts += torch.bincount(ids, minlength=vocab)
    return counts / points


params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.floats(0.3, 2.0),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 999, 1000, 5000]),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.9]),
)


@settings(max_examples=60, deadline=None)
@given(params=params_strategy, seed=st.integers(0, 50), candidates=st.sampled_from([16, 256, 1000]))
def test_distribution_matches_transformers(params, seed, candidates):
    """Inverting the CDF on an even grid gives each probability to within one grid step."""
    logits_1V = random_logits(seed)
    points = 1024
    expected = oracle_probabilities(logits_1V, params)
    found = our_probabilities(logits_1V, params, points, candidates=candidates)
    assert float((found - expected).abs().max()) <= 1.0 / points + 1e-6
    assert not found[expected == 0].any(), "a token that the filters removed was drawn"


@settings(max_examples=60, deadline=None)
@given(params=params_strategy, seed=st.integers(0, 50), uniform=st.floats(0, 1, exclude_max=True))
def test_few_candidates_and_a_full_sort_draw_the_same(params, seed, uniform):
    scaled = random_logits(seed, scale=1.0)
    scaled = scaled - scaled.max()
    top = Top(
        torch.tensor([params.top_k or VOCAB]).clamp_max(VOCAB),
        torch.tensor([params.top_p], dtype=torch.float64),
    )
    u = torch.tensor([uniform], dtype=torch.float64)
    min_p = torch.tensor([params.min_p]) if params.min_p else None
    drawn = {int(draw(scaled, u, min_p, top, candidates=c)) for c in (8, 100, VOCAB)}
    assert len(drawn) == 1


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    scaled = probabilities.log() - probabilities.log().max()

    def kept(top_p: float) -> set[int]:
        grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
        top = Top(torch.full((400,), 4), torch.full((400,), top_p, dtype=torch.float64))
        return set(draw(scaled.expand(400, -1).contiguous(), grid, None, top).tolist())

    assert kept(0.4) == {0}
    assert kept(0.51) == {0, 1}
    assert kept(0.79) == {0, 1}
    assert kept(0.81) == {0, 1, 2}
    assert kept(1e-9) == {0}
    assert kept(1.0) == {0, 1, 2, 3}


def test_equal_tokens_are_treated_equally():
    """Ties at the border of top-k and top-p stay together, beyond the candidates too."""
    scaled = torch.full((300, 40), -1.0)
    scaled[:, 7] = 0.0
    grid = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    for top_k, top_p in [(2, 1.0), (40, 0.5)]:
        top = Top(torch.full((300,), top_k), torch.full((300,), top_p, dtype=torch.float64))
        assert set(draw(scaled, grid, None, top, candidates=4).tolist()) == set(range(40))


@pytest.mark.parametrize("width", [1, 5, 255, 256, 257, 5000])
def test_invert_cdf_is_exact_at_the_edges(width):
    weights = torch.zeros(1, width)
    hot = sorted({0, width // 2, width - 1})
    weights[0, hot] = 1.0
    below_one = float(np.nextafter(1.0, 0.0))
    ends = torch.tensor([0.0, below_one], dtype=torch.float64)
    drawn = invert_cdf(weights.expand(2, -1).contiguous(), ends).tolist()
    assert drawn == [hot[0], hot[-1]]
    weights[0, hot[-1]] = 0.0
    weights[0, 0] = 1e-30
    drawn = invert_cdf(weights.expand(2, -1).contiguous(), ends).tolist()
    assert weights[0, drawn[0]] > 0 and weights[0, drawn[1]] > 0


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=30),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=30),
    penalty=st.floats(0.5, 2.0),
    seed=st.integers(0, 20),
)
def test_repetition_penalty_matches_transformers(prompt, output, penalty, seed):
    logits = random_logits(seed)
    ids = torch.tensor([prompt + output], dtype=torch.int64)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    params = SamplingParams(max_tokens=99, repetition_penalty=penalty)
    found = logits.clone()
    for shaper in shapers(params, prompt, output, [], torch.device("cpu")):
        shaper.shape(found[0], len(output))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_presence_and_frequency_count_the_output_only():
    """OpenAI's formula: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    logits = random_logits(3)
    output = [5, 5, 5, 9]
    params = SamplingParams(max_tokens=99, presence_penalty=0.7, frequency_penalty=0.2)
    found = logits.clone()
    for shaper in shapers(params, [1, 2, 9], output, [], torch.device("cpu")):
        shaper.shape(found[0], len(output))
    expected = logits.clone()
    expected[0, 5] -= 0.7 + 3 * 0.2
    expected[0, 9] -= 0.7 + 0.2
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=1, temperature=0.7, top_k=20, top_p=0.9),
        SamplingParams(max_tokens=1, min_p=0.05),
    ],
)
def test_chi_square_against_exact_probabilities(params):
    """20,000 positions of one seed, as the engine would draw them, against the oracle."""
    vocab, draws, rows = 50, 20_000, 500
    logits = random_logits(11, vocab, scale=1.5)
    expected = oracle_probabilities(logits, params).numpy()
    sampler = Sampler(rows, vocab, [])
    for slot in range(rows):
        sampler.admit(NewSequence(slot, [0], 1, params, choice=slot))
    counts = np.zeros(vocab)
    for position in range(draws // rows):
        found = sampler.sample(logits.repeat(rows, 1), range(rows), [position] * rows)
        counts += np.bincount(found.ids, minlength=vocab)
    alive = expected > 0
    assert counts[~alive].sum() == 0
    wanted = expected[alive] * draws
    chi_square = float(((counts[alive] - wanted) ** 2 / wanted).sum())
    freedom = int(alive.sum()) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
