"""GGUF files as checkpoints: how they are found, what they say, and the way through the whole."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.checkpoints import CHAT_TEMPLATE, make_checkpoint
from tests.helpers.gguf_files import q4_k_m, write_gguf

from penstock.checkpoint import Checkpoint, resolve
from penstock.cli.checks import examine
from penstock.engine.config import EngineConfig
from penstock.engine.loading.digest import checkpoint_digest
from penstock.engine.loading.loader import load_model
from penstock.engine.loading.tensors import CheckpointTensors
from penstock.engine.models.registry import model_config
from penstock.engine.platforms.base import Platform
from penstock.gguf.checkpoint import GgufCheckpoint
from penstock.llm import LLM
from penstock.protocol.errors import CheckpointError, ConfigError, PenstockError, UnsupportedModel
from penstock.sampling_params import SamplingParams
from penstock.service.config import ServeConfig
from penstock.service.text.texts import Texts

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


class Plain(Platform):
    def available_bytes(self) -> int:
        return 1 << 40


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf"), "llama")


@pytest.fixture(scope="module")
def whole(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(hf, tmp_path_factory.mktemp("gguf") / "model.gguf", "Q8_0")


def split(hf: Path, folder: Path) -> list[Path]:
    write_gguf(hf, folder / "model.gguf", "Q8_0", split_max_tensors=9)
    return sorted(folder.glob("model-*.gguf"))


# --- which file ---


def test_a_file_and_a_folder_with_one(whole: Path, tmp_path: Path) -> None:
    assert isinstance(resolve(str(whole)), GgufCheckpoint)
    found = resolve(str(whole.parent))
    assert isinstance(found, GgufCheckpoint) and found.path == whole
    copy = tmp_path / "MODEL.GGUF"
    shutil.copy(whole, copy)
    assert resolve(str(copy)).config == found.config


def test_a_folder_with_a_config_beside_it_is_still_its_one_file(whole: Path, hf: Path) -> None:
    """As repositories of GGUF files are."""
    shutil.copy(hf / "config.json", whole.parent / "config.json")
    assert isinstance(resolve(str(whole.parent)), GgufCheckpoint)
    (whole.parent / "config.json").unlink()


def test_safetensors_win_over_a_gguf_beside_them(hf: Path, whole: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(hf, both)
    shutil.copy(whole, both / "model.gguf")
    assert type(resolve(str(both))) is Checkpoint


def test_several_files_need_a_choice(whole: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(whole, tmp_path / name)
    (tmp_path / "a folder.gguf").mkdir()
    with pytest.raises(CheckpointError, match=r"give one of a\.gguf, b\.gguf$"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="several GGUF files"):
        resolve(str(tmp_path))
    for name in ("c.gguf", "d.gguf", "e.gguf"):
        shutil.copy(whole, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"c\.gguf, d\.gguf, \.\.\.$"):
        resolve(str(tmp_path))


def test_a_gguf_file_under_another_name(whole: Path, tmp_path: Path) -> None:
    """As in the hub's cache, whose files are called by their digests."""
    file = Path(shutil.copy(whole, tmp_path / "0a1b2c"))
    assert resolve(str(file)).config == resolve(str(whole)).config


def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_bytes(b"GGU")
    for model in ("x.gguf", "models/x.GGUF", "a/b/c", "./a", str(tmp_path / "x"), "models/"):
        with pytest.raises(CheckpointError, match="does not exist: there is no such file"):
            resolve(model)
    with pytest.raises(CheckpointError, match="does not exist: afile is a file"):
        resolve("afile/x")
    with pytest.raises(CheckpointError, match="afile is a file, but no GGUF file: give one, or"):
        resolve("afile")
    with pytest.raises(AssertionError, match="the hub was asked"):
        resolve("someone/something")


def test_a_split_file_is_one_checkpoint(hf: Path, whole: Path, tmp_path: Path) -> None:
    parts = split(hf, tmp_path)
    assert len(parts) == 3
    for given in (parts[0], parts[2], tmp_path):
        checkpoint = resolve(str(given))
        assert isinstance(checkpoint, GgufCheckpoint) and checkpoint.files == parts
    assert checkpoint.config == resolve(str(whole)).config
    with CheckpointTensors(checkpoint) as tensors, CheckpointTensors(resolve(str(whole))) as one:
        names = {name for file in one.files for name in file.tensors}
        assert {name for file in tensors.files for name in file.tensors} == names
        for name in names:
            assert torch.equal(tensors.read(name), one.read(name))
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the 3 parts.*{parts[1].name}"):
        resolve(str(parts[0]))


def test_a_part_of_another_model_is_noticed(hf: Path, tmp_path: Path) -> None:
    parts = split(hf, tmp_path)
    shutil.copy(parts[0], parts[2])
    with pytest.raises(CheckpointError, match="which another part has too"):
        _ = resolve(str(parts[0])).config


