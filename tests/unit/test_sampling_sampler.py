"""The sampler on its slots: mixed batches, resumed sequences, logprobs, rows that cannot go on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.sampling.masks import TokenMasks, mask_words
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.batch import NewSequence
from penstock.protocol.errors import EngineFailed
from penstock.protocol.request import SamplingParams

VOCAB = 200
EOS = 7


def logits_at(*key: int, vocab: int = VOCAB) -> torch.Tensor:
    """Stands for the model: one row of logits that depends on `key` alone."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(1, vocab, generator=generator) * 2


def sequence(slot: int, params: SamplingParams, ids: list[int], prompt: int, choice: int = 0):
    return NewSequence(slot, list(ids), prompt, params, choice=choice)


def generate(params: SamplingParams, prompt: list[int], steps: int, choice: int = 0) -> list[int]:
    """The undisturbed run: one sequence, alone."""
    sampler = Sampler(1, VOCAB, [EOS])
    sampler.admit(sequence(0, params, prompt, len(prompt), choice))
    ids: list[int] = []
    for position in range(steps):
        ids += sampler.sample(logits_at(choice, position), [0], [position]).ids
    return ids


sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.just(99),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 10, 150]),
    top_p=st.sampled_from([0.2, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2).map(tuple),
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=40, deadline=None)
@given(
    all_params=st.lists(sampling_params, min_size=1, max_size=4),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    stops_at=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    order=st.permutations(range(4)),
)
def test_a_batch_with_resumed_rows_equals_undisturbed_runs(all_params, prompt, stops_at, order):
    """Rows in any order, and each sequence moved to another slot, rebuilt from its ids, midway."""
    steps = 10
    expected = [generate(p, prompt, steps, choice) for choice, p in enumerate(all_params)]
    sampler = Sampler(8, VOCAB, [EOS])
    slots = list(range(len(all_params)))
    ids: list[list[int]] = [[] for _ in all_params]
    for choice, params in enumerate(all_params):
        sampler.admit(sequence(slots[choice], params, prompt, len(prompt), choice))
    rows = [i for i in order if i < len(all_params)]
    for position in range(steps):
        for i, params in enumerate(all_params):
            if position == stops_at[i]:
                sampler.free(slots[i])
                slots[i] += 4
                sampler.admit(sequence(slots[i], params, prompt + ids[i], len(prompt), i))
        logits = torch.cat([logits_at(i, position) for i in rows])
        sampled = sampler.sample(logits, [slots[i] for i in rows], [position] * len(rows))
        assert not sampled.errors
        for row, i in enumerate(rows):
            ids[i].append(sampled.ids[row])
            assert (sampled.logprobs[row] is not None) == (all_params[i].logprobs is not None)
    assert ids == expected


