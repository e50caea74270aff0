"""Training batches: whole dialogues packed into rows, each row filled up with prose."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tools.train_toy import corpus
from tools.train_toy.dialogues import Dialogue, Maker
from tools.train_toy.template import render
from torch import Tensor

# The assistant's tokens are what is asked for; the rest of a dialogue is mostly chance, and is
# kept at a small weight because it teaches the syntax early on.
ASSISTANT, OTHERS, PROSE = 1.0, 0.1, 0.5
POOL = 24  # dialogues to choose from when filling a row
# Conversations with tools need the longer rows, and then make up for their absence in the short.
TOOLS_IN_SHORT, TOOLS_IN_LONG = 0.0, 0.7
LEAST_PROSE = 24  # tokens: less than this is not worth a fragment


Encoded = tuple[list[int], list[float]]  # tokens and loss weights


@dataclass
class Batch:
    tokens: Tensor  # (rows, length + 1)
    documents: Tensor  # number of the document within the row
    weights: Tensor  # of the loss on predicting the token


class Codec:
    """Dialogues to token ids with loss weights."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.header = tokenizer.encode("<|im_start|>assistant\n").ids

    def encode(self, dialogue: Dialogue) -> Encoded:
        tokens = self.tokenizer.encode(render(dialogue.messages, dialogue.tools)).ids
        weights = [OTHERS] * len(tokens)
        size, at = len(self.header), 0
        while at < len(tokens):
            if tokens[at : at + size] == self.header:
                at += size
                while tokens[at] != self.end:
                    weights[at] = ASSISTANT
                    at += 1
                weights[at] = ASSISTANT
            at += 1
        return tokens, weights


def load_prose(path: Path, split: str, tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """All books of a split as one array of tokens, with <|endoftext|> after each."""
    if cache.exists():
        return np.load(cache)
    end = tokenizer.token_to_id("<|endoftext|>")
    parts: list[int] = []
    for book in corpus.load_books(path, split):
        parts += [*tokenizer.encode(book).ids, end]
    tokens = np.array(parts, dtype=np.uint16)
    np.save(cache, tokens)
    return tokens


class Packer:
    """Endless random batches. `share` is the part of a row that dialogues may take."""

    def __init__(self, maker: Maker, codec: Codec, prose: np.ndarray, share: float) -> None:
        self.rng: random.Random = maker.rng
        self.maker, self.codec, self.prose, self.share = maker, codec, prose, share
        self._pools: dict[int, list[Encoded]] = {}

    def batch(self, rows: int, length: int) -> Batch:
        made = [self._row(length + 1) for _ in range(rows)]
        tokens, documents, weights = (np.array(column) for column in zip(*made, strict=True))
        return Batch(
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(documents.astype(np.int32)),
            torch.from_numpy(weights.astype(np.float32)),
        )

    def _next_dialogue(self, room: int, size: int) -> Encoded | None:
        """A training dialogue that fits into what is left of a row, if the pool has one.

        Each size of row has its own pool, of dialogues that fit into an empty row: none can be
        left over for good, and so crowd out those that are wanted.
        """
        pool = self._pools.setdefault(size, [])
        while len(pool) < POOL:
            dialogue = self.maker.dialogue(TOOLS_IN_SHORT if size <= 300 else TOOLS_IN_LONG)
            if not dialogue.held:
                encoded = self.codec.encode(dialogue)
                if len(encoded[0]) <= size:
                    pool.append(encoded)
        for i, (tokens, _) in enumerate(pool):
            if len(tokens) <= room:
                return pool.pop(i)
        return None

    def _row(self, size: int) -> tuple[list[int], list[int], list[float]]:
        tokens: list[int] = []
        documents: list[int] = []
        weights: list[float] = []

        def add(ids: list[int], worth: list[float]) -> None:
            documents.extend([documents[-1] + 1 if documents else 0] * len(ids))
            tokens.extend(ids)
            # The first token follows another document: nothing there to predict it from.
            weights.extend([0.0, *worth[1:]])

        if size > 1024:
            self._open_long_row(add, size)
        # Stop early or late at random, so that the mean over many rows comes to the share.
        limit = size * min(1.0, self.share * self.rng.uniform(0.6, 1.5))
        while len(tokens) < limit and (found := self._next_dialogue(size - len(tokens), size)):
            add(*found)
        room = size - len(tokens)
        if room >= LEAST_PROSE:
            start = self.rng.randrange(len(self.prose) - room)
            add(self.prose[start : start + room].tolist(), [PROSE] * room)
        elif room:
            add([self.codec.end] * room, [0.0] * room)
        return tokens, documents, weights

    def _open_long_row(self, add: Callable[[list[int], list[float]], None], size: int) -> None:
        """Most of a long row is one document, so that long distances get learned at all."""
        if self.rng.random() < 0.5:
            start = self.rng.randrange(len(self.prose) - size)
            add(self.prose[start : start + size].tolist(), [PROSE] * size)
            return
        while (dialogue := self.maker.chat(self.rng.randint(12, 40))).held:
            pass
        tokens, weights = self.codec.encode(dialogue)
        add(tokens[:size], weights[:size])
