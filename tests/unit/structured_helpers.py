"""A small byte-level BPE tokenizer, and random walks through masks. No test in here."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from penstock.engine.sampling.masks import TokenMasks, unpack
from penstock.engine.structured.compiler import GrammarCompiler
from penstock.engine.structured.matchers import Matchers
from penstock.protocol.request import Constraint

EOS = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
_CORPUS = [
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
    '{\n  "items": [1, 2, 3],\n  "done": true,\n  "note": null\n}',
    "the quick brown fox jumps over the lazy dog",
]


@cache
def small_tokenizer(tool_tags: bool = True) -> Tokenizer:
    """Byte-level BPE like Qwen's; `tool_tags`: the Hermes tags are single, non-special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 20, trainer)
    if tool_tags:
        tags = [AddedToken(t, special=False, normalized=False) for t in ("<tool_call>",)]
        tags += [AddedToken("</tool_call>", special=False, normalized=False)]
        tokenizer.add_tokens(tags)
    return tokenizer


@cache
def small_compiler(tool_tags: bool = True, padding: int = 45) -> GrammarCompiler:
    """A compiler for a model whose output matrix is `padding` rows larger than the tokenizer."""
    tokenizer = small_tokenizer(tool_tags)
    eos = [tokenizer.token_to_id(EOS), tokenizer.token_to_id(END_OF_TEXT)]
    return GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size() + padding, eos)


def allowed_ids(masks: TokenMasks, row: int, vocab_size: int) -> list[int]:
    assert masks.bits is not None
    index = list(masks.rows).index(row)
    return np.flatnonzero(unpack(masks.bits, vocab_size)[index].numpy()).tolist()


def walk(
    compiler: GrammarCompiler,
    constraint: Constraint,
    seed: int,
    tokenizer: Tokenizer,
    check: Callable[[list[int]], None] = lambda allowed: None,
    patience: int = 40,
) -> list[int]:
    """Ids of a random output that the masks allow, eos last.

    After `patience` tokens it takes a token that closes something whenever one is allowed.
    """
    closing = {tokenizer.token_to_id(t) for t in ('"', "}", "]", "}}", EOS)} - {None}
    rng = random.Random(seed)
    matchers = Matchers(compiler)
    matchers.admit(0, constraint)
    ids: list[int] = []
    while not (ids and ids[-1] in compiler.eos_token_ids):
        masks = matchers.fill([0])
        assert not masks.errors, masks.errors
        allowed = allowed_ids(masks, 0, compiler.vocab_size)
        assert allowed
        check(allowed)
        preferred = [i for i in allowed if i in closing] if len(ids) > patience else []
        ids.append(rng.choice(preferred or allowed))
        matchers.advance(0, ids[-1])
        assert len(ids) < 3000, "the walk does not end"
    return ids
