"""A tokenizer from `vocab.json` and `merges.txt`, where a checkpoint has no tokenizer.json.

Only for the two byte-level forms whose rules are not in those files but well known: GPT-2's and
Qwen2's. Anything else is refused with what to do.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from penstock.checkpoint import Checkpoint
from penstock.protocol.errors import CheckpointError

#: How Qwen2 cuts text before BPE (its published tokenizer.json): contractions, words with one
#: leading sign, single digits, punctuation, white space.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONVERT = (
    "convert it once with transformers "
    "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder)) or copy tokenizer.json "
    "from the model's page"
)


def backend_from_slow_files(checkpoint: Checkpoint, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Raises `CheckpointError` unless the folder holds GPT-2's or Qwen2's files."""
    path = checkpoint.path
    missing = f"{path} has no tokenizer.json"
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        if (path / "tokenizer.model").is_file():
            raise CheckpointError(f"{missing}, only tokenizer.model (SentencePiece): {_CONVERT}")
        raise CheckpointError(f"{missing}, so text cannot be encoded: copy it into the folder")
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if kind not in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        raise CheckpointError(
            f"{missing}, and vocab.json with merges.txt is not enough for "
            f"{kind or 'an unnamed tokenizer_class'}: {_CONVERT}"
        )
    try:
        bpe = models.BPE.from_file(str(vocab), str(merges))
    except Exception as exc:  # the library raises bare Exception
        raise CheckpointError(f"{vocab} and {merges} cannot be read: {exc}") from exc
    backend = tokenizers.Tokenizer(bpe)
    backend.decoder = decoders.ByteLevel()
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        prefix = bool(config.get("add_prefix_space", False))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.add_tokens(_added_tokens(checkpoint, config))
    return backend


def _added_tokens(checkpoint: Checkpoint, config: dict[str, Any]) -> list[AddedToken]:
    """In the order of their ids, which is how the library numbers them on."""
    listed = config.get("added_tokens_decoder")
    if listed:
        return [AddedToken(**token) for _, token in sorted(listed.items(), key=_by_id)]
    added = checkpoint.json("added_tokens.json")
    named = json.dumps(config, ensure_ascii=False)
    return [
        AddedToken(token, normalized=False, special=json.dumps(token, ensure_ascii=False) in named)
        for token, _ in sorted(added.items(), key=lambda item: int(item[1]))
    ]


def _by_id(item: tuple[str, Any]) -> int:
    return int(item[0])
