"""The engine's log-probabilities in the three shapes that the endpoints answer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.protocol.tokens import TokenLogprobs
from penstock.service.api.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    TokenLogprob,
    TopLogprob,
)
from penstock.service.text.tokenizer import Tokenizer

#: JSON has no -Infinity; vLLM sends this in its place.
LOWEST = -9999.0


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def chat_logprobs(
    entries: Sequence[TokenLogprobs], num_top: int, tokenizer: Tokenizer
) -> ChatLogprobs:
    out = []
    for entry in entries:
        raw = tokenizer.id_to_bytes(entry.token_id)
        top = [
            _top(token_id, logprob, tokenizer)
            for token_id, logprob in zip(entry.top_ids[:num_top], entry.top_logprobs)
        ]
        text = raw.decode("utf-8", "replace")
        out.append(TokenLogprob(text, _finite(entry.logprob), list(raw), top))
    return ChatLogprobs(out)


def _top(token_id: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    raw = tokenizer.id_to_bytes(token_id)
    return TopLogprob(raw.decode("utf-8", "replace"), _finite(logprob), list(raw))


class CompletionLogprobsBuilder:
    """Goes along a choice's tokens, for `text_offset`."""

    def __init__(self, num_top: int, tokenizer: Tokenizer) -> None:
        self._num_top = num_top
        self._tokenizer = tokenizer
        self._offset = 0

    def first(self, token_id: int) -> CompletionLogprobs:
        """The first token of an echoed prompt, which nothing predicts."""
        return self._add(CompletionLogprobs([], [], [], []), token_id, None, None)

    def build(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        out = CompletionLogprobs([], [], [], [])
        for entry in entries:
            top = {
                self._tokenizer.token_text(token_id): _finite(logprob)
                for token_id, logprob in zip(entry.top_ids[: self._num_top], entry.top_logprobs)
            }
            # The chosen token is always there, so there may be one more than was asked for.
            top.setdefault(self._tokenizer.token_text(entry.token_id), _finite(entry.logprob))
            self._add(out, entry.token_id, _finite(entry.logprob), top)
        return out

    def _add(
        self,
        out: CompletionLogprobs,
        token_id: int,
        logprob: float | None,
        top: dict[str, float] | None,
    ) -> CompletionLogprobs:
        text = self._tokenizer.token_text(token_id)
        out.tokens.append(text)
        out.token_logprobs.append(logprob)
        out.top_logprobs.append(top)
        out.text_offset.append(self._offset)
        self._offset += len(text)
        return out


def joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    out = CompletionLogprobs([], [], [], [])
    for part in parts:
        out.tokens += part.tokens
        out.token_logprobs += part.token_logprobs
        out.top_logprobs += part.top_logprobs
        out.text_offset += part.text_offset
    return out


def prompt_logprobs(
    entries: Sequence[TokenLogprobs], num_top: int, tokenizer: Tokenizer
) -> list[PromptLogprob]:
    """vLLM's shape: null for position 0, then {token id: {logprob, rank, decoded_token}}."""
    out: list[PromptLogprob] = [None]
    for entry in entries:
        position: dict[str, dict[str, Any]] = {
            str(entry.token_id): _details(entry.token_id, entry.logprob, entry.rank, tokenizer)
        }
        ranked = enumerate(zip(entry.top_ids[:num_top], entry.top_logprobs), start=1)
        for rank, (token_id, logprob) in ranked:
            position.setdefault(str(token_id), _details(token_id, logprob, rank, tokenizer))
        out.append(position)
    return out


def _details(token_id: int, logprob: float, rank: int, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "logprob": _finite(logprob),
        "rank": rank,
        "decoded_token": tokenizer.token_text(token_id),
    }
