"""What the masks let through is what the constraint says, judged by jsonschema and re."""

import json
import re

import jsonschema
import numpy as np
import pytest
import torch
from tests.unit.structured_helpers import allowed_ids, small_compiler, small_tokenizer, walk

from penstock.engine.sampling.masks import TokenMasks, apply_masks, mask_words
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.batch import NewSequence
from penstock.engine.structured.compiler import GrammarCompiler
from penstock.engine.structured.matchers import MaskService, Matchers
from penstock.protocol.request import Constraint, SamplingParams

SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
     "required": ["a", "b"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["red", "green", 7, None]}, "minItems": 1, "maxItems": 4},
    {"type": "object", "properties": {"t": {"$ref": "#/$defs/tree"}}, "required": ["t"],
     "additionalProperties": False,
     "$defs": {"tree": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {
         "value": {"type": "number", "minimum": 0, "maximum": 10},
         "left": {"$ref": "#/$defs/tree"}}, "required": ["value", "left"],
         "additionalProperties": False}]}}},
    {"type": "string", "minLength": 2, "maxLength": 5, "pattern": "^[a-f]+$"},
    {"type": "string", "format": "date"},
    {"anyOf": [{"const": "x"}, {"type": "integer", "multipleOf": 7}]},
]  # fmt: skip


def text_of(ids: list[int]) -> str:
    eos = set(small_compiler().eos_token_ids)
    return small_tokenizer().decode([i for i in ids if i not in eos], skip_special_tokens=False)


def no_padding(allowed: list[int]) -> None:
    assert max(allowed) < small_tokenizer().get_vocab_size()


@pytest.mark.parametrize("schema", SCHEMAS)
def test_random_walks_validate_against_the_schema(schema):
    constraint = Constraint("json_schema", json.dumps(schema))
    for seed in range(8):
        ids = walk(small_compiler(), constraint, seed, small_tokenizer(), no_padding)
        text = text_of(ids)
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(
            json.loads(text)
        )
        assert not re.search(r"\s{30}", text), "whitespace is bounded"


def test_random_walks_of_json_object_are_objects():
    for seed in range(8):
        ids = walk(small_compiler(), Constraint("json_object", ""), seed, small_tokenizer())
        assert isinstance(json.loads(text_of(ids)), dict)


@pytest.mark.parametrize(
    "regex", [r"[a-c]{3}[0-9]+x", r"(ab|cd)*e", r"\{[^{}]{1,20}\}", "caf\u00e9+ \U0001f600{1,3}"]
)
def test_random_walks_match_the_regex(regex):
    for seed in range(8):
        text = text_of(walk(small_compiler(), Constraint("regex", regex), seed, small_tokenizer()))
        assert re.fullmatch(regex, text)


def test_choice_and_grammar():
    choices = ["yes", 'say "no"', "maybe \u2014 later"]
    constraint = Constraint("choice", json.dumps(choices))
    found = {text_of(walk(small_compiler(), constraint, s, small_tokenizer())) for s in range(30)}
    assert found == set(choices)
    sums = Constraint("lark", 'start: NUM ("+" NUM)* "=" NUM\nNUM: /[0-9]{1,2}/')
    for seed in range(8):
        text = text_of(walk(small_compiler(), sums, seed, small_tokenizer()))
        assert re.fullmatch(r"\d{1,2}(\+\d{1,2})*=\d{1,2}", text)


def test_ids_without_text_are_never_allowed_even_when_named():
    compiler = small_compiler()
    padding_id = compiler.vocab_size - 1
    matchers = Matchers(compiler)
    matchers.admit(0, Constraint("lark", f'start: <[{padding_id}]> | "a"'))
    allowed = allowed_ids(matchers.fill([0]), 0, compiler.vocab_size)
    assert allowed and padding_id not in allowed


def test_a_complete_output_allows_eos_only_and_goes_on_doing_so():
    compiler = small_compiler()
    matchers = Matchers(compiler)
    matchers.admit(3, Constraint("choice", '["ab"]'))
    assert not matchers.wants_stop(3)
    for token_id in small_tokenizer().encode("ab").ids:
        matchers.advance(3, token_id)
    eos = sorted(compiler.eos_token_ids)
    for _ in range(3):  # ignore_eos: the sequence is made to go on
        assert matchers.wants_stop(3)
        assert allowed_ids(matchers.fill([3]), 0, compiler.vocab_size) == eos
        matchers.advance(3, eos[0])
    assert matchers.fill([3]).errors == {}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_replay_equals_going_on(schema):
    compiler = small_compiler()
    constraint = Constraint("json_schema", json.dumps(schema))
    ids = walk(compiler, constraint, 5, small_tokenizer())
    going_on = Matchers(compiler)
    going_on.admit(0, constraint)
    for count in range(len(ids) + 1):
        resumed = Matchers(compiler)
        resumed.admit(0, constraint, ids[:count])
        assert torch.equal(resumed.fill([0]).bits, going_on.fill([0]).bits)
        assert resumed.wants_stop(0) == going_on.wants_stop(0)
        if count < len(ids):
            going_on.advance(0, ids[count])


