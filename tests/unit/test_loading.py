"""Weights from disk to their places, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.checkpoints import FAMILIES, make_checkpoint

from penstock.checkpoint import Checkpoint
from penstock.engine.layers.rotary import inverse_frequencies
from penstock.engine.loading import digest
from penstock.engine.loading.digest import checkpoint_digest, model_digest
from penstock.engine.loading.loader import choose_dtype, load_model, weights_bytes
from penstock.engine.loading.safetensors_file import SafetensorsFile
from penstock.engine.loading.tensors import INDEX, SINGLE, STAGING_BYTES, CheckpointTensors
from penstock.engine.models.config import ModelConfig
from penstock.engine.models.registry import supported_architectures
from penstock.engine.platforms.base import Platform
from penstock.protocol.errors import (
    CheckpointError,
    ConfigError,
    NotEnoughMemory,
    UnsupportedModel,
)


class Plain(Platform):
    """The defaults of `Platform`, and a machine of a given size."""

    def __init__(self, free_bytes: int = 1 << 40) -> None:
        super().__init__("cpu")
        self.free_bytes = free_bytes

    def available_bytes(self) -> int:
        return self.free_bytes


def load(folder: Path, dtype: str = "float32", **settings: Any) -> tuple[Any, ModelConfig]:
    return load_model(Checkpoint(folder), Plain(), dtype, **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), "qwen2", seed=3)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    return make_checkpoint(folder, "qwen2", seed=3, max_shard_size="120KB")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture
def sharded_copy(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "sharded"))


def set_config(folder: Path, **changes: Any) -> None:
    """`...` removes a field."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(folder / SINGLE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / SINGLE)


def refusal(kind: type[Exception], folder: Path, **settings: Any) -> str:
    """The message, which must be one line."""
    with pytest.raises(kind) as caught:
        load(folder, **settings)
    message = str(caught.value)
    assert "\n" not in message and message
    return message


def logits(model: Any) -> torch.Tensor:
    """Of the embedding through the head: enough to tell weights apart without attention."""
    with torch.inference_mode():
        return model.logits(torch.eye(4, model.config.hidden_size, dtype=model.dtype))


class Capture(Platform):
    """Keeps what it is given to pack."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.packed: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self.tied: list[torch.Tensor] = []

    def available_bytes(self) -> int:
        return 1 << 40

    def make_linear(
        self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, **settings: Any
    ) -> Any:
        self.packed.append((weight_NK, bias_N))
        return super().make_linear(weight_NK, bias_N, **settings)

    def make_tied_embedding(self, weight_VE: torch.Tensor) -> Any:
        self.tied.append(weight_VE)
        return super().make_tied_embedding(weight_VE)


_MEASURE = """
import sys
from pathlib import Path

import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.checkpoint import Checkpoint
from penstock.engine.loading.loader import load_model, weights_bytes
from penstock.engine.platforms.base import Platform


class Plain(Platform):
    def available_bytes(self):
        return 1 << 40


def kibibytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


