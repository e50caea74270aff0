"""What each token adds to the text, a token at a time.

A tokenizer's decoder works on whole sequences. For the two kinds that nearly all checkpoints have,
byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece's way (metaspace and byte fallback: Llama 2,
Mistral, Gemma), the same text comes from a table with one piece for each token and a rule for the
start of the sequence. `DecodingRules` is that reading of the decoder; None where it has another
form, and then only decoding whole windows will do (see `detokenizer`).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

#: str: whole text. bytes: part of a character, perhaps. None: shows nothing.
Piece = str | bytes | None

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PER_BYTE = "penstock.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece's byte fallback shows one replacement character for each stray byte."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(PER_BYTE, _replace_each_byte)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's map between bytes and printable characters, read backwards.

    Printable Latin-1 stands for itself; the other 68 bytes are given the characters from U+0100 on,
    in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return table


BYTE_OF_CHAR = _byte_of_char()


def byte_level_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for. A token with a foreign character is literal text."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def fallback_byte(token: str) -> int | None:
    """65 for `<0x41>`; None for a token that is no byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """How tokens become text.

    `replacements` apply within each token. `strip_start` spaces at most go from the very beginning;
    `drop_in_first` is a character that the first token loses altogether. `byte_errors` is the codec
    error handler that shows invalid UTF-8 as this decoder would.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_char: str = " "
    strip_start: int = 0
    drop_in_first: str | None = None

    @property
    def byte_errors(self) -> str:
        return "replace" if self.byte_level else PER_BYTE

    @property
    def has_start(self) -> bool:
        return self.strip_start > 0 or self.drop_in_first is not None

    def piece(self, token: str) -> Piece:
        if self.byte_level:
            raw = byte_level_bytes(token)
            try:
                return raw.decode() or None
            except UnicodeDecodeError:
                return raw
        if self.byte_fallback and (byte := fallback_byte(token)) is not None:
            return bytes((byte,))
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token

    def first_piece(self, token: str) -> Piece:
        if self.drop_in_first is None or fallback_byte(token) is not None:
            return self.piece(token)
        return self.piece(token.replace(self.drop_in_first, ""))


def rules_of(decoder: Any) -> DecodingRules | None:
    """Read a `tokenizers` decoder; None if it does not work a token at a time."""
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    stages = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [stage["type"] for stage in stages]
    if kinds == ["ByteLevel"]:
        return DecodingRules(byte_level=True)
    if kinds == ["Metaspace"]:
        return _metaspace(stages[0])
    return _sentencepiece(stages, kinds)


def _metaspace(stage: dict[str, Any]) -> DecodingRules:
    mark = stage["replacement"]
    drops = stage.get("prepend_scheme", "always") != "never"
    return DecodingRules(replacements=((mark, " "),), drop_in_first=mark if drops else None)


def _sentencepiece(stages: list[dict[str, Any]], kinds: list[str]) -> DecodingRules | None:
    """Replace*, ByteFallback?, Fuse?, Strip? in that order, as Llama 2's converter has them."""
    count = 0
    while count < len(kinds) and kinds[count] == "Replace":
        count += 1
    replaces, rest = stages[:count], kinds[count:]
    if any("String" not in stage["pattern"] for stage in replaces):
        return None
    if rest not in (
        [],
        ["Fuse"],
        ["ByteFallback"],
        ["ByteFallback", "Fuse"],
        ["Fuse", "Strip"],
        ["ByteFallback", "Fuse", "Strip"],
    ):
        return None
    no_strip: dict[str, Any] = {"content": " ", "start": 0, "stop": 0}
    strip = stages[-1] if rest[-1:] == ["Strip"] else no_strip
    if strip["stop"]:
        return None
    return DecodingRules(
        byte_fallback="ByteFallback" in rest,
        replacements=tuple((stage["pattern"]["String"], stage["content"]) for stage in replaces),
        strip_char=strip["content"],
        strip_start=strip["start"],
    )


class PieceTable(dict[int, Piece]):
    """Token id to piece, filled as ids are met: a vocabulary of 150,000 is not built at start."""

    def __init__(
        self,
        rules: DecodingRules,
        token_of: Callable[[int], str | None],
        hidden: Set[int] = frozenset(),
    ) -> None:
        super().__init__()
        self._rules = rules
        self._token_of = token_of
        self._hidden = hidden

    def __missing__(self, token_id: int) -> Piece:
        token = self._token_of(token_id)
        if token is None:  # no such token; not remembered, or strangers could make the table grow
            return None
        piece = None if token_id in self._hidden else self._rules.piece(token)
        self[token_id] = piece
        return piece

    def first(self, token_id: int) -> Piece:
        """The piece of a token that begins a sequence."""
        token = self._token_of(token_id)
        if token is None or token_id in self._hidden:
            return None
        return self._rules.first_piece(token)
