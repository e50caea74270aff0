"""Which quantized checkpoints are read, and what becomes of those that are wrong: always one line
that names what, never a traceback."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.quantized_checkpoints import WRITERS, FormatWriter

from penstock.checkpoint import Checkpoint
from penstock.engine.loading.digest import checkpoint_digest
from penstock.engine.loading.loader import load_model
from penstock.engine.platforms.base import Linear, Platform
from penstock.engine.quantization.formats.packing import unpack, unpack_down
from penstock.engine.quantization.formats.targets import Targets
from penstock.engine.quantization.select import METHODS, quantization_of, stored_format
from penstock.engine.quantization.weight import QuantizedWeight
from penstock.protocol.errors import CheckpointError, ConfigError, UnsupportedModel

FILE = "model.safetensors"
#: One of each way of being stored.
KINDS = ("awq-32", "gptq-4-act-order", "ct-packed-4-asym", "ct-int8-channel", "fp8-blocks")


class Keeps(Platform):
    """Keeps what stays in few bits, and what does not."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.few_bits: list[QuantizedWeight] = []
        self.floats: list[torch.Tensor] = []

    def available_bytes(self) -> int:
        return 1 << 40

    def make_quantized_linear(
        self, weight: QuantizedWeight, bias_N: torch.Tensor | None, dtype: torch.dtype
    ) -> Linear:
        self.few_bits.append(weight)
        return super().make_quantized_linear(weight, bias_N, dtype)

    def make_linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> Linear:
        self.floats.append(weight_NK)
        return super().make_linear(weight_NK, bias_N)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain"), "llama", seed=9, num_hidden_layers=1)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            folder = tmp_path_factory.mktemp("made") / kind
            folders[kind] = WRITERS[kind].write(source, folder)
        return folders[kind]

    return make


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(made(kind), tmp_path / "copy"))


def load(folder: Path, quantization: str = "auto") -> Keeps:
    platform = Keeps()
    load_model(Checkpoint(folder), platform, "float32", quantization=quantization)
    return platform


def refusal(kind: type[Exception], folder: Path, quantization: str = "auto") -> str:
    with pytest.raises(kind) as caught:
        load(folder, quantization)
    message = str(caught.value)
    assert "\n" not in message and message
    return message


