"""The tokenizer in a GGUF file's metadata, as the two files that a checkpoint folder would have:
tokenizer.json (what the `tokenizers` library reads) and tokenizer_config.json.

Two kinds are read: "gpt2", byte-level BPE with its merges, and "llama", SentencePiece's BPE, where
the scores say which merge comes first. Token types and keys are those of ggml's docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from penstock.gguf.metadata import Metadata
from penstock.gguf.pretokenizers import BYTE_LEVEL, PreTokenizer, pre_tokenizer
from penstock.protocol.errors import CheckpointError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"  # SentencePiece's

_NAMED_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",  # spelt so
    "pad_token": "tokenizer.ggml.padding_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
#: Control tokens that end an answer whatever the file's three ids say, as llama.cpp has it: most
#: files name one, and their models write several.
_END_TEXTS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>",
     "<end_of_turn>", "</s>")
)  # fmt: skip
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}


class GgufTokenizer:
    """Raises `CheckpointError` for what is missing or contradicts itself, `UnsupportedModel` for
    a kind of tokenizer that is not read here."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._kind = metadata.text("tokenizer.ggml.model")
        if self._kind not in ("gpt2", "llama"):
            raise metadata.unsupported("tokenizer.ggml.model", "gpt2, llama")
        self._tokens = metadata.strings("tokenizer.ggml.tokens")
        self._types = self._column("tokenizer.ggml.token_type")
        self._pre = self._pre_tokenizer()

    # --- what the two files say ---

    def tokenizer_json(self) -> str:
        embedded = self._metadata.get("tokenizer.huggingface.json")
        if isinstance(embedded, str):
            return embedded
        make = self._sentencepiece if self._kind == "llama" else self._byte_level
        found = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            **make(),
        }
        return json.dumps(found, ensure_ascii=False)

    def tokenizer_config(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: self._tokens[i] for name, i in self._named_ids().items() if self._tokens[i]
        }
        if (template := self._chat_template()) is not None:
            found["chat_template"] = template
        return found

    def eos_token_ids(self) -> list[int]:
        """Every token that ends an answer, the file's own `eos_token_id` first."""
        keys = [f"tokenizer.ggml.{name}" for name in _ENDS]
        found = [self._id(key) for key in keys if key in self._metadata]
        if not found and self._kind == "llama":
            found = [_SENTENCEPIECE_IDS["eos_token"]]
        controls = (i for i, kind in enumerate(self._types) if kind == _CONTROL)
        found += [i for i in controls if self._tokens[i] in _END_TEXTS]
        return list(dict.fromkeys(found))

    # --- parts of them ---

    def _byte_level(self) -> dict[str, Any]:
        merges = []
        for merge in self._metadata.strings("tokenizer.ggml.merges"):
            left, space, right = merge[1:].partition(" ")
            if not space:
                raise CheckpointError(f"{self._metadata.path}: {merge[:80]!r} is no merge")
            merges.append((merge[0] + left, right))
        return {
            "normalizer": {"type": "NFC"} if self._pre.nfc else None,
            "pre_tokenizer": self._pre.steps(),
            "post_processor": self._post_processor(),
            "decoder": BYTE_LEVEL,
            "model": _bpe(self._vocab(), merges, ignore_merges=self._pre.ignore_merges),
        }

    def _sentencepiece(self) -> dict[str, Any]:
        vocab = self._vocab()
        prefix = self._metadata.flag("tokenizer.ggml.add_space_prefix", True)
        normalizers: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        ]
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = self._named_ids().get("unk_token")
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "post_processor": self._post_processor(),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": _bpe(
                vocab,
                self._merges_by_score(vocab),
                byte_fallback=True,
                unk_token=None if unknown is None else self._tokens[unknown],
            ),
        }

    def _merges_by_score(self, vocab: dict[str, int]) -> list[tuple[str, str]]:
        """Every way to put a piece together from two others, best score first. Pieces of equal
        score and the several ways to one piece come in the order in which transformers' conversion
        from SentencePiece puts them, so that tokens are the same."""
        scores = self._column("tokenizer.ggml.scores")
        found: list[tuple[float, int, int, str, str]] = []
        for piece, i in vocab.items():
            if self._types[i] != _NORMAL:
                continue
            ways = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
            ways = [way for way in ways if way[0] in vocab and way[1] in vocab]
            ways.sort(key=lambda way: (vocab[way[0]], vocab[way[1]]))
            found += [(scores[i], len(left), len(right), left, right) for left, right in ways]
        found.sort(key=lambda way: way[:3], reverse=True)
        return [(left, right) for *_, left, right in found]

    def _added_tokens(self) -> list[dict[str, Any]]:
        """What the text is searched for before anything else."""
        kinds = (_UNKNOWN, _CONTROL, _USER_DEFINED)
        return [
            {
                "id": i,
                "content": self._tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for i, kind in enumerate(self._types)
            if kind in kinds and self._tokens[i]
        ]

    def _vocab(self) -> dict[str, int]:
        """Without the tokens that only fill the matrix up."""
        vocab: dict[str, int] = {}
        for i, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True)):
            if token and kind != _UNUSED:
                vocab.setdefault(token, i)
        return vocab

    def _post_processor(self) -> dict[str, Any] | None:
        """BOS and EOS around a prompt, where the file wants them."""
        named = self._named_ids()
        before = [named["bos_token"]] if self._wants("add_bos_token", "bos_token", named) else []
        after = [named["eos_token"]] if self._wants("add_eos_token", "eos_token", named) else []
        byte_level = [] if self._kind == "llama" else [BYTE_LEVEL]
        if not before and not after:
            return byte_level[0] if byte_level else None
        template = _template(self._tokens, before, after)
        return {"type": "Sequence", "processors": [*byte_level, template]}

    def _wants(self, flag: str, name: str, named: dict[str, int]) -> bool:
        default = flag == "add_bos_token" and self._pre.add_bos
        return self._metadata.flag(f"tokenizer.ggml.{flag}", default) and name in named

    def _chat_template(self) -> str | list[dict[str, str]] | None:
        """One template, or several by name, as tokenizer_config.json would hold them."""
        key = "tokenizer.chat_template"
        default = self._metadata.text(key) if key in self._metadata else None
        if "tokenizer.chat_templates" not in self._metadata:
            return default
        found = [
            {"name": name, "template": self._metadata.text(f"{key}.{name}")}
            for name in self._metadata.strings("tokenizer.chat_templates")
        ]
        if default is not None:
            found.append({"name": "default", "template": default})
        return found or None

    def _named_ids(self) -> dict[str, int]:
        """Ids by Hugging Face's names for them."""
        found = dict(_SENTENCEPIECE_IDS) if self._kind == "llama" else {}
        found |= {n: self._id(key) for n, key in _NAMED_IDS.items() if key in self._metadata}
        return {name: i for name, i in found.items() if i < len(self._tokens)}

    def _id(self, key: str) -> int:
        found = self._metadata.integer(key)
        if not 0 <= found < len(self._tokens):
            raise self._metadata.wrong(key, f"an id below {len(self._tokens)}")
        return found

    def _column(self, key: str) -> Sequence[Any]:
        """Token types or scores: one for each token, or none at all."""
        is_type = key.endswith("token_type")
        if is_type and key not in self._metadata:
            return [_NORMAL] * len(self._tokens)
        found = self._metadata.integers(key) if is_type else self._metadata.numbers(key)
        if len(found) != len(self._tokens):
            raise CheckpointError(
                f"{self._metadata.path}: {key} has {len(found)} entries for "
                f"{len(self._tokens)} tokens"
            )
        return found

    def _pre_tokenizer(self) -> PreTokenizer:
        if self._kind == "llama":
            return PreTokenizer((), add_bos=True)
        return pre_tokenizer(self._metadata)


def _bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    unk_token: str | None = None,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _template(tokens: Sequence[str], before: list[int], after: list[int]) -> dict[str, Any]:
    def special(i: int, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": tokens[i], "type_id": type_id}}

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        middle = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [
            *(special(i, type_id) for i in before), middle, *(special(i, type_id) for i in after)
        ]  # fmt: skip

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]}
            for i in (*before, *after)
        },
    }
