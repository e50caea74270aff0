"""How text is cut before byte-level BPE, by the name that a GGUF file gives it.

The expressions are those of the models' published tokenizer.json; which name stands for which is
llama.cpp's convention (`tokenizer.ggml.pre`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from penstock.gguf.metadata import Metadata

BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
}  # fmt: skip

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: What llama.cpp does for files that name nothing, or "default".
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Each expression cuts what those before it left whole. `ignore_merges`: a word that is in the
    vocabulary is that token, whatever the merges say."""

    expressions: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def steps(self) -> dict[str, Any]:
        """As tokenizer.json has it."""
        cuts = [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated",
             "invert": False}
            for expression in self.expressions
        ]  # fmt: skip
        return {"type": "Sequence", "pretokenizers": [*cuts, BYTE_LEVEL]}


_LLAMA3_RULES = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_RULES = PreTokenizer((_QWEN2,), nfc=True)
_GPT2_RULES = PreTokenizer((_GPT2,))
_DIGITS_RULES = PreTokenizer((r"\p{N}", _GPT2))

_BY_NAME = {
    "llama-bpe": _LLAMA3_RULES,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "falcon3": _LLAMA3_RULES,
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "qwen2": _QWEN2_RULES,
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "gpt-2": _GPT2_RULES,
    "exaone4": _GPT2_RULES,
    "smollm": _DIGITS_RULES,
    "starcoder": _DIGITS_RULES,
    "refact": _DIGITS_RULES,
    "codeshell": _DIGITS_RULES,
    "minerva-7b": _DIGITS_RULES,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "default": PreTokenizer(_DEFAULT),
}


def pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    """Raises `UnsupportedModel` for a name that is not known here.

    Files older than May 2024 name nothing. Qwen has one rule for all its models; for others the
    file is read as llama.cpp reads it, which may cut text differently than the model has learnt.
    """
    key = "tokenizer.ggml.pre"
    named = metadata.text(key, "default")
    if named not in _BY_NAME:
        raise metadata.unsupported(key, ", ".join(sorted(_BY_NAME)))
    if named == "default":
        if metadata.text("general.architecture", "").startswith("qwen"):
            return _QWEN2_RULES
        _log.warning(
            "%s does not say how its text is cut into words (tokenizer.ggml.pre): answers may be "
            "worse than the model's; a newer conversion of it says so",
            metadata.path,
        )
    return _BY_NAME[named]