def test_the_service_gives_the_masks_of_the_synchronous_matchers():
    compiler = small_compiler()
    constraints = [
        Constraint("json_schema", json.dumps(SCHEMAS[0])),
        None,
        Constraint("regex", "[ab]+c"),
        Constraint("json_object", ""),
    ]
    service, plain = MaskService(compiler), Matchers(compiler)
    try:
        for slot, constraint in enumerate(constraints):
            if constraint is not None:
                service.admit(slot, constraint)
                plain.admit(slot, constraint)
        rng = np.random.default_rng(0)
        slots = [2, 1, 0, 3]  # rows need not stand in the order of slots
        for _ in range(30):
            found, expected = service.masks(slots), plain.fill(slots)
            assert list(found.rows) == list(expected.rows) == [0, 2, 3]
            assert torch.equal(found.bits, expected.bits)
            ids = [0] * len(slots)
            for row in found.rows:
                ids[row] = int(rng.choice(allowed_ids(found, row, compiler.vocab_size)))
            service.advance_async(slots, ids)
            for slot, token_id in zip(slots, ids):
                plain.advance(slot, token_id)
        service.free(2)
        assert list(service.masks(slots).rows) == [2, 3]
        for slot in range(4):
            service.free(slot)
        assert service.masks(slots).bits is None
    finally:
        service.close()


def test_errors_stay_with_their_row():
    compiler = small_compiler()
    service = MaskService(compiler)
    try:
        service.admit(0, Constraint("regex", "a("))  # does not compile
        service.admit(1, Constraint("regex", "[ab]+"))
        service.admit(2, Constraint("regex", "[ab]+"), [small_tokenizer().token_to_id("z")])
        service.admit(3, Constraint("json_schema", '{"$ref": "#"}'))  # nothing matches
        masks = service.masks([0, 1, 2, 3])
        assert list(masks.rows) == [1]
        assert {row: error.code for row, error in masks.errors.items()} == {
            0: "invalid_constraint",
            2: "engine_failed",
            3: "engine_failed",
        }
        sampler = Sampler(4, compiler.vocab_size, compiler.eos_token_ids)
        for slot in range(4):
            params = SamplingParams(max_tokens=9, seed=slot)
            sampler.admit(NewSequence(slot, [1], 1, params))
        sampled = sampler.sample(torch.randn(4, compiler.vocab_size), range(4), [0] * 4, masks)
        assert sorted(sampled.errors) == [0, 2, 3]
        assert small_tokenizer().id_to_token(sampled.ids[1]) in {"a", "b"}
    finally:
        service.close()


def test_no_eos_is_an_error_of_the_row():
    tokenizer = small_tokenizer()
    matchers = Matchers(GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size(), []))
    matchers.admit(0, Constraint("regex", "a"))
    assert matchers.fill([0]).errors[0].code == "invalid_constraint"


@pytest.mark.parametrize("text", ["{}", '{"model": {"vocab": {"a": 0}}}'])
def test_a_tokenizer_that_llguidance_does_not_know_is_an_error_of_the_row(text):
    service = MaskService(GrammarCompiler(text, 10, [0]))
    try:
        service.admit(0, Constraint("regex", "a"))
        assert service.masks([0]).errors[0].code == "unsupported_feature"
    finally:
        service.close()


def test_a_bug_on_the_thread_comes_out_at_the_next_masks(monkeypatch):
    service = MaskService(small_compiler())
    try:
        monkeypatch.setattr(Matchers, "advance", lambda *_: 1 / 0)
        service.admit(0, Constraint("regex", "a"))
        service.advance_async([0], [5])
        with pytest.raises(ZeroDivisionError):
            service.masks([0])
    finally:
        service.close()


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 345, 400])
def test_apply_masks_bit_by_bit(vocab_size):
    rng = np.random.default_rng(vocab_size)
    allowed = rng.random((2, vocab_size)) < 0.5
    padded = np.zeros((2, mask_words(vocab_size) * 32), dtype=np.uint8)
    padded[:, :vocab_size] = allowed
    bits = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))
    logits = torch.randn(3, vocab_size)
    expected = logits.clone()
    expected[0][~torch.from_numpy(allowed[0])] = float("-inf")
    expected[2][~torch.from_numpy(allowed[1])] = float("-inf")
    apply_masks(logits, TokenMasks([0, 2], bits))
    assert torch.equal(logits, expected)