def set_quantization(folder: Path, **changes: Any) -> None:
    """Into quantization_config; `...` removes a field."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    found = config.get("quantization_config", {}) | changes
    config["quantization_config"] = {k: v for k, v in found.items() if v is not ...}
    file.write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / FILE)
    change(tensors)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / FILE)


class TestWhatBecomesOfThem:
    @pytest.mark.parametrize("kind", WRITERS)
    def test_in_few_bits_unless_fp8(self, made: Callable[[str], Path], kind: str) -> None:
        platform = load(made(kind))
        floats = "fp8" in kind or "float" in kind
        assert len(platform.few_bits) == (0 if floats else 4)  # qkv, o, gate and up, down
        for weight in platform.few_bits:
            assert weight.bits == (8 if "8" in kind.split("-", 1)[1] else 4)
            assert (weight.offsets_NG is not None) == ("asym" in kind or "awq" in kind)
            assert (weight.input_order_K is not None) == ("act-order" in kind)

    @pytest.mark.parametrize("kind", ["awq-32", "ct-int8-channel", "fp8-blocks"])
    def test_none_dequantizes(self, made: Callable[[str], Path], kind: str) -> None:
        exact = [weight.dequantize() for weight in load(made(kind)).few_bits]
        platform = load(made(kind), "none")
        assert not platform.few_bits
        for found, expected in zip(platform.floats, exact):
            assert torch.allclose(found, expected)

    @pytest.mark.parametrize("kind", ["awq-32", "fp8-blocks"])
    def test_int8_of_what_is_quantized(self, made: Callable[[str], Path], kind: str) -> None:
        exact = load(made(kind), "none").floats
        found = load(made(kind), "int8").few_bits
        assert len(found) == len(exact) == 5  # the output head too
        for weight, expected in zip(found, exact):
            assert weight.bits == 8 and weight.per_channel
            wrong = (weight.dequantize() - expected).norm() / expected.norm()
            assert wrong < 0.02

    def test_the_name_may_be_said(self, made: Callable[[str], Path]) -> None:
        for wanted in ("awq", "awq_marlin"):
            assert load(made("awq-32"), wanted).few_bits
        message = refusal(ConfigError, made("awq-32"), "gptq")
        assert "--quantization gptq does not fit" in message and "quantized by awq" in message

    def test_wishes_of_a_plain_checkpoint(self, source: Path) -> None:
        assert "which is not quantized" in refusal(ConfigError, source, "fp8")
        assert "'int3' is none of auto, none, int8" in refusal(ConfigError, source, "int3")
        assert not load(source, "none").few_bits

    def test_digests_differ_by_what_is_computed(
        self, source: Path, made: Callable[[str], Path]
    ) -> None:
        for folder in (source, made("awq-32")):
            digests = {
                wanted: checkpoint_digest(Checkpoint(folder), quantization=wanted)
                for wanted in ("auto", "none", "int8", "int4")
            }
            same = folder == source  # "none" changes nothing there
            assert len(set(digests.values())) == (3 if same else 4)
            assert (digests["auto"] == digests["none"]) == same

    def test_kv_scales_are_left_out(self, copied: Callable[[str], Path]) -> None:
        folder = copied("fp8-blocks")
        set_quantization(folder, activation_scheme="static")
        extra = {
            "model.layers.0.self_attn.k_scale": torch.tensor(1.0),
            "model.layers.0.mlp.up_proj.input_scale": torch.tensor(1.0),
        }
        rewrite(folder, lambda tensors: tensors.update(extra))
        load(folder)
        assert stored_format(Checkpoint(folder)).remarks()

    def test_biases_of_autogptq(self, copied: Callable[[str], Path]) -> None:
        folder, name = copied("gptq-4-act-order"), "model.layers.0.mlp.up_proj.bias"
        rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(96)}))
        load(folder)
        rewrite(folder, lambda tensors: tensors[name][5:6].add_(1e-3))
        assert f"{name} is not zero" in refusal(CheckpointError, folder)


class TestRefused:
    @pytest.mark.parametrize(
        "method",
        [
            "bitsandbytes", "hqq", "aqlm", "marlin", "quark", "mxfp4", "nvfp4", "torchao", "eetq",
            "fbgemm_fp8", "quanto", "vptq", "modelopt", "auto-round", "bitnet", "spqr", "higgs", "",
        ],
    )  # fmt: skip
    def test_methods_by_their_names(self, source: Path, tmp_path: Path, method: str) -> None:
        folder = Path(shutil.copytree(source, tmp_path / "copy"))
        set_quantization(folder, quant_method=method)
        message = refusal(UnsupportedModel, folder)
        assert (method or "no quant_method") in message and "awq, gptq" in message

    def test_bitsandbytes_without_a_method(self, source: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(source, tmp_path / "copy"))
        set_quantization(folder, load_in_4bit=True)
        assert "bitsandbytes" in refusal(UnsupportedModel, folder)

    @pytest.mark.parametrize(
        ("kind", "changes", "named"),
        [
            ("awq-32", {"bits": 3}, "bits = 3"),
            ("awq-32", {"version": "gemv"}, "'gemv'"),
            ("awq-32", {"zero_point": False}, "zero_point"),
            ("gptq-4-sym", {"bits": 2}, "bits = 2"),
            ("gptq-4-sym", {"checkpoint_format": "marlin"}, "'marlin'"),
            ("gptq-4-sym", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
            ("fp8-blocks", {"fmt": "e5m2"}, "'e5m2'"),
            ("ct-int8-channel", {"format": "marlin-24"}, "'marlin-24'"),
            ("ct-int8-channel", {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
            ("ct-int8-channel", {"quantization_status": "frozen"}, "'frozen'"),
            ("ct-int8-channel", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
            ("ct-int8-channel", {"config_groups": {"W8A8": ["Linear"]}}, "W8A8"),
            (
                "ct-int8-channel",
                {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
                "transform_config",
            ),
        ],
    )
    def test_variants_by_their_names(
        self, copied: Callable[[str], Path], kind: str, changes: dict[str, Any], named: str
    ) -> None:
        folder = copied(kind)
        set_quantization(folder, **changes)
        assert named in refusal(UnsupportedModel, folder)

    @pytest.mark.parametrize(
        ("weights", "named"),
        [
            ({"num_bits": 3}, "num_bits = 3"),
            ({"type": "float", "num_bits": 4}, "float, 4 bits"),
            ({"strategy": "tensor_group", "group_size": 16}, "tensor_group"),
        ],
    )
    def test_schemes_of_compressed_tensors(
        self, copied: Callable[[str], Path], weights: dict[str, Any], named: str
    ) -> None:
        folder = copied("ct-int8-channel")
        config = copy.deepcopy(WRITERS["ct-int8-channel"].config)
        config["config_groups"]["group_0"]["weights"] |= weights
        set_quantization(folder, **config)
        assert named in refusal(UnsupportedModel, folder)


class TestWrong:
    @pytest.mark.parametrize("kind", KINDS)
    def test_missing_and_extra(self, copied: Callable[[str], Path], kind: str) -> None:
        """Each tensor of a module in turn."""
        folder, module = copied(kind), "model.layers.0.mlp.down_proj."
        stored = safetensors.torch.load_file(folder / FILE)
        names = [name for name in stored if name.startswith(module)]
        assert len(names) >= 2
        for name in names:
            if name.endswith("g_idx"):  # then the groups are in order
                continue
            rest = {k: v for k, v in stored.items() if k != name}
            safetensors.torch.save_file(rest, folder / FILE)
            assert f"missing {name}" in refusal(CheckpointError, folder)
        more = stored | {f"{module}odd": torch.zeros(1)}
        safetensors.torch.save_file(more, folder / FILE)
        assert f"not known to this model {module}odd" in refusal(CheckpointError, folder)

    @pytest.mark.parametrize("kind", KINDS)
    def test_shapes_and_dtypes(self, copied: Callable[[str], Path], kind: str) -> None:
        folder, module = copied(kind), "model.layers.0.mlp.down_proj."
        stored = safetensors.torch.load_file(folder / FILE)
        for name in [name for name in stored if name.startswith(module)]:
            longer = torch.cat([stored[name].view(torch.uint8)] * 2).view(stored[name].dtype)
            safetensors.torch.save_file(stored | {name: longer}, folder / FILE)
            assert f"{name} has shape" in refusal(CheckpointError, folder)
            other = torch.zeros(stored[name].shape, dtype=torch.uint8)
            safetensors.torch.save_file(stored | {name: other}, folder / FILE)
            message = refusal(CheckpointError, folder)
            assert f"{name} is U8" in message or "is quantized by" in message

    @pytest.mark.parametrize("kind", KINDS)
    def test_truncated(self, copied: Callable[[str], Path], kind: str) -> None:
        folder = copied(kind)
        data = (folder / FILE).read_bytes()
        (folder / FILE).write_bytes(data[:-100])
        assert "is truncated" in refusal(CheckpointError, folder)

    def test_another_group_size(self, copied: Callable[[str], Path]) -> None:
        folder = copied("awq-32")
        set_quantization(folder, group_size=16)
        assert "qzeros has shape [2, 8], config.json asks for [4, 8]" in refusal(
            CheckpointError, folder
        )
        set_quantization(folder, group_size=48)
        assert "no multiple of 48" in refusal(CheckpointError, folder)

    def test_groups_that_are_none(self, copied: Callable[[str], Path]) -> None:
        folder, name = copied("gptq-4-act-order"), "model.layers.0.self_attn.q_proj.g_idx"
        for change in (lambda g: g.fill_(0), lambda g: g.add_(1), lambda g: g.sub_(1)):
            stored = safetensors.torch.load_file(folder / FILE)
            stored[name] = change(stored[name].clone())
            broken = folder.parent / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(folder, broken)
            safetensors.torch.save_file(stored, broken / FILE)
            message = refusal(CheckpointError, broken)
            assert "q_proj" in message and "32 inputs into each group" in message

    def test_a_weight_shape_that_lies(self, copied: Callable[[str], Path]) -> None:
        folder, name = copied("ct-packed-4-asym"), "model.layers.0.mlp.up_proj.weight_shape"
        rewrite(folder, lambda tensors: tensors[name].add_(8))
        assert "weight_shape is (104, 72), not (96, 64)" in refusal(CheckpointError, folder)

    def test_values_that_do_not_fit(self, copied: Callable[[str], Path]) -> None:
        folder, name = copied("ct-naive-4"), "model.layers.0.mlp.up_proj.weight"
        rewrite(folder, lambda tensors: tensors[name][0, :1].fill_(8))
        assert "up_proj: values do not fit 4 bits" in refusal(CheckpointError, folder)

    def test_codes_without_their_settings(self, copied: Callable[[str], Path]) -> None:
        """int8 tensors are not taken for numbers when config.json does not say what they are."""
        folder = copied("ct-int8-channel")
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        assert "quantization_config is missing" in refusal(CheckpointError, folder)
        rewrite(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "scale" in n])
        assert "quantization_config is missing" in refusal(CheckpointError, folder)

    @pytest.mark.parametrize("kind", ["awq-32", "ct-packed-4-asym", "fp8-blocks"])
    def test_packed_codes_without_their_settings(
        self, copied: Callable[[str], Path], kind: str
    ) -> None:
        folder = copied(kind)
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        assert "quantization_config is missing" in refusal(CheckpointError, folder)

    def test_groups_without_a_format(self, copied: Callable[[str], Path]) -> None:
        folder = copied("ct-int8-channel")
        config = json.loads((folder / "config.json").read_text())
        settings = config["quantization_config"]
        settings.pop("format", None)
        for group in settings["config_groups"].values():
            group.pop("format", None)
        (folder / "config.json").write_text(json.dumps(config))
        assert "format is missing" in refusal(CheckpointError, folder)

    def test_settings_without_codes(self, source: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(source, tmp_path / "copy"))
        set_quantization(folder, **WRITERS["awq-32"].config)
        assert "quantized by awq, but no tensor is" in refusal(CheckpointError, folder)

    def test_a_damaged_expression(self, copied: Callable[[str], Path]) -> None:
        folder = copied("ct-int8-channel")
        set_quantization(folder, ignore=["re:("])
        assert "ignore is 're:(', expected a regular expression" in refusal(CheckpointError, folder)

    def test_a_head_marker_of_no_scheme(self, copied: Callable[[str], Path]) -> None:
        folder = copied("awq-32")
        config = json.loads((folder / "config.json").read_text())
        config["penstock_head_quantization"] = ["int8"]
        (folder / "config.json").write_text(json.dumps(config))
        assert "penstock_head_quantization is ['int8']" in refusal(CheckpointError, folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else ()
    return [path] * bool(path) + [p for k, v in items for p in _paths(v, (*path, k))]


@settings(max_examples=250)
@given(data=st.data())
def test_nonsense_in_the_settings(data: st.DataObject) -> None:
    """Any field of any format's settings replaced by anything: read, or refused in one line."""
    writer: FormatWriter = WRITERS[data.draw(st.sampled_from(sorted(WRITERS)))]
    config = copy.deepcopy(writer.config)
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from(_paths(config)))
        holder = config
        for name in parents:
            holder = holder[name]
        holder[last] = data.draw(JSON)

    class InMemory(Checkpoint):
        def text(self, name: str) -> str | None:
            if name != "config.json":
                return None
            return json.dumps({"quantization_config": config})

    try:
        found = quantization_of(InMemory(Path("nowhere")))
        found.describe()
        found.format.layout("model.layers.0.mlp.up_proj", 96, 64, lambda name: None)
        for method in METHODS:
            try:
                quantization_of(InMemory(Path("nowhere")), method)
            except ConfigError:
                pass
    except CheckpointError as exc:
        assert "\n" not in exc.message and exc.message


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8]), st.integers(0, 99))
def test_unpack(rows: int, words: int, bits: int, seed: int) -> None:
    """Against shifting Python integers."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (rows, words), generator=generator).int()
    found = unpack(packed, bits)
    assert torch.equal(unpack_down(packed.T.contiguous(), bits), found)
    for row in range(rows):
        bits_of_row = sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(packed[row]))
        expected = [(bits_of_row >> (bits * i)) & (2**bits - 1) for i in range(words * 32 // bits)]
        assert found[row].tolist() == expected


def test_targets() -> None:
    found = Targets(frozenset({"Linear", "model.a"}), ())
    assert found.match("model.a") == 3 and found.match("model.layers.0.x_proj") == 1
    assert found.match("model.embed_tokens") == 0
    assert Targets(frozenset({"Embedding"})).match("model.embed_tokens") == 1
