"""Token ids to text as they come, in constant time a token.

    detokenizer = make_detokenizer(tokenizer, prompt_ids)
    text = detokenizer.push(new_ids)     # only characters that are final
    rest = detokenizer.finish()          # what never became a character

The concatenation of all parts is what the prompt and the output, decoded together, add to the
prompt decoded alone; without a prompt it is `tokenizer.decode(ids)`. docs/design/text.md names the
one case of invalid UTF-8 where the two differ.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Protocol

from penstock.service.text.pieces import REPLACEMENT, DecodingRules, PieceTable

if TYPE_CHECKING:
    from penstock.service.text.tokenizer import Tokenizer

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def push(self, ids: Sequence[int]) -> str:
        """The new text that is final; holds back a character whose bytes are not all here."""

    def finish(self) -> str:
        """What was held back, with replacement characters for bytes that make no character."""


def make_detokenizer(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int] = (),
    *,
    skip_special_tokens: bool = True,
    keep: Set[int] = frozenset(),
) -> Detokenizer:
    """`keep` are special tokens to show all the same (tags that a parser behind needs to see)."""
    rules = tokenizer.rules
    if rules is None:
        return WindowDetokenizer(tokenizer, prompt_ids, skip_special_tokens, keep)
    table = tokenizer.pieces(skip_special_tokens, keep)
    return TableDetokenizer(rules, table, prompt_ids)


class TableDetokenizer:
    """For vocabularies whose every token has a piece of its own (see `pieces`)."""

    __slots__ = ("_at_start", "_decoder", "_pending", "_plain", "_rules", "_strip_left", "_table")

    def __init__(
        self, rules: DecodingRules, table: PieceTable, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._rules = rules
        self._table = table
        self._decoder: codecs.IncrementalDecoder | None = None
        self._pending = False  # the decoder holds bytes
        self._at_start = rules.has_start  # nothing of the sequence has been shown yet
        self._strip_left = rules.strip_start
        self._plain = not self._at_start  # neither: a piece of text can go straight out
        self._enter(prompt_ids)

    def push(self, ids: Sequence[int]) -> str:
        if self._plain and len(ids) == 1:
            piece = self._table[ids[0]]
            if piece.__class__ is str:
                return piece
        return self._push(ids)

    def finish(self) -> str:
        text = self._flush() if self._pending else ""
        text = self._strip(text)
        self._plain = not self._at_start
        return text

    def _push(self, ids: Sequence[int]) -> str:
        out: list[str] = []
        table = self._table
        for token_id in ids:
            piece = table[token_id] if not self._at_start else table.first(token_id)
            if piece is None:
                continue
            if piece.__class__ is str and not self._pending and not self._at_start:
                out.append(piece)
            else:
                out.append(self._strip(self._text(piece)))
        self._plain = not (self._pending or self._at_start)
        return "".join(out)

    def _text(self, piece: str | bytes) -> str:
        if isinstance(piece, bytes):
            if self._decoder is None:
                self._decoder = _utf8(self._rules.byte_errors)
            text = self._decoder.decode(piece)
            self._pending = bool(self._decoder.getstate()[0])
            if self._rules.drop_in_first is not None:
                self._at_start = False  # bytes were the first token
            return text
        if self._pending:  # a piece of text never completes a character: what waits is invalid
            return self._flush() + piece
        return piece

    def _flush(self) -> str:
        assert self._decoder is not None
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._pending = False
        return text

    def _strip(self, text: str) -> str:
        """Apply the rule for the start of the sequence to its first text."""
        if not self._at_start:
            return text
        if self._rules.drop_in_first is not None:
            self._at_start = False  # `first_piece` has done it
            return text
        while self._strip_left and text.startswith(self._rules.strip_char):
            text = text[1:]
            self._strip_left -= 1
        self._at_start = self._strip_left > 0 and not text
        return text

    def _enter(self, prompt_ids: Sequence[int]) -> None:
        """Take the state that the prompt leaves behind, without decoding all of it.

        The start rule looks at the first tokens that show, a character in progress at the last
        three (UTF-8 has at most three bytes before the last one).
        """
        for token_id in prompt_ids:
            if not self._at_start:
                break
            self._push((token_id,))
        self._decoder, self._pending, self._plain = None, False, not self._at_start
        tail: list[bytes] = []
        for token_id in reversed(prompt_ids):
            piece = self._table[token_id]
            if piece is None:
                continue
            if not isinstance(piece, bytes) or len(tail) == 4:
                break
            tail.append(piece)
        for piece in reversed(tail):
            self._text(piece)
        self._plain = not (self._pending or self._at_start)


class WindowDetokenizer:
    """For any other decoder: decode a short window of tokens and show what it gained.

    The window starts where text was last shown, with the tokens shown then as context, so a token
    costs a constant. (The way of text-generation-inference; `tokenizers.decoders.DecodeStream` does
    the same, but raises on sequences whose prefix changes under it, and cannot be flushed.)
    """

    _CONTEXT_TOKENS = 6
    _MAX_HELD_TOKENS = 16

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool,
        keep: Set[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.hidden_ids(skip_special_tokens, keep)
        shown = [token_id for token_id in prompt_ids if token_id not in self._hidden]
        self._ids = shown[-self._CONTEXT_TOKENS :]
        self._read = len(self._ids)  # ids before it are context: already shown

    def push(self, ids: Sequence[int]) -> str:
        out: list[str] = []
        for token_id in ids:
            if token_id not in self._hidden:
                self._ids.append(token_id)
                out.append(self._gain(final=False))
        return "".join(out)

    def finish(self) -> str:
        return self._gain(final=True)

    def _gain(self, final: bool) -> str:
        context = self._tokenizer.decode(self._ids[: self._read], skip_special_tokens=False)
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        held = len(self._ids) - self._read
        unfinished = whole.endswith(REPLACEMENT) or len(whole) <= len(context)
        if unfinished and not final and held < self._MAX_HELD_TOKENS:
            return ""
        self._ids = self._ids[self._read :][-self._CONTEXT_TOKENS :] or self._ids
        self._read = len(self._ids)
        return whole[len(context) :]
