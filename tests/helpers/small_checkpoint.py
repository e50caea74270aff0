"""A tokenizer and chat template of our own, small enough to be made in a test."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from penstock.checkpoint import Checkpoint

# ChatML as Qwen writes it: roles between <|im_start|> and <|im_end|>, Hermes tool calls.
CHATML = """\
{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' and message.content == 'raise' %}
{{- raise_exception('this template raises') }}{% endif -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{{ greeting | default('') }}{% endif %}"""

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
_CORPUS = [
    "Hello, world. The quick brown fox jumps over the lazy dog.",
    "system user assistant tool weather city get_weather arguments name",
    '{"name": "get_weather", "arguments": {"city": "Oslo"}}',
]


def make_checkpoint(folder: Path, generation_config: dict[str, object] | None = None) -> Checkpoint:
    """A byte-level BPE of about 350 tokens with ChatML; EOS is <|im_end|>."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    end = backend.token_to_id("<|im_end|>")
    files = {
        "config.json": {"model_type": "qwen3", "eos_token_id": end},
        "generation_config.json": {"eos_token_id": end, **(generation_config or {})},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": CHATML},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return Checkpoint(folder)