big, small, dtype = sys.argv[1:]
load_model(Checkpoint(Path(small)), Plain(), dtype)  # what a first use of torch costs
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = kibibytes("VmRSS:")
model, config = load_model(Checkpoint(Path(big)), Plain(), dtype)
print(weights_bytes(config), (kibibytes("VmHWM:") - before) * 1024)
"""


class TestIntoPlace:
    def test_fused_linears_are_their_parts_in_order(self, made: Path) -> None:
        platform = Capture()
        load_model(Checkpoint(made), platform, "float32")
        tensors = safetensors.torch.load_file(made / SINGLE)
        qkv, bias = platform.packed[4]  # layer 1: four linears a layer
        names = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
        assert torch.equal(qkv, torch.cat([tensors[f"{name}.weight"] for name in names]))
        assert bias is not None
        assert torch.equal(bias, torch.cat([tensors[f"{name}.bias"] for name in names]))
        gate_up, none = platform.packed[6]
        names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")]
        assert torch.equal(gate_up, torch.cat([tensors[name] for name in names]))
        assert none is None

    def test_shards_make_the_same_model(self, made: Path, sharded: Path) -> None:
        assert len(list(sharded.glob("*.safetensors"))) > 2
        one, many = Capture(), Capture()
        load_model(Checkpoint(made), one, "float32")
        load_model(Checkpoint(sharded), many, "float32")
        for (a, _), (b, _) in zip(one.packed, many.packed, strict=True):
            assert torch.equal(a, b)

    def test_shards_without_an_index(self, made: Path, sharded_copy: Path) -> None:
        (sharded_copy / INDEX).unlink()
        assert torch.equal(logits(load(sharded_copy)[0]), logits(load(made)[0]))

    @pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
    def test_dtype_changes_on_the_way(
        self, tmp_path: Path, source: torch.dtype, target: str
    ) -> None:
        folder = make_checkpoint(tmp_path, "llama", dtype=source)
        platform = Capture()
        model, config = load_model(Checkpoint(folder), platform, target)
        stored = safetensors.torch.load_file(folder / SINGLE)["lm_head.weight"]
        assert stored.dtype == source and config.dtype == target
        assert model.dtype == getattr(torch, target)
        assert torch.equal(platform.packed[-1][0], stored.to(model.dtype))

    def test_staging_in_several_pieces(self, tmp_path: Path) -> None:
        stored = torch.randn(321, 1000, dtype=torch.float64)
        staging = torch.empty(1 << 20, dtype=torch.uint8)  # 2.4 times
        safetensors.torch.save_file({"x": stored}, tmp_path / "x.safetensors")
        file, out = SafetensorsFile(tmp_path / "x.safetensors"), torch.empty(321, 1000)
        file.read_into("x", out, staging)
        file.close()
        assert torch.equal(out, stored.float())

    def test_tied_embeddings_are_held_once(self, tmp_path: Path) -> None:
        tied = make_checkpoint(tmp_path / "tied", "qwen3", tie_word_embeddings=True)
        untied = make_checkpoint(tmp_path / "untied", "qwen3")
        platform = Capture()
        _, config = load_model(Checkpoint(tied), platform, "float32")
        assert [weight.shape for weight in platform.tied] == [(384, 64)]
        assert all(weight.shape[0] != 384 for weight, _ in platform.packed)
        other = ModelConfig.from_checkpoint(Checkpoint(untied))
        assert weights_bytes(other) - weights_bytes(config) == 384 * 64 * 4

    def test_each_byte_is_read_once_and_progress_ends_at_one(self, sharded: Path) -> None:
        seen: list[float] = []
        load(sharded, progress=seen.append)
        assert seen == sorted(seen) and seen[-1] == 1.0
        names = {
            name
            for file in sharded.glob("*.safetensors")
            for name in safetensors.torch.load_file(file)
        }
        assert len(seen) == len(names)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_no_second_copy(self, made: Path, tmp_path: Path, dtype: str) -> None:
        """The process's peak of memory, by the kernel's count, around a load that keeps 47 MB (or
        half of it): the weights, and a staging buffer."""
        folder = make_checkpoint(
            tmp_path, "llama", num_hidden_layers=12, hidden_size=256, intermediate_size=1024
        )
        found = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(folder), str(made), dtype],
            env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        weights, grown = (int(word) for word in found.stdout.split())
        assert weights > 20e6
        assert grown < weights + STAGING_BYTES + (4 << 20)

    def test_files_are_closed(self, sharded: Path) -> None:
        with CheckpointTensors(Checkpoint(sharded)) as tensors:
            files = tensors.files
        assert all(file._fd == -1 for file in files)


class TestSizes:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_weights_bytes_is_what_the_file_holds(self, tmp_path: Path, family: str) -> None:
        folder = make_checkpoint(tmp_path, family)
        config = ModelConfig.from_checkpoint(Checkpoint(folder))
        stored = sum(t.nbytes for t in safetensors.torch.load_file(folder / SINGLE).values())
        assert weights_bytes(config) == stored
        assert weights_bytes(config, "bfloat16") == stored // 2

    def test_too_little_memory_is_refused_before_reading(self, made: Path) -> None:
        config = ModelConfig.from_checkpoint(Checkpoint(made))
        platform = Plain(free_bytes=weights_bytes(config) - 1)
        read: list[float] = []
        with pytest.raises(NotEnoughMemory, match="GiB are free"):
            load_model(Checkpoint(made), platform, "float32", progress=read.append)
        assert not read
        load_model(Checkpoint(made), platform, "bfloat16")

    def test_max_model_len(self, made: Path) -> None:
        assert load(made)[1].max_model_len == 512
        assert load(made, max_model_len=100)[1].max_model_len == 100
        with pytest.raises(ConfigError, match="from 1 to 512"):
            load(made, max_model_len=513)

    def test_dtype_auto(self, tmp_path: Path) -> None:
        def chosen(stored: torch.dtype) -> str:
            folder = make_checkpoint(tmp_path / str(stored), "llama", dtype=stored)
            config = ModelConfig.from_checkpoint(Checkpoint(folder))
            return choose_dtype(config, Plain(), "auto")

        assert chosen(torch.bfloat16) == "bfloat16"
        assert chosen(torch.float32) == "bfloat16"  # the platform's default

    def test_unknown_dtype(self, made: Path) -> None:
        with pytest.raises(ConfigError, match="'int3' is none of auto, float32"):
            load(made, dtype="int3")

    def test_unknown_load_format(self, made: Path) -> None:
        with pytest.raises(ConfigError, match="'npcache' is none of auto"):
            load(made, load_format="npcache")


class TestDummy:
    def test_needs_no_weights_and_follows_the_seed(self, copy: Path) -> None:
        (copy / SINGLE).unlink()
        first = logits(load(copy, load_format="dummy", seed=1)[0])
        assert torch.equal(first, logits(load(copy, load_format="dummy", seed=1)[0]))
        assert not torch.equal(first, logits(load(copy, load_format="dummy", seed=2)[0]))
        assert first.std() > 0


class TestDigest:
    def test_stable_and_sensitive(self, made: Path, copy: Path, sharded: Path) -> None:
        original = checkpoint_digest(Checkpoint(made))
        assert len(original) == 64
        assert checkpoint_digest(Checkpoint(copy)) == original
        assert checkpoint_digest(Checkpoint(sharded)) != original
        set_config(copy, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
        changed = checkpoint_digest(Checkpoint(copy))
        assert changed != original
        rewrite(copy, lambda tensors: tensors["model.layers.1.self_attn.k_proj.bias"][:1].add_(1))
        assert checkpoint_digest(Checkpoint(copy)) != changed

    def test_dummy(self, copy: Path) -> None:
        (copy / SINGLE).unlink()
        one = checkpoint_digest(Checkpoint(copy), load_format="dummy", seed=1)
        assert one != checkpoint_digest(Checkpoint(copy), load_format="dummy", seed=2)

    def test_a_few_rows_of_an_embedding_count(self, made: Path, copy: Path) -> None:
        original = checkpoint_digest(Checkpoint(copy))
        for row in (-1, 0, 77):
            rewrite(copy, lambda t: t["model.embed_tokens.weight"][row, -2:].add_(1))  # noqa: B023
            changed = checkpoint_digest(Checkpoint(copy))
            assert changed != original
            original = changed

    def test_what_is_remembered_is_of_the_file_as_it_is(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(digest, "_SETTLED_NS", 0)
        asked: list[Path] = []
        hash_file = digest.file_digest
        monkeypatch.setattr(
            digest, "file_digest", lambda path, stop: asked.append(path) or hash_file(path, stop)
        )
        original = checkpoint_digest(Checkpoint(copy))
        assert checkpoint_digest(Checkpoint(copy)) == original and len(asked) == 1
        weights = copy / SINGLE
        times = weights.stat()
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        with weights.open("r+b") as file:  # the same inode and size, and then the same mtime
            file.write(content)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert checkpoint_digest(Checkpoint(copy)) != original
        for kept in (tmp_path / "cache").rglob("digests/*"):
            kept.write_bytes(b"spoilt" * 8)
        changed = checkpoint_digest(Checkpoint(copy))
        assert changed != original and len(asked) == 3

    def test_files_of_several_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(digest, "PIECE_BYTES", 1000)
        monkeypatch.setattr(digest, "_READ_BYTES", 300)
        file = tmp_path / "weights"
        data = os.urandom(3500)
        file.write_bytes(data)
        found = {digest.file_digest(file)}
        pieces = [xxhash.xxh3_128_digest(data[at : at + 1000]) for at in range(0, 3500, 1000)]
        assert found == {xxhash.xxh3_128_digest((3500).to_bytes(8, "little") + b"".join(pieces))}
        for at in (0, 999, 1000, 3499):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            found.add(digest.file_digest(file))
        file.write_bytes(data[1000:2000] + data[:1000] + data[2000:])
        found.add(digest.file_digest(file))
        assert len(found) == 6

    def test_what_decides_the_kv_counts_and_nothing_else(self, made: Path, copy: Path) -> None:
        def named(folder: Path, dtype: str, max_model_len: int) -> str:
            config = replace(
                ModelConfig.from_checkpoint(Checkpoint(folder), max_model_len=max_model_len),
                dtype=dtype,
            )
            return model_digest(checkpoint_digest(Checkpoint(folder)), config)

        assert named(made, "float32", 20) == named(made, "float32", 40)
        assert named(made, "float32", 20) != named(made, "bfloat16", 20)
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        set_config(copy, rope_parameters=rope, max_position_embeddings=64)
        assert named(copy, "float32", 20) == named(copy, "float32", 64)  # neither is stretched
        assert len({named(copy, "float32", n) for n in (64, 100, 200)}) == 3

    def test_a_load_that_fails_does_not_wait_for_the_digest(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
        stopped: list[bool] = []
        monkeypatch.setattr(
            digest, "file_digest", lambda path, stop: stopped.append(stop.wait(30)) or b""
        )
        how = {"load_format": "auto", "seed": 0, "quantization": "auto"}
        with pytest.raises(ZeroDivisionError), digest.computed_beside(Checkpoint(copy), **how):
            raise ZeroDivisionError
        assert stopped == [True]

    def test_broken_files(self, copy: Path) -> None:
        (copy / SINGLE).write_bytes(b"")
        with pytest.raises(CheckpointError):
            checkpoint_digest(Checkpoint(copy))


class TestWrongTensors:
    def test_missing(self, copy: Path) -> None:
        rewrite(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        assert "missing model.layers.1.mlp.up_proj.weight" in refusal(CheckpointError, copy)

    def test_extra(self, copy: Path) -> None:
        rewrite(copy, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 64)}))
        assert "not known to this model score.weight" in refusal(CheckpointError, copy)

    def test_misshapen(self, copy: Path) -> None:
        rewrite(copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}))
        message = refusal(CheckpointError, copy)
        assert "model.norm.weight has shape [63], config.json asks for [64]" in message

    @pytest.mark.parametrize("other", [f for f in FAMILIES if f not in ("qwen2", "mistral")])
    def test_another_familys_config(self, copy: Path, tmp_path: Path, other: str) -> None:
        config = make_checkpoint(tmp_path / other, other) / "config.json"
        shutil.copy(config, copy / "config.json")
        assert "another model's config.json?" in refusal(CheckpointError, copy)

    def test_many_names_are_counted_not_listed(self, copy: Path) -> None:
        set_config(copy, num_hidden_layers=40)
        assert len(refusal(CheckpointError, copy)) < 500

    def test_tolerated(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
        rewrite(
            folder,
            lambda tensors: tensors.update(
                {
                    "lm_head.weight": torch.zeros(384, 64),
                    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
                }
            ),
        )
        load(folder)

    def test_integer_tensors(self, copy: Path) -> None:
        rewrite(
            copy,
            lambda tensors: tensors.update(
                {"lm_head.weight": torch.zeros(384, 64, dtype=torch.int8)}
            ),
        )
        assert "lm_head.weight is I8, so this model is quantized" in refusal(CheckpointError, copy)


class TestBrokenFiles:
    @pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, -1])
    def test_truncated(self, copy: Path, keep: int) -> None:
        whole = (copy / SINGLE).read_bytes()
        (copy / SINGLE).write_bytes(whole[:keep])
        message = refusal(CheckpointError, copy)
        assert "is truncated" in message or "is not a safetensors file" in message
        assert SINGLE in message

    def test_longer_than_its_header_says(self, copy: Path) -> None:
        with (copy / SINGLE).open("ab") as file:
            file.write(b"more")
        assert "is damaged" in refusal(CheckpointError, copy)

    @pytest.mark.parametrize(
        "header",
        [
            b"[]",
            b"{garbage",
            b"\xff\xfe{}",
            b'{"a": 1}',
            b'{"a": {"dtype": "F32", "shape": [2]}}',
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
            b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
            b"[" * 100_000,
        ],
    )
    def test_garbage_headers(self, copy: Path, header: bytes) -> None:
        (copy / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        assert "is not a safetensors file" in refusal(CheckpointError, copy)

    def test_garbage(self, copy: Path) -> None:
        (copy / SINGLE).write_bytes(bytes(range(256)) * 40)
        assert "is not a safetensors file" in refusal(CheckpointError, copy)

    def test_a_git_lfs_pointer(self, copy: Path) -> None:
        (copy / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
        assert "is not a safetensors file" in refusal(CheckpointError, copy)

    def test_absent_shard(self, sharded_copy: Path) -> None:
        shard = sorted(sharded_copy.glob("*.safetensors"))[1]
        shard.unlink()
        message = refusal(CheckpointError, sharded_copy)
        assert shard.name in message and "is the download complete?" in message

    def test_index_names_what_a_shard_lacks(self, sharded_copy: Path) -> None:
        index = json.loads((sharded_copy / INDEX).read_text())
        index["weight_map"]["model.norm.bias"] = sorted(index["weight_map"].values())[0]
        (sharded_copy / INDEX).write_text(json.dumps(index))
        assert "lacks model.norm.bias" in refusal(CheckpointError, sharded_copy)

    @pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3, "model.bin"])
    def test_index_leads_elsewhere(self, sharded_copy: Path, file: object) -> None:
        index = {"weight_map": {"model.norm.weight": file}}
        (sharded_copy / INDEX).write_text(json.dumps(index))
        assert "is no file of this folder" in refusal(CheckpointError, sharded_copy)

    @pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "[]", "not json"])
    def test_broken_index(self, sharded_copy: Path, text: str) -> None:
        (sharded_copy / INDEX).write_text(text)
        refusal(CheckpointError, sharded_copy)

    def test_two_files_hold_one_name(self, copy: Path) -> None:
        shutil.copy(copy / SINGLE, copy / "b.safetensors")
        (copy / SINGLE).rename(copy / "a.safetensors")
        assert "both hold" in refusal(CheckpointError, copy)

    def test_only_bin(self, copy: Path) -> None:
        (copy / SINGLE).rename(copy / "pytorch_model.bin")
        message = refusal(CheckpointError, copy)
        assert "pytorch_model.bin" in message and "safetensors" in message

    def test_no_weights(self, copy: Path) -> None:
        (copy / SINGLE).unlink()
        assert "holds no weights" in refusal(CheckpointError, copy)

    def test_empty_folder(self, tmp_path: Path) -> None:
        assert "config.json is missing" in refusal(CheckpointError, tmp_path)


CONFIG_FIELDS = """
    architectures hidden_size num_attention_heads num_key_value_heads head_dim vocab_size
    num_hidden_layers intermediate_size rms_norm_eps rope_parameters rope_scaling dtype torch_dtype
    layer_types sliding_window use_sliding_window max_window_layers tie_word_embeddings
    eos_token_id max_position_embeddings hidden_act quantization_config
    original_max_position_embeddings