# --- what it says ---


LLAMA32 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3.2": (
        "llama",
        {"rope_parameters": LLAMA32, "max_position_embeddings": 131_072, "head_dim": 64},
    ),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_is_that_of_the_original(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    folder = make_checkpoint(tmp_path / "hf", family, **overrides)
    found = model_config(resolve(str(write_gguf(folder, tmp_path / "x.gguf"))))
    expected = model_config(Checkpoint(folder))
    assert found.eos_token_ids[0] == expected.eos_token_ids[0]
    assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps, rel=1e-6)  # a float32 there
    found, expected = (
        dataclasses.replace(config, family="", eos_token_ids=(), rms_norm_eps=0.0)
        for config in (found, expected)
    )
    assert found == expected


def test_other_rope_factors_are_taken_as_they_are(tmp_path: Path) -> None:
    rope = {**LLAMA32, "original_max_position_embeddings": 64}
    folder = make_checkpoint(tmp_path / "hf", "llama", rope_parameters=rope, head_dim=16)
    found = model_config(resolve(str(write_gguf(folder, tmp_path / "x.gguf")))).rope
    assert found.type == "default" and len(found.frequency_factors) == 8
    assert max(found.frequency_factors) == pytest.approx(32.0)


def test_the_sliding_window_of_a_mistral_is_kept(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "mistral", sliding_window=7)
    file = write_gguf(folder, tmp_path / "x.gguf", metadata={"llama.attention.sliding_window": 7})
    assert model_config(resolve(str(file))).windows == (7, 7)


def test_sampling_defaults_and_template(hf: Path, tmp_path: Path) -> None:
    more = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    checkpoint = resolve(str(write_gguf(hf, tmp_path / "x.gguf", metadata=more)))
    assert checkpoint.generation_config["temperature"] == 0.5
    assert checkpoint.generation_config["top_k"] == 20
    texts = Texts.from_checkpoint(checkpoint)
    original = Texts.from_checkpoint(Checkpoint(hf))
    messages = [{"role": "user", "content": "Grüße <|im_end|> 東京"}]
    assert texts.render_chat(messages) == original.render_chat(messages)
    text = CHAT_TEMPLATE + "Hello 12"
    assert texts.tokenizer.encode(text) == original.tokenizer.encode(text)
    assert texts.tokenizer.eos_token == "<|im_end|>"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "gemma3"}, "'gemma3' is not supported"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
    "rope": ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    "value length": ({"llama.attention.value_length": 8}, "value_length = 8 is not supported"),
    "partial rotary": ({"llama.rope.dimension_count": 8}, "dimension_count = 8 is not supported"),
    "logit scale": ({"llama.logit_scale": 0.5}, "logit_scale = 0.5 is not supported"),
    "tokenizer": ({"tokenizer.ggml.model": "t5"}, "'t5' is not supported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(what: str, hf: Path, tmp_path: Path) -> None:
    change, words = REFUSED[what]
    checkpoint = resolve(str(write_gguf(hf, tmp_path / "x.gguf", metadata=change)))
    with pytest.raises(UnsupportedModel, match=words):
        model_config(checkpoint)
        Texts.from_checkpoint(checkpoint)


KEYS = (
    "general.architecture", "llama.block_count", "llama.context_length", "llama.embedding_length",
    "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv",
    "llama.attention.key_length", "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base",
    "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges", "tokenizer.ggml.eos_token_id", "tokenizer.chat_template",
    "tokenizer.ggml.add_bos_token", "general.alignment",
)  # fmt: skip


@pytest.mark.parametrize(
    "garbage", ["", "{% if", 0, -1.0, (1 << 32) - 1, float("nan"), [1, 2], ["a"]]
)
def test_garbage_in_metadata_ends_in_one_line(garbage: Any, tmp_path: Path) -> None:
    hf = make_checkpoint(tmp_path / "hf", "llama", rope_parameters=LLAMA32)
    for number, key in enumerate(KEYS):
        file = write_gguf(hf, tmp_path / f"{number}.gguf", "F16", metadata={key: garbage})
        try:
            checkpoint = resolve(str(file))
            Texts.from_checkpoint(checkpoint)
            model_config(checkpoint, max_model_len=128)
            load_model(checkpoint, Plain(), "float32", 128)
        except PenstockError as exc:
            assert "\n" not in str(exc), key


def test_missing_and_unknown_tensors_are_named(hf: Path, tmp_path: Path) -> None:
    file = write_gguf(hf, tmp_path / "x.gguf", leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(CheckpointError, match=r"missing model.layers.1.mlp.up_proj.weight"):
        load_model(resolve(str(file)), Plain(), "float32")
    file = write_gguf(hf, tmp_path / "y.gguf", leave_out=("token_embd.weight",))
    with pytest.raises(CheckpointError, match=r"holds no token_embd\.weight"):
        model_config(resolve(str(file)))
    file = write_gguf(hf, tmp_path / "z.gguf", metadata={"llama.block_count": 1})
    with pytest.raises(CheckpointError, match=r"not known to this model model.layers.1"):
        load_model(resolve(str(file)), Plain(), "float32")
    file = write_gguf(hf, tmp_path / "w.gguf", metadata={"llama.feed_forward_length": 128})
    with pytest.raises(CheckpointError, match="metadata asks for"):
        load_model(resolve(str(file)), Plain(), "float32")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "MXFP4"])