def test_choices_and_seeds_draw_differently():
    params = [SamplingParams(max_tokens=9, seed=s, temperature=1.5) for s in (1, 2)]
    sampler = Sampler(4, VOCAB, [EOS])
    for slot in range(4):
        sampler.admit(sequence(slot, params[slot // 2], [1], 1, choice=slot % 2))
    same_logits = [logits_at(0, p).repeat(4, 1) for p in range(20)]
    drawn = [sampler.sample(x, range(4), [p] * 4).ids for p, x in enumerate(same_logits)]
    assert len(set(zip(*drawn))) == 4


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_greedy_is_argmax_and_leaves_the_logits_alone(temperature):
    sampler = Sampler(8, VOCAB, [EOS])
    for slot in range(8):
        sampler.admit(sequence(slot, SamplingParams(max_tokens=9, temperature=temperature), [1], 1))
    logits = torch.randn(8, VOCAB)
    before = logits.clone()
    assert sampler.sample(logits, range(8), [0] * 8).ids == before.argmax(1).tolist()
    assert torch.equal(logits, before)


def test_logprobs_come_from_the_raw_logits():
    params = SamplingParams(
        max_tokens=9, temperature=0.3, top_k=2, logprobs=5, logit_bias={3: 50.0}, seed=1
    )
    sampler = Sampler(2, VOCAB, [EOS])
    sampler.admit(sequence(0, SamplingParams(max_tokens=9, temperature=0.0), [1], 1))
    sampler.admit(sequence(1, params, [1], 1))
    logits = torch.randn(2, VOCAB)
    expected = logits[1].log_softmax(0)
    sampled = sampler.sample(logits, [0, 1], [0, 0])
    assert sampled.logprobs[0] is None
    found = sampled.logprobs[1]
    assert found is not None and found.token_id == sampled.ids[1] == 3
    assert math.isclose(found.logprob, float(expected[3]), abs_tol=1e-5)
    assert found.rank == int((expected > expected[3]).sum()) + 1
    best = expected.topk(5)
    assert found.top_ids == best.indices.tolist()
    assert np.allclose(found.top_logprobs, best.values.numpy(), atol=1e-5)


def test_logprobs_zero_gives_the_sampled_token_only():
    sampler = Sampler(1, VOCAB, [EOS])
    sampler.admit(sequence(0, SamplingParams(max_tokens=9, temperature=0.0, logprobs=0), [1], 1))
    logits = torch.randn(1, VOCAB)
    expected = float(logits[0].log_softmax(0).max())
    found = sampler.sample(logits, [0], [0]).logprobs[0]
    assert (found.rank, found.top_ids, found.top_logprobs) == (1, [], [])
    assert math.isclose(found.logprob, expected, abs_tol=1e-5)


def test_prompt_logprobs():
    sampler = Sampler(1, VOCAB, [EOS])
    sampler.admit(sequence(0, SamplingParams(max_tokens=9, prompt_logprobs=2), [1], 1))
    logits = torch.randn(150, VOCAB)
    next_ids = torch.randint(0, VOCAB, (150,)).tolist()
    expected = logits.log_softmax(1)
    found = sampler.prompt_logprobs(logits, next_ids, 0)
    assert [entry.token_id for entry in found] == next_ids
    for t, entry in enumerate(found):
        assert math.isclose(entry.logprob, float(expected[t, next_ids[t]]), abs_tol=1e-5)
        assert entry.top_ids == expected[t].topk(2).indices.tolist()
        assert entry.rank == int((expected[t] > expected[t, next_ids[t]]).sum()) + 1


def test_min_tokens_holds_back_eos_and_stop_ids():
    params = SamplingParams(max_tokens=9, temperature=0.0, min_tokens=2, stop_token_ids=(9, 10**6))
    sampler = Sampler(1, VOCAB, [EOS])
    sampler.admit(sequence(0, params, [1], 1))
    logits = torch.zeros(1, VOCAB)
    logits[0, [EOS, 9, 11]] = torch.tensor([5.0, 4.0, 3.0])
    drawn = [sampler.sample(logits.clone(), [0], [p]).ids[0] for p in range(4)]
    assert drawn == [11, 11, EOS, EOS]


def only(vocab: int, *rows: tuple[int, list[int]]) -> TokenMasks:
    bits = np.zeros((len(rows), mask_words(vocab) * 32), dtype=np.uint8)
    for i, (_, allowed) in enumerate(rows):
        bits[i, allowed] = 1
    packed = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    return TokenMasks([row for row, _ in rows], torch.from_numpy(packed))


def test_the_grammar_wins_over_min_tokens():
    params = SamplingParams(max_tokens=9, min_tokens=5, seed=3)
    sampler = Sampler(2, VOCAB, [EOS])
    for slot in range(2):
        sampler.admit(sequence(slot, params, [1], 1))
    logits = torch.zeros(2, VOCAB)
    logits[:, EOS] = 9.0
    sampled = sampler.sample(logits, [0, 1], [0, 0], only(VOCAB, (0, [EOS])))
    assert not sampled.errors
    assert sampled.ids[0] == EOS and sampled.ids[1] != EOS


def test_masked_rows_draw_within_their_mask():
    sampler = Sampler(3, VOCAB, [EOS])
    for slot in range(3):
        sampler.admit(sequence(slot, SamplingParams(max_tokens=9, seed=slot, top_p=0.9), [1], 1))
    allowed = [3, 64, 199]
    for position in range(50):
        masks = only(VOCAB, (0, allowed), (2, allowed[1:]))
        ids = sampler.sample(logits_at(position).repeat(3, 1), range(3), [position] * 3, masks).ids
        assert ids[0] in allowed and ids[2] in allowed[1:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_that_are_not_finite_fail_their_row_only(temperature, poison, masked):
    params = SamplingParams(max_tokens=9, temperature=temperature, top_p=0.9, logprobs=1)
    sampler = Sampler(3, VOCAB, [EOS])
    for slot in range(3):
        sampler.admit(sequence(slot, params, [1], 1))
    logits = torch.randn(3, VOCAB)
    clean = sampler.sample(logits.clone(), range(3), [0] * 3).ids
    logits[1, 42] = poison
    masks = only(VOCAB, (1, [5, 6])) if masked else TokenMasks()  # hides the poison
    sampled = sampler.sample(logits, range(3), [0] * 3, masks)
    assert list(sampled.errors) == [1]
    assert sampled.errors[1].code == EngineFailed.code and "finite" in sampled.errors[1].message
    assert 0 <= sampled.ids[1] < VOCAB
    assert [sampled.ids[0], sampled.ids[2]] == [clean[0], clean[2]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_left_is_an_error_of_the_row(temperature):
    sampler = Sampler(2, VOCAB, [EOS])
    for slot in range(2):
        params = SamplingParams(max_tokens=9, temperature=temperature, top_k=5)
        sampler.admit(sequence(slot, params, [1], 1))
    sampled = sampler.sample(torch.randn(2, VOCAB), [0, 1], [0, 0], only(VOCAB, (1, [])))
    assert list(sampled.errors) == [1] and "forbidden" in sampled.errors[1].message


def test_logit_bias_outside_the_vocabulary_is_an_error_of_the_row():
    sampler = Sampler(2, VOCAB, [EOS])
    sampler.admit(sequence(0, SamplingParams(max_tokens=9, logit_bias={VOCAB: 1.0}), [1], 1))
    sampler.admit(sequence(1, SamplingParams(max_tokens=9, logit_bias={VOCAB - 1: 90.0}), [1], 1))
    sampled = sampler.sample(torch.randn(2, VOCAB), [0, 1], [0, 0])
    assert sampled.errors[0].param == "logit_bias"
    assert list(sampled.errors) == [0] and sampled.ids[1] == VOCAB - 1
    sampler.free(0)
    sampler.admit(sequence(0, SamplingParams(max_tokens=9), [1], 1))
    assert not sampler.sample(torch.randn(2, VOCAB), [0, 1], [1, 1]).errors


def test_penalties_of_a_long_output_grow_past_their_buffer():
    """600 tokens, one at a time, equal a rebuild from all 600 at once."""
    params = SamplingParams(max_tokens=999, frequency_penalty=0.3, repetition_penalty=1.2, seed=5)
    ids = generate(params, [3, 4], 600)
    sampler = Sampler(1, VOCAB, [EOS])
    sampler.admit(sequence(0, params, [3, 4, *ids[:599]], 2))
    assert sampler.sample(logits_at(0, 599), [0], [599]).ids == ids[599:]