""".split()  # noqa: SIM905
ROPE_FIELDS = """
    type rope_type rope_theta factor low_freq_factor high_freq_factor beta_fast beta_slow
    original_max_position_embeddings attention_factor mscale mscale_all_dim truncate
    partial_rotary_factor
""".split()  # noqa: SIM905
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 600)
    | st.integers()
    | st.floats()
    | st.sampled_from(["silu", "bfloat16", ""])
)
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"])},
    optional={name: SCALARS for name in ROPE_FIELDS if name != "rope_type"},
)
ANY_JSON = SCALARS | ROPES | st.lists(SCALARS, max_size=3)


class TestConfig:
    """What config.json may hold."""

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"hidden_size": ...}, "hidden_size is missing"),
            ({"hidden_size": "big"}, "hidden_size is 'big', expected an integer"),
            ({"hidden_size": True}, "expected an integer"),
            ({"hidden_size": 64.5}, "expected an integer"),
            ({"hidden_size": float("nan")}, "expected an integer"),
            ({"hidden_size": 66}, "no multiple of num_attention_heads"),
            ({"vocab_size": 0}, "expected an integer from 1"),
            ({"vocab_size": 10**12}, "expected an integer from 1"),
            ({"num_hidden_layers": -1}, "expected an integer from 1"),
            ({"num_attention_heads": 0}, "expected an integer from 1"),
            ({"num_attention_heads": 128}, "expected an integer from 1"),
            ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
            ({"num_key_value_heads": ...}, "num_key_value_heads is missing"),
            ({"head_dim": 15}, "expected an even number"),
            ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a number"),
            ({"rms_norm_eps": -1}, "expected a number above 0"),
            ({"rms_norm_eps": float("inf")}, "expected a number above 0"),
            ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
            ({"tie_word_embeddings": "no"}, "expected true or false"),
            ({"rope_parameters": [1]}, "expected an object"),
            ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
            ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "a number from 1"),
            ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "number above 1"),
            ({"rope_parameters": {"rope_type": 3}}, "expected a string"),
            ({"rope_parameters": {"rope_theta": 10**400}}, "expected a number"),
            ({"layer_types": ["full_attention"]}, "expected 2, one a layer"),
            ({"layer_types": "full"}, "expected a list of strings"),
            ({"architectures": []}, "names no architectures"),
            ({"architectures": "Qwen2ForCausalLM"}, "expected a list of strings"),
        ],
    )
    def test_wrong(self, copy: Path, changes: dict[str, Any], expected: str) -> None:
        set_config(copy, **changes)
        message = refusal(CheckpointError, copy)
        assert expected in message and "config.json" in message

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
            ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
            ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
            ({"hidden_act": "gelu"}, "gelu"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
            ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
            ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
            ({"rope_parameters": None, "rope_scaling": {"type": "mrope"}}, "mrope"),
            ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set per layer"),
            ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
            ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
            ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ],
    )
    def test_unsupported_is_named(self, copy: Path, changes: dict[str, Any], name: str) -> None:
        set_config(copy, **changes)
        assert name in refusal(UnsupportedModel, copy)

    def test_unknown_architecture_lists_what_is_supported(self, copy: Path) -> None:
        set_config(copy, architectures=["MambaForCausalLM"])
        message = refusal(UnsupportedModel, copy)
        assert all(name in message for name in supported_architectures())

    @pytest.mark.parametrize("eos", [-1, 384, "x", [1, 999], [[1]]])
    def test_eos_out_of_range(self, copy: Path, eos: object) -> None:
        (copy / "generation_config.json").unlink()
        set_config(copy, eos_token_id=eos)
        assert "eos_token_id" in refusal(CheckpointError, copy)

    def test_context_of_stretched_embeddings(self, copy: Path) -> None:
        def lengths(rope: dict[str, Any]) -> tuple[int, int]:
            set_config(copy, rope_parameters=rope)
            config = ModelConfig.from_checkpoint(Checkpoint(copy))
            return config.max_model_len, config.rope_max_tokens

        assert lengths({"rope_type": "default"}) == (512, 512)
        assert lengths({"rope_type": "linear", "factor": 2.0}) == (1024, 1024)
        assert lengths({"rope_type": "dynamic", "factor": 2.0}) == (512, 1024)
        assert lengths(
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
        ) == (2048, 2048)

    def test_a_window_as_long_as_the_context_is_none(self, copy: Path) -> None:
        window = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}
        set_config(copy, layer_types=..., **window)
        checkpoint = Checkpoint(copy)
        assert ModelConfig.from_checkpoint(checkpoint).windows == (None, 100)
        assert ModelConfig.from_checkpoint(checkpoint, max_model_len=100).windows == (None, None)

    def test_mistral_window(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "mistral", max_position_embeddings=9000)
        assert ModelConfig.from_checkpoint(Checkpoint(folder)).windows == (None, None)
        set_config(folder, sliding_window=...)  # absent is transformers' default, null is none
        assert ModelConfig.from_checkpoint(Checkpoint(folder)).windows == (4096, 4096)

    @given(name=st.sampled_from(CONFIG_FIELDS), value=ANY_JSON)
    @settings(max_examples=400, deadline=None)
    def test_no_value_ends_in_a_traceback(self, made: Path, name: str, value: Any) -> None:
        """Read or refused in one line; and what was read can be declared and rotated."""
        checkpoint = Checkpoint(made)
        checkpoint.config = json.loads(json.dumps(checkpoint.config | {name: value}))
        checkpoint.generation_config = {}
        try:
            config = ModelConfig.from_checkpoint(checkpoint)
        except (CheckpointError, ConfigError) as exc:
            assert "\n" not in str(exc)
            return
        if config.num_layers < 10:
            assert weights_bytes(config) > 0
        frequencies = inverse_frequencies(config.rope, config.head_dim, config.max_model_len)
        assert frequencies.isfinite().all()