def test_a_length_that_no_block_divides_is_an_error(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "llama", **WIDE)
    wrong = {"llama.feed_forward_length": 504}
    file = write_gguf(folder, tmp_path / "x.gguf", kind, metadata=wrong)
    with pytest.raises(CheckpointError, match="504"):
        load_model(resolve(str(file)), Plain(), "float32")


def test_types_that_cannot_be_read_are_refused_by_name(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What people own needs no package; what it reads is refused without it, with the command."""
    rare = resolve(str(write_gguf(hf, tmp_path / "rare.gguf", "MXFP4")))
    usual = resolve(str(write_gguf(hf, tmp_path / "usual.gguf", "Q8_0")))
    load_model(rare, Plain(), "float32")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "gguf", None)
        with pytest.raises(UnsupportedModel, match=r"MXFP4.*pip install 'penstock\[gguf\]'"):
            load_model(rare, Plain(), "float32")
        load_model(usual, Plain(), "float32")
    monkeypatch.setattr(gguf.quants, "_type_traits", {})
    with pytest.raises(UnsupportedModel, match="MXFP4, which cannot be read here"):
        load_model(rare, Plain(), "float32")


# --- the whole ---


def test_digests_tell_files_apart_and_know_copies(whole: Path, tmp_path: Path) -> None:
    original = checkpoint_digest(resolve(str(whole)))
    copy = tmp_path / whole.name
    shutil.copy(whole, copy)
    assert checkpoint_digest(resolve(str(copy))) == original
    data = bytearray(whole.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert checkpoint_digest(resolve(str(copy))) != original


def test_llm_from_a_file_of_mixed_types(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "qwen3", **WIDE, head_dim=64)
    file = write_gguf(folder, tmp_path / "model.gguf", q4_k_m)
    with LLM(str(file), num_blocks=64, max_num_seqs=2) as llm:
        first = llm.generate(["Water runs"], SamplingParams(max_tokens=12, temperature=0.0))
        again = llm.generate(["Water runs"], SamplingParams(max_tokens=12, temperature=0.0))
    assert first[0].outputs[0].token_ids == again[0].outputs[0].token_ids
    assert len(first[0].outputs[0].token_ids) > 0


def test_doctor_says_what_is_in_a_file(whole: Path) -> None:
    serve = ServeConfig(model=str(whole), served_model_names=("m",), port=0)
    findings, facts = examine(EngineConfig(model=str(whole)), serve)
    texts = [finding.text for finding in findings]
    assert not [finding for finding in findings if finding.level == "error"], texts
    assert facts["path"] == str(whole)
    assert any("Q8_0" in text for text in texts), texts


def test_doctor_names_a_damaged_file_once(whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(whole.read_bytes()[:1000])
    serve = ServeConfig(model=str(file), served_model_names=("m",), port=0)
    findings, _ = examine(EngineConfig(model=str(file)), serve)
    errors = [finding.text for finding in findings if finding.level == "error"]
    assert len(errors) == 1 and "truncated or damaged" in errors[0]


def test_load_formats_of_a_gguf_file(whole: Path) -> None:
    """Random weights need only what it says of itself; safetensors it has none."""
    model, _ = load_model(resolve(str(whole)), Plain(), "float32", load_format="dummy")
    assert model is not None
    with pytest.raises(ConfigError, match=r"--load-format safetensors does not go with .*model\.g"):
        load_model(resolve(str(whole)), Plain(), "float32", load_format="safetensors")
    serve = ServeConfig(model=str(whole), served_model_names=("m",), port=0)
    findings, _ = examine(EngineConfig(model=str(whole), load_format="safetensors"), serve)
    errors = [finding.text for finding in findings if finding.level == "error"]
    assert len(errors) == 1 and "--load-format safetensors" in errors[0]
    findings, _ = examine(EngineConfig(model=str(whole), load_format="dummy"), serve)
    assert not [finding for finding in findings if finding.level == "error"]


def test_rows_of_llama_are_in_hugging_face_order_again(hf: Path, tmp_path: Path) -> None:
    file = write_gguf(hf, tmp_path / "x.gguf", "F32")
    expected = load_file(hf / "model.safetensors")
    with CheckpointTensors(resolve(str(file))) as tensors:
        for name, values in expected.items():
            out = torch.empty_like(values)
            tensors.read_into(name, out)
            assert torch.equal(out, values), name
