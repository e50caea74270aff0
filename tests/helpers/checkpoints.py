"""Small random checkpoints in Hugging Face layout, written by transformers itself.

    folder = make_checkpoint(tmp_path / "m", "qwen3", num_hidden_layers=3)

Weights are drawn so that every tensor matters (no zero bias, no norm of ones) and logits have
margins worth comparing. Every token id below vocab_size has text. Same arguments, same bytes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

#: Rotary embeddings beyond the plain ones, as `rope_parameters` has them.
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_TOKENS = ("<tool_call>", "</tool_call>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SENTENCES = (
    "The river turns the wheel and the wheel turns the stone.",
    "Water runs down the long pipe to the turbine below the dam.",
    "What is the capital of France? The capital of France is Paris.",
    "One, two, three, four, five, six, seven, eight, nine, ten.",
    "She said that the answer to the question was written on the door.",
    '{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "celsius"}}',
    "system user assistant tool hello there how are you today",
    "Fünf größere Öfen, déjà vu, 東京 and a smile 🙂 are not ASCII.",
)

_CONFIGS: dict[str, type[transformers.PreTrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@cache
def tokenizer_json(vocab_size: int = 384) -> str:
    """A byte-level BPE trained on a few sentences, with ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = (*SPECIAL_TOKENS, *TOOL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_SENTENCES * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TOOL_TOKENS])
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    return tokenizer.to_str()


def make_tokenizer(folder: Path, vocab_size: int = 384) -> Tokenizer:
    """tokenizer.json and tokenizer_config.json (with the chat template) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer_json(vocab_size)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return Tokenizer.from_str(text)


def make_checkpoint(
    folder: Path | str,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str | None = None,
    transformers4_layout: bool = False,
    **overrides: Any,
) -> Path:
    """A checkpoint of `family` (see FAMILIES) in `folder`; `overrides` are config settings.

    `max_shard_size` ("40KB") shards the weights with an index. `transformers4_layout` rewrites
    config.json as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype.
    """
    folder = Path(folder)
    tokenizer = make_tokenizer(folder, overrides.pop("vocab_size", 384))
    settings = {
        **_SMALL,
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        **({"head_dim": 16} if family == "qwen3" else {}),
        **({"sliding_window": None} if family == "mistral" else {}),
        **overrides,
    }
    config = _CONFIGS[family](**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size or "5GB")
    if transformers4_layout:
        _rewrite_as_transformers4(folder / "config.json")
    return folder


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill all parameters from one generator: norms near 1, biases small, matrices that keep the
    scale of their input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def _rewrite_as_transformers4(file: Path) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)  # derived from max_window_layers then
    config["transformers_version"] = "4.51.0"
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
