"""What a decoder-only model is, read from config.json. Plain data.

`base_config` reads what all families share and refuses by name what none of them does; a family
(llama.py, mistral.py, ...) then states what is its own. Defaults are those of `transformers`, both
in its fourth layout (rope_theta, rope_scaling, torch_dtype) and its fifth (rope_parameters, dtype).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from penstock.checkpoint import Checkpoint
from penstock.engine.memory.sizing import kv_layout
from penstock.engine.models.fields import Fields
from penstock.protocol.errors import CheckpointError, ConfigError, UnsupportedModel
from penstock.protocol.kv import KvLayout

DTYPES = ("float32", "bfloat16", "float16")

#: Upper bounds that no real checkpoint comes near: what lies above is a broken file.
MAX_VOCAB, MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_POSITIONS = 1 << 24, 1 << 20, 4096, 4096, 1 << 26


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding; `layers/rotary.py` turns it into frequencies.

    `original_max_tokens` is the length the model was trained on before its context was stretched by
    `factor`. The other fields belong to one type each, as in transformers.
    """

    type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_tokens: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    #: A divisor for each frequency, on top of the type's own scaling (GGUF files); empty: none.
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer. `windows[i]` is layer i's sliding window, None for full
    attention. `dtype` is what the weights are held in: the checkpoint's own until `load_model`
    has decided. `rope_max_tokens` is the longest context the rotary embedding is made for."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_model_len: int
    rope_max_tokens: int
    dtype: str
    windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, max_model_len: int | None = None
    ) -> ModelConfig:
        """See `registry.model_config`."""
        from penstock.engine.models.registry import model_config  # the families import this module

        return model_config(checkpoint, max_model_len=max_model_len)

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5

    def kv_layout(self, dtype: str = "auto") -> KvLayout:
        """Of one rank that holds the whole model; "auto": KV in the weights' dtype."""
        dtype = self.dtype if dtype == "auto" else dtype
        return kv_layout(self.num_layers, self.num_kv_heads, self.head_dim, dtype)

    def with_max_model_len(self, wanted: int | None) -> ModelConfig:
        """A copy for another context length. Raises `ConfigError` beyond what the rotary embedding
        is made for (as vLLM does). A window that holds the whole context becomes None."""
        if wanted is None:
            wanted = self.max_model_len
        if not 1 <= wanted <= self.rope_max_tokens:
            raise ConfigError(
                f"max_model_len = {wanted} is not possible: this model's positions go from 1 to "
                f"{self.rope_max_tokens} tokens"
            )
        windows = tuple(
            None if window is None or window >= wanted else window for window in self.windows
        )
        return replace(self, max_model_len=wanted, windows=windows)


def base_config(
    family: str,
    fields: Fields,
    *,
    kv_heads_required: bool = True,
    default_head_dim: int | None = None,
) -> ModelConfig:
    """Everything that is read in the same way for all families; full attention, no biases."""
    _refuse_unsupported(fields)
    num_heads = fields.integer("num_attention_heads", high=MAX_HEADS)
    hidden_size = fields.integer("hidden_size", high=MAX_WIDTH)
    head_dim = fields.integer("head_dim", default_head_dim or hidden_size // num_heads, high=1024)
    kv_heads_known = "num_key_value_heads" in fields or not kv_heads_required
    default_kv_heads = num_heads if kv_heads_known else None
    num_kv_heads = fields.integer("num_key_value_heads", default_kv_heads, high=MAX_HEADS)
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    max_positions = fields.integer("max_position_embeddings", high=MAX_POSITIONS)
    if fields.get("head_dim") is None and default_head_dim is None and hidden_size % num_heads:
        raise CheckpointError(
            f"{fields.where}: hidden_size = {hidden_size} is no multiple of "
            f"num_attention_heads = {num_heads}"
        )
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{fields.where}: num_attention_heads = {num_heads} is no multiple of "
            f"num_key_value_heads = {num_kv_heads}"
        )
    if head_dim % 2 or head_dim < 4:
        raise fields.wrong("head_dim", head_dim, "an even number from 4")
    rope = replace(
        _rope(fields, max_positions), frequency_factors=_frequency_factors(fields, head_dim)
    )
    default_len, rope_max_tokens = _context_tokens(rope, max_positions)
    return ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size", high=MAX_VOCAB),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", high=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        max_model_len=default_len,
        rope_max_tokens=rope_max_tokens,
        dtype=_dtype(fields),
        windows=(None,) * num_layers,
    )


