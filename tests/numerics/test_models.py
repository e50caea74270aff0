"""Every model family against `transformers`, on the same random weights, through the real memory
and every attention backend that can run here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers.checkpoints import LLAMA3, YARN, make_checkpoint
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from penstock.checkpoint import Checkpoint
from penstock.engine.attention import select
from penstock.engine.attention.base import AttentionRow
from penstock.engine.layers.attention import attention_shape, build_attention
from penstock.engine.layers.rotary import inverse_frequencies
from penstock.engine.loading.loader import load_model
from penstock.engine.models import llama
from penstock.engine.models.fields import Fields
from penstock.engine.platforms.base import Platform
from penstock.engine.platforms.cpu.platform import CpuPlatform

VOCAB = 384
BLOCK = 16
LENGTH = 50
#: Of logits with a standard deviation of about 1.
FLOAT32_TOLERANCE = 3e-5

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "num_attention_heads": 8, "head_dim": 16}),
    "llama-biases-tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-head-dim": ("llama", {"head_dim": 40, "num_key_value_heads": 1}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "mistral": ("mistral", {"head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-window-of-a-block": ("mistral", {"sliding_window": BLOCK}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2-window-above": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 4}),
    "qwen3-mqa-biases": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}
#: One of each family, for what costs more.
FAMILIES = ("llama3", "mistral-window", "qwen2", "qwen3")
BACKENDS = [backend.name for backend in select.BACKENDS]


@dataclass
class Both:
    """One checkpoint, and transformers' model of it."""

    folder: Path
    oracle: Any

    def expected(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.oracle(ids[None]).logits[0].float()


def oracle_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """variant -> Both, made once."""
    made: dict[str, Both] = {}

    def make(variant: str) -> Both:
        if variant not in made:
            family, overrides = VARIANTS[variant]
            folder = make_checkpoint(tmp_path_factory.mktemp(variant), family, **overrides)
            made[variant] = Both(folder, oracle_of(folder))
        return made[variant]

    return make


class Engine:
    """Model, memory and attention, driven by hand. Slot s owns blocks s * 8 ... s * 8 + 7."""

    SLOTS, BLOCKS_PER_SLOT = 5, 8

    def __init__(
        self,
        folder: Path,
        backend: str,
        dtype: str = "float32",
        max_model_len: int | None = None,
        platform: Platform | None = None,
    ) -> None:
        platform = platform or CpuPlatform()
        self.model, self.config = load_model(
            Checkpoint(folder), platform, dtype, max_model_len=max_model_len
        )
        for window in set(self.config.windows):
            shape = attention_shape(self.config, window)
            reason = select.refusals(shape, self.model.dtype, platform.device)[backend]
            if reason is not None:
                pytest.skip(f"{backend}: {reason}")
        num_blocks = self.SLOTS * self.BLOCKS_PER_SLOT
        self.memory = platform.kv_memory(
            self.config.kv_layout(), num_blocks, self.SLOTS, self.BLOCKS_PER_SLOT
        )
        self.attention = build_attention(
            self.config,
            lambda shape: platform.attention(shape, self.memory, self.model.dtype, backend),
        )
        for slot in range(self.SLOTS):
            for index in range(self.BLOCKS_PER_SLOT):
                self.memory.map(slot, index, slot * self.BLOCKS_PER_SLOT + index)

    def step(self, *rows: tuple[int, int, torch.Tensor]) -> list[torch.Tensor]:
        """Rows of (slot, start, ids). Returns the logits of all tokens of each row."""
        ids_T = torch.cat([ids for _, _, ids in rows])
        positions_T = torch.cat([torch.arange(at, at + len(ids)) for _, at, ids in rows])
        with torch.inference_mode():
            self.attention.plan([AttentionRow(slot, at, len(ids)) for slot, at, ids in rows])
            hidden_TE = self.model.forward(ids_T, positions_T, self.attention)
            logits_TV = self.model.logits(hidden_TE)
        assert logits_TV.dtype == torch.float32
        return list(logits_TV.split([len(ids) for _, _, ids in rows]))

    def chunked(self, slot: int, ids: torch.Tensor, size: int, start: int = 0) -> torch.Tensor:
        chunks = [
            self.step((slot, at, ids[at : at + size]))[0] for at in range(start, len(ids), size)
        ]
        return torch.cat(chunks)


def prompt(length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=FLOAT32_TOLERANCE, rtol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
class TestFloat32:
    def test_prefill(self, both: Any, variant: str, backend: str) -> None:
        pair, ids = both(variant), prompt()
        engine = Engine(pair.folder, backend)
        assert_same(engine.step((0, 0, ids))[0], pair.expected(ids))

    @pytest.mark.parametrize("size", [1, 7, BLOCK, 33])
    def test_chunked_prefill(self, both: Any, variant: str, backend: str, size: int) -> None:
        pair, ids = both(variant), prompt()
        engine = Engine(pair.folder, backend)
        assert_same(engine.chunked(0, ids, size), pair.expected(ids))

    def test_mixed_batch_with_a_shared_prefix(self, both: Any, variant: str, backend: str) -> None:
        """In one step: a decode, a whole prompt, a later chunk, and a sequence whose first two
        blocks are another's, mapped."""
        pair = both(variant)
        engine = Engine(pair.folder, backend)
        first, second, third = prompt(41, seed=2), prompt(23, seed=3), prompt(60, seed=4)
        fourth = torch.cat((first[: 2 * BLOCK], prompt(9, seed=5)))
        engine.step((0, 0, first[:40]), (2, 0, third[:19]))
        for index in range(2):
            engine.memory.map(3, index, index)
        found = engine.step(
            (0, 40, first[40:]),
            (1, 0, second),
            (2, 19, third[19:]),
            (3, 2 * BLOCK, fourth[2 * BLOCK :]),
        )
        assert_same(found[0], pair.expected(first)[40:])
        assert_same(found[1], pair.expected(second))
        assert_same(found[2], pair.expected(third)[19:])
        assert_same(found[3], pair.expected(fourth)[2 * BLOCK :])
        engine.memory.check()


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_preempted_and_resumed_elsewhere(both: Any, variant: str, backend: str) -> None:
    """A sequence loses its slot in the middle and goes on in another: once from the blocks it had
    left behind, once from nothing."""
    pair, ids = both(variant), prompt()
    engine = Engine(pair.folder, backend)
    engine.step((0, 0, ids[:37]))
    engine.memory.free_slot(0)
    for index in range(2):
        engine.memory.map(4, index, index)
    assert_same(engine.chunked(4, ids, 11, start=2 * BLOCK), pair.expected(ids)[2 * BLOCK :])
    assert_same(engine.step((1, 0, ids))[0], pair.expected(ids))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_greedy_decoding(both: Any, variant: str, backend: str) -> None:
    """`generate` of transformers, token for token."""
    pair, ids = both(variant), prompt(21)
    engine = Engine(pair.folder, backend)
    expected = pair.oracle.generate(
        ids[None], max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None
    )[0]
    logits = engine.step((0, 0, ids))[0]
    while len(ids) < len(expected):
        ids = torch.cat((ids, logits[-1:].argmax(-1)))
        logits = engine.step((0, len(ids) - 1, ids[-1:]))[0]
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_schedule_gives_the_same_logits(both: Any, backend: str, data: st.DataObject) -> None:
    """Three sequences advance by any numbers of tokens in any company."""
    pair = both("qwen3-layer-types")
    engine = Engine(pair.folder, backend)
    sequences = [prompt(length, seed=length) for length in (19, 34, 48)]
    expected = [pair.expected(ids) for ids in sequences]
    done = [0, 0, 0]
    while any(done[i] < len(ids) for i, ids in enumerate(sequences)):
        rows, first = [], []
        for slot, ids in enumerate(sequences):
            count = data.draw(st.integers(0, len(ids) - done[slot]), label=f"slot {slot}")
            if count:
                rows.append((slot, done[slot], ids[done[slot] : done[slot] + count]))
                first.append(slot)
        if not rows:
            slot = next(i for i, ids in enumerate(sequences) if done[i] < len(ids))
            rows, first = [(slot, done[slot], sequences[slot][done[slot] :])], [slot]
        for slot, logits in zip(first, engine.step(*rows)):
            end = done[slot] + len(logits)
            assert_same(logits, expected[slot][done[slot] : end])
            done[slot] = end


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_half_precision(both: Any, variant: str, dtype: str, backend: str) -> None:
    """No further from float32 than transformers in the same dtype, with half again for another
    order of roundings; and where the best logit is clear, it is the same token."""
    pair, ids = both(variant), prompt()
    engine = Engine(pair.folder, backend, dtype)
    exact = oracle_of(pair.folder, getattr(torch, dtype)).float()
    rounded = oracle_of(pair.folder, getattr(torch, dtype))
    with torch.inference_mode():
        # The reference: float32 arithmetic on the rounded weights.
        reference = exact(ids[None]).logits[0]
        theirs = (rounded(ids[None]).logits[0].float() - reference).square().mean().sqrt()
    for found in (engine.step((0, 0, ids))[0], engine.chunked(1, ids, 7)):
        ours = (found - reference).square().mean().sqrt()
        assert ours <= 1.5 * theirs, (float(ours), float(theirs))
        best, second = reference.topk(2).values.unbind(-1)
        clear = best - second > 8 * theirs
        assert clear.any()
        assert torch.equal(found.argmax(-1)[clear], reference.argmax(-1)[clear])


def test_dynamic_rope_is_that_of_the_length_served(tmp_path: Path) -> None:
    """transformers stretches as far as the sequence is long: at the full length both agree."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    folder = make_checkpoint(tmp_path, "llama", rope_parameters=scaling, max_position_embeddings=32)
    ids = prompt(LENGTH)
    engine = Engine(folder, "reference", max_model_len=LENGTH)
    assert_same(engine.chunked(0, ids, 16), Both(folder, oracle_of(folder)).expected(ids))


@pytest.mark.parametrize("variant", FAMILIES)
def test_plain_platform(both: Any, variant: str) -> None:
    """The defaults of `Platform`, with paged memory, as devices without kernels of ours use."""

    class Plain(Platform):
        def available_bytes(self) -> int:
            return 1 << 40

    pair, ids = both(variant), prompt()
    engine = Engine(pair.folder, "reference", platform=Plain("cpu"))
    assert_same(engine.chunked(0, ids, 13), pair.expected(ids))


@pytest.mark.parametrize(
    "variant",
    ["llama3", "llama-linear", "mistral-window", "qwen2-window-above", "qwen2-yarn", "qwen3"],
)
def test_transformers_4_layout(both: Any, tmp_path: Path, variant: str) -> None:
    family, overrides = VARIANTS[variant]
    folder = make_checkpoint(tmp_path, family, transformers4_layout=True, **overrides)
    assert "rope_parameters" not in (folder / "config.json").read_text()
    ids = prompt()
    assert_same(Engine(folder, "reference").step((0, 0, ids))[0], both(variant).expected(ids))


#: As published: Llama 3.1 8B, Llama 3.2 1B, Qwen2.5 with its recommended scaling, and others.
PUBLISHED_ROPES: list[tuple[int, int, dict[str, Any]]] = [
    (128, 8192, {"rope_type": "default", "rope_theta": 500_000.0}),
    (128, 131072, LLAMA3 | {"original_max_position_embeddings": 8192}),
    (64, 131072, LLAMA3 | {"original_max_position_embeddings": 8192, "factor": 32.0}),
    (128, 32768, YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32768}),
    (128, 32768, YARN | {"rope_theta": 1e6, "truncate": False, "beta_fast": 16, "beta_slow": 2}),
    (64, 4096, YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.8}),
    (64, 4096, YARN | {"rope_theta": 1e4, "attention_factor": 1.25}),
    (128, 4096, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    (128, 4096, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
]


@pytest.mark.parametrize(("head_dim", "max_positions", "rope"), PUBLISHED_ROPES)
def test_frequencies(head_dim: int, max_positions: int, rope: dict[str, Any]) -> None:
    """To the last bit, at sizes that no tiny model has."""
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": max_positions,
    }
    ours = llama.parse(Fields(settings | {"rope_parameters": dict(rope)}))
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**settings, rope_parameters=dict(rope)))
    found = inverse_frequencies(ours.rope, head_dim, ours.max_model_len)
    torch.testing.assert_close(found, theirs.inv_freq, rtol=0, atol=0)
    assert ours.rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
