"""Small tokenizers of each kind, trained here on a few sentences, in checkpoint folders."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Grüße aus Köln! Le cœur a ses raisons que la raison ne connaît point.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを。我能吞下玻璃而不伤身体。",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก 안녕하세요 세계",
    "Emoji: 😀 👩‍👩‍👧‍👦 🇳🇴 👍🏽 ✨  two  spaces\tand a tab\nand lines\n\n",
    'def f(x):\n    return {"name": "f", "arguments": {"x": [1, 2.5e-3, null]}}\n',
] * 4


@cache
def byte_level() -> str:
    """GPT-2's kind, with ChatML's tokens: the JSON text of the tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tags = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return tokenizer.to_str()


@cache
def llama2() -> str:
    """Llama 2's kind: metaspace by normalizer, byte fallback, one space stripped at the start."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        limit_alphabet=60,
        show_progress=False,
    )
    words = (word for sentence in SENTENCES for word in sentence.split(" "))
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    plain = json.loads(tokenizer.to_str())
    # The trainer can only keep byte tokens whole as special ones; in Llama 2 they are ordinary.
    plain["added_tokens"] = [t for t in plain["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(plain)


@cache
def metaspace() -> str:
    """SentencePiece's other form in `tokenizers`: one Metaspace decoder, no byte fallback."""
    tokenizer = tokenizers.SentencePieceBPETokenizer()
    tokenizer.train_from_iterator(
        SENTENCES, vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    return tokenizer.to_str()


@cache
def wordpiece() -> str:
    """BERT's kind, whose decoder looks at neighbours: not one for a table."""
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    tokenizer.train_from_iterator(SENTENCES, vocab_size=500, show_progress=False)
    return tokenizer.to_str()


CONFIGS: dict[str, dict[str, Any]] = {
    "byte_level": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "metaspace": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "wordpiece": {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
}
KINDS = {"byte_level": byte_level, "llama2": llama2, "metaspace": metaspace, "wordpiece": wordpiece}


def write_tokenizer(folder: Path, kind: str, *, all_special: bool = False, **config: Any) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json, as a checkpoint has them.

    `all_special`: the tags for tools and reasoning are special tokens, too.
    """
    tokenizer = json.loads(KINDS[kind]())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] or all_special
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    merged = {"tokenizer_class": "PreTrainedTokenizerFast", **CONFIGS[kind], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(merged), encoding="utf-8")
    return folder
