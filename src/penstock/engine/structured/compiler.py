"""Grammars compiled for one model's vocabulary."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from penstock.checkpoint import Checkpoint
from penstock.grammar import build_tokenizer, error_text, limits, to_grammar
from penstock.protocol.errors import CheckpointError, InvalidConstraint, UnsupportedFeature
from penstock.protocol.request import Constraint

#: Compiled grammars kept, least recently used first out. They weigh from some KB to some MB.
_CACHED_GRAMMARS = 64


class GrammarCompiler:
    """`Constraint` to a fresh `LLMatcher`, cached by the constraint's text.

    `vocab_size` is the model's (rows of the output matrix), which is often rounded up beyond the
    tokenizer's: ids without text are never allowed, whatever a grammar says.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(i for i in eos_token_ids if 0 <= i < vocab_size)
        self._tokenizer_json = tokenizer_json
        self._cache: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> GrammarCompiler:
        """Raises `CheckpointError` when there is no readable tokenizer.json."""
        text = checkpoint.text("tokenizer.json")
        if text is None:
            raise CheckpointError(f"{checkpoint.path / 'tokenizer.json'} is missing")
        return cls(text, vocab_size, eos_token_ids)

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's view of the vocabulary. Built on first use; raises `UnsupportedFeature`."""
        try:
            size = max(self.vocab_size, int(self._ids_with_text.max()) + 1)
            return build_tokenizer(self._tokenizer_json, size, self.eos_token_ids)
        except (ValueError, LookupError) as exc:
            raise UnsupportedFeature(
                f"structured output is not possible with this model's tokenizer: {exc}"
            ) from exc

    @cached_property
    def mask_words(self) -> int:
        """int32 words of one mask, as llguidance writes it."""
        return -(-self.tokenizer.vocab_size // 32)

    @cached_property
    def known_mask(self) -> NDArray[np.int32]:
        """Packed bits of the ids that stand for text (or are special) and that the model has."""
        known = np.zeros(self.mask_words * 32, dtype=np.uint8)
        known[self._ids_with_text] = 1
        known[self.vocab_size :] = 0
        return np.packbits(known, bitorder="little").view(np.int32)

    @cached_property
    def eos_mask(self) -> NDArray[np.int32]:
        """Packed bits of the eos ids alone: the mask of an output that is complete."""
        eos = np.zeros(self.mask_words * 32, dtype=np.uint8)
        eos[list(self.eos_token_ids)] = 1
        return np.packbits(eos, bitorder="little").view(np.int32)

    @cached_property
    def _ids_with_text(self) -> NDArray[np.int64]:
        found = json.loads(self._tokenizer_json)
        vocab = found["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [added["id"] for added in found.get("added_tokens", ())]
        return np.asarray(ids, dtype=np.int64)

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """A matcher at the start of the output.

        Raises `InvalidConstraint`, or `UnsupportedFeature` when the tokenizer is at fault.
        """
        compiled = self._cache.get(constraint)
        if compiled is None:
            compiled = self._compile(constraint)
            self._cache[constraint] = compiled
            if len(self._cache) > _CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(constraint)
        return compiled.deep_copy()

    def _compile(self, constraint: Constraint) -> LLMatcher:
        if not self.eos_token_ids:
            raise InvalidConstraint(
                "this checkpoint names no eos token, so a constrained output could never end"
            )
        try:
            grammar = to_grammar(constraint)
        except ValueError as exc:
            raise InvalidConstraint(str(exc)) from exc
        compiled = LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits())
        if compiled.is_error():
            raise InvalidConstraint(error_text(compiled.get_error()))
        return compiled
