"""Text to token ids and back, as the checkpoint's tokenizer files say.

`Tokenizer` wraps the `tokenizers` library. Which special tokens a prompt gets (BOS, EOS) is decided
by the post-processor in tokenizer.json, as in transformers: `add_bos_token` in
tokenizer_config.json has no say beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import AddedToken

from penstock.checkpoint import Checkpoint
from penstock.protocol.errors import CheckpointError, InvalidRequest
from penstock.service.text.pieces import (
    DecodingRules,
    PieceTable,
    byte_level_bytes,
    fallback_byte,
    rules_of,
)
from penstock.service.text.slow_files import backend_from_slow_files

#: Text up to this length is encoded where it stands (about 2 ms), longer text in a thread.
INLINE_CHARS = 8192

_NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


class Tokenizer:
    """Safe to use from several threads. Ids outside the vocabulary decode to nothing."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        more_special_tokens: Sequence[str] = (),
    ) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        #: "bos_token" etc. to their text, as chat templates see them.
        self.special_tokens = dict(special_tokens or {})
        self._mark_special([*self.special_tokens.values(), *more_special_tokens])
        #: One more than the highest id. A model's own vocabulary may be padded beyond it.
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.rules: DecodingRules | None = rules_of(backend.decoder)
        #: Every id that ends a generation: the model's own list, or the tokenizer's EOS.
        self.eos_token_ids = tuple(eos_token_ids) or tuple(
            i for i in (self.eos_token_id,) if i is not None
        )
        self._tables: dict[frozenset[int], PieceTable] = {}

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """Raises `CheckpointError` when the files are missing or are no tokenizer."""
        config = checkpoint.json("tokenizer_config.json")
        backend = _load_backend(checkpoint, config)
        listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda i: int(i[0]))
        absent = [t for _, t in listed if backend.token_to_id(t["content"]) is None]
        backend.add_tokens([AddedToken(**token) for token in absent])
        named, more = _special_tokens(checkpoint, config)
        has_model = checkpoint.has("config.json")
        return cls(backend, named, checkpoint.eos_token_ids if has_model else (), more)

    # --- text to ids ---

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises `InvalidRequest` for text that is not Unicode (a lone surrogate)."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        try:
            # The batch call, even for one text: unlike `encode`, it releases the GIL.
            found = self._backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        except (TypeError, UnicodeEncodeError) as exc:
            if all(isinstance(text, str) for text in texts):
                raise InvalidRequest(
                    "the text holds half of a surrogate pair: not Unicode"
                ) from exc
            raise
        return [encoding.ids for encoding in found]

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode`, in a thread when the text is long enough to be felt by other streams."""
        if len(text) <= INLINE_CHARS:
            return self.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens)

    # --- ids to text ---

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        size = self.vocab_size
        known = [token_id for token_id in ids if 0 <= token_id < size]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token (`Ġthe`, `▁the`, `<0x0A>`)."""
        if not 0 <= token_id < self.vocab_size:
            return None
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_bytes(self, token_id: int) -> bytes:
        """Exactly the bytes that a token stands for, in the middle of a text."""
        token = self.token(token_id)
        if token is None:
            return b""
        rules = self.rules
        if rules is None:
            return self._backend.decode([token_id], skip_special_tokens=False).encode()
        if rules.byte_level:
            return token.encode() if token_id in self._added else byte_level_bytes(token)
        if rules.byte_fallback and (byte := fallback_byte(token)) is not None:
            return bytes((byte,))
        piece = rules.piece(token)
        assert isinstance(piece, str)
        return piece.encode()

    def token_text(self, token_id: int) -> str:
        """A token as text by itself; replacement characters for part of a character."""
        return self.id_to_bytes(token_id).decode("utf-8", "replace")

    # --- special tokens ---

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @cached_property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.token_to_id(self.bos_token)

    @cached_property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.token_to_id(self.eos_token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def hidden_ids(self, skip_special_tokens: bool, keep: Set[int] = frozenset()) -> frozenset[int]:
        """The ids that show nothing in the output."""
        return self._special_ids - keep if skip_special_tokens else frozenset()

    def pieces(self, skip_special_tokens: bool, keep: Set[int] = frozenset()) -> PieceTable:
        """The table for `detokenizer`, one for each set of hidden tokens, shared by all."""
        assert self.rules is not None
        hidden = self.hidden_ids(skip_special_tokens, keep)
        table = self._tables.get(hidden)
        if table is None:
            table = self._tables[hidden] = PieceTable(self.rules, self.token, hidden)
        return table

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._backend.get_added_tokens_decoder()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._added.items() if token.special)

    def _mark_special(self, tokens: Sequence[str]) -> None:
        """Add the tokens that only the configuration names.

        One that tokenizer.json itself adds as an ordinary token stays that, as in transformers.
        """
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        missing = [AddedToken(t, special=True, normalized=False) for t in tokens if t not in known]
        self._backend.add_special_tokens(missing)


def _load_backend(checkpoint: Checkpoint, config: dict[str, Any]) -> tokenizers.Tokenizer:
    file = checkpoint.path / "tokenizer.json"
    text = checkpoint.text("tokenizer.json")
    if text is None:
        return backend_from_slow_files(checkpoint, config)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as exc:  # the library raises bare Exception
        raise CheckpointError(
            f"{file} is not a tokenizer ({exc}): truncated? Copy or download it again"
        ) from exc
    if backend.get_vocab_size(with_added_tokens=True) == 0:
        raise CheckpointError(f"{file} holds an empty vocabulary")
    return backend


def _content(value: Any) -> str | None:
    """A special token is written as a string, or as an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(
    checkpoint: Checkpoint, config: dict[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """Named special tokens by name, and further ones; special_tokens_map.json only fills gaps."""
    merged = {**checkpoint.json("special_tokens_map.json"), **config}
    named = {name: text for name in _NAMED if (text := _content(merged.get(name))) is not None}
    extra: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = merged.get(key) or []
        if isinstance(value, dict):  # transformers 5: by name, and templates may use the name
            named.update({k: text for k, v in value.items() if (text := _content(v)) is not None})
        else:
            extra += [text for v in value if (text := _content(v)) is not None]
    return named, extra