def layer_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's layers: sliding where `layer_types` says so, else from `max_window_layers` upwards,
    and nowhere unless `use_sliding_window`."""
    window = fields.optional_integer("sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    types = fields.strings("layer_types")
    if not types:
        first = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if i >= first else None for i in range(num_layers))
    if len(types) != num_layers:
        raise fields.wrong("layer_types", f"{len(types)} entries", f"{num_layers}, one a layer")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.unsupported("layer_types", kind, "full_attention, sliding_attention")
        if kind == "sliding_attention" and window is None:
            raise CheckpointError(
                f"{fields.where}: layer_types asks for sliding_attention, but no sliding_window "
                "is in use"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _refuse_unsupported(fields: Fields) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.unsupported("hidden_act", activation, "silu")
    if fields.flag("is_encoder_decoder", False):
        raise fields.unsupported("is_encoder_decoder", True, "decoder-only models")


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype" if fields.get("dtype") else "torch_dtype", "float32")
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise fields.unsupported("dtype", name, ", ".join(DTYPES))
    return name


def _rope(fields: Fields, max_positions: int) -> RopeConfig:
    found = fields.child("rope_parameters") or fields.child("rope_scaling") or Fields({})
    if isinstance(found.get("full_attention"), dict) or isinstance(
        found.get("sliding_attention"), dict
    ):
        raise fields.unsupported("rope_parameters", "one set per layer type", "one set for all")
    for holder in (found, fields):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise holder.unsupported(
                "partial_rotary_factor", holder.get("partial_rotary_factor"), "1.0"
            )
    theta = found.number("rope_theta", fields.number("rope_theta", 10_000.0, above=1.0), above=1.0)
    kind = found.text("rope_type", found.text("type", "default"))
    original = found.integer("original_max_position_embeddings", max_positions, high=MAX_POSITIONS)
    original = fields.integer("original_max_position_embeddings", original, high=MAX_POSITIONS)
    if kind == "default":
        return RopeConfig(theta=theta, original_max_tokens=max_positions)
    if kind in ("linear", "dynamic"):
        return RopeConfig(kind, theta, _factor(found), original_max_tokens=max_positions)
    if kind == "llama3":
        low, high = found.number("low_freq_factor"), found.number("high_freq_factor")
        if high <= low:
            raise found.wrong("high_freq_factor", high, f"more than low_freq_factor = {low:g}")
        return RopeConfig(
            kind,
            theta,
            _factor(found),
            original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if kind == "yarn":
        factor = _factor(found, max_positions / original)
        return RopeConfig(
            kind,
            theta,
            factor,
            original,
            attention_factor=_yarn_attention_factor(found, factor),
            beta_fast=found.number("beta_fast", 32.0),
            beta_slow=found.number("beta_slow", 1.0),
            truncate=found.flag("truncate", True),
        )
    raise UnsupportedModel(
        f"{fields.where}: rope type {kind!r} is not supported; supported: default, linear, "
        "dynamic, llama3, yarn"
    )


def _frequency_factors(fields: Fields, head_dim: int) -> tuple[float, ...]:
    found = (fields.child("rope_scaling") or Fields({})).get("frequency_factors") or []
    if len(found) not in (0, head_dim // 2):
        raise fields.wrong("frequency_factors", f"{len(found)} numbers", f"{head_dim // 2}")
    return tuple(map(float, found))


def _factor(found: Fields, default: float | None = None) -> float:
    factor = found.number("factor", default)
    if factor < 1.0:
        raise found.wrong("factor", factor, "a number from 1: contexts are stretched, not shrunk")
    return factor


def _yarn_attention_factor(found: Fields, factor: float) -> float:
    """YaRN (arXiv:2309.00071, section 3.4) scales queries and keys by 0.1 ln(factor) + 1; with
    DeepSeek's mscale and mscale_all_dim by the ratio of two such terms."""
    if found.get("attention_factor") is not None:
        return found.number("attention_factor")

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    mscale = found.number("mscale", 0.0, above=-1.0)
    mscale_all_dim = found.number("mscale_all_dim", 0.0, above=-1.0)
    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def _context_tokens(rope: RopeConfig, max_positions: int) -> tuple[int, int]:
    """(default context length, the longest the rotary embedding is made for).

    As vLLM derives them, with one difference: a dynamic scaling changes nothing up to
    max_position_embeddings, so that is its default, and more must be asked for.
    """
    if rope.type == "linear":
        stretched = int(max_positions * rope.factor)
        return stretched, stretched
    if rope.type == "dynamic":
        return max_positions, int(max_positions * rope.factor)
    if rope.type == "yarn":
        stretched = max(int(rope.original_max_tokens * rope.factor), max_positions)
        return stretched, stretched
    return max_positions, max_positions
