"""`penstock quantize`: what it writes is read by others, is what loading would have made, and is
either whole or not there."""

from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import is_match
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.gguf_files import write_gguf
from tests.helpers.quantized_checkpoints import WRITERS

from penstock.checkpoint import Checkpoint, resolve
from penstock.cli.main import main
from penstock.engine.loading import safetensors_writer
from penstock.engine.loading.loader import load_model
from penstock.engine.platforms.base import Linear, Platform, TiedEmbedding
from penstock.engine.quantization import convert
from penstock.engine.quantization.convert import Report, quantize_checkpoint
from penstock.engine.quantization.schemes import INT4, INT8, Scheme, scheme_named
from penstock.engine.quantization.weight import QuantizedWeight
from penstock.protocol.errors import CheckpointError, ConfigError
from penstock.service.text.texts import Texts

SCHEMES = [INT8, INT4, scheme_named("int4", 32)]
IDS = [f"{scheme.name}-{scheme.group_size}" for scheme in SCHEMES]


class Keeps(Platform):
    def __init__(self) -> None:
        super().__init__("cpu")
        self.linears: list[QuantizedWeight] = []
        self.heads: list[QuantizedWeight] = []

    def available_bytes(self) -> int:
        return 1 << 40

    def make_quantized_linear(
        self, weight: QuantizedWeight, bias_N: torch.Tensor | None, dtype: torch.dtype
    ) -> Linear:
        self.linears.append(weight)
        return super().make_quantized_linear(weight, bias_N, dtype)

    def make_quantized_embedding(
        self, weight: QuantizedWeight, dtype: torch.dtype
    ) -> TiedEmbedding:
        self.heads.append(weight)
        return super().make_quantized_embedding(weight, dtype)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLP of 192 inputs, which int4 takes in groups of 64; 128 elsewhere."""
    return make_checkpoint(
        tmp_path_factory.mktemp("plain"),
        "qwen3",
        hidden_size=128,
        intermediate_size=192,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )


def load(folder: Path, quantization: str = "auto") -> Keeps:
    platform = Keeps()
    load_model(Checkpoint(folder), platform, "bfloat16", quantization=quantization)
    return platform


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_compressed_tensors_reads_it(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    """Its package finds the group of each module, and reads what we read, number for number."""
    quantize_checkpoint(Checkpoint(source), tmp_path / "out", scheme)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    theirs = QuantizationConfig.model_validate(config)
    linear = torch.nn.Linear(1, 1)
    plain = safetensors.torch.load_file(source / "model.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    for name in plain:
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            continue
        stored = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{module}.")}
        (group,) = [
            group
            for group in theirs.config_groups.values()
            if is_match(module, linear, group.targets, theirs.ignore)
        ]
        stored["weight_scale"] = stored["weight_scale"].float()  # what they compute in
        compressor = BaseCompressor.get_value_from_registry(group.format)
        found = compressor.decompress(stored, group)["weight"]
        assert torch.allclose(found, scheme.quantize(plain[name]).dequantize(), atol=1e-7)


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2]], ids=[IDS[0], IDS[2]])
def test_transformers_reads_it(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    """Its weights there are ours, rounded to the dtype of the scales."""
    report = quantize_checkpoint(Checkpoint(source), tmp_path / "out", scheme)
    dequantized = transformers.CompressedTensorsConfig(dequantize=True)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=dequantized
    )
    plain = safetensors.torch.load_file(source / "model.safetensors")
    found = dict(theirs.named_parameters())
    assert len(report.errors) == 2 * 7
    for module, error in report.errors.items():
        weight = plain[f"{module}.weight"]
        expected = scheme.quantize(weight).dequantize()
        assert torch.allclose(found[f"{module}.weight"], expected, rtol=2**-7, atol=0)
        exact = weight.float()
        assert error == pytest.approx(float((expected - exact).norm() / exact.norm()), rel=1e-3)
    for name in set(plain) - {f"{module}.weight" for module in report.errors}:
        assert torch.equal(found[name], plain[name].float())


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=["int8", "int4"])
def test_the_same_as_while_loading(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(Checkpoint(source), tmp_path / "out", scheme)
    stored, made = load(tmp_path / "out"), load(source, scheme.name)
    assert len(stored.linears) == len(made.linears) == 8
    assert len(stored.heads) == len(made.heads) == 1 and stored.heads[0].bits == 8
    for a, b in zip(stored.linears + stored.heads, made.linears + made.heads):
        assert (a.bits, a.group_size) == (b.bits, b.group_size)
        assert torch.equal(a.codes_NK, b.codes_NK) and torch.equal(a.scales_NG, b.scales_NG)
        assert torch.equal(a.offsets(), b.offsets())


def test_a_head_of_its_own(tmp_path: Path) -> None:
    """Plain in the file, so that others can read it; 8 bits here."""
    source = make_checkpoint(tmp_path / "plain", "llama", hidden_size=128)
    quantize_checkpoint(Checkpoint(source), tmp_path / "out", INT4)
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.float32
    *layers, head = load(tmp_path / "out").linears
    assert head.shape == (384, 128) and head.bits == 8 and head.per_channel
    assert {weight.bits for weight in layers} == {4}
    again = load(source, "int4").linears
    assert torch.equal(again[-1].codes_NK, head.codes_NK)


def test_what_does_not_divide_falls_back(tmp_path: Path) -> None:
    """100 inputs go into no group: 8 bits, in a group of settings of its own, mixed precision."""
    source = make_checkpoint(
        tmp_path / "plain", "llama", intermediate_size=100, dtype=torch.bfloat16
    )
    quantize_checkpoint(Checkpoint(source), tmp_path / "out", INT4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    others = config["config_groups"]["group_1"]
    assert others["targets"] == ["re:.*\\.mlp\\.down_proj$"]
    stored, made = load(tmp_path / "out").linears, load(source, "int4").linears
    assert [w.bits for w in stored] == [w.bits for w in made] == [4, 4, 4, 8] * 2 + [8]
    for a, b in zip(stored, made):
        assert torch.equal(a.codes_NK, b.codes_NK)


def test_shards(source: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    quantize_checkpoint(Checkpoint(source), whole, INT4)
    quantize_checkpoint(Checkpoint(source), parts, INT4, max_shard_bytes=60_000)
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2 and all(f"of-{len(files):05}" in file.name for file in files)
    one = safetensors.torch.load_file(whole / "model.safetensors")
    many = {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}
    assert one.keys() == many.keys() and all(torch.equal(one[k], many[k]) for k in one)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in many.values())
    a, b = load(whole), load(parts)
    assert all(torch.equal(x.codes_NK, y.codes_NK) for x, y in zip(a.linears, b.linears))


def test_files_beside_the_weights(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    (folder / "notes.txt").write_text("kept")
    (folder / "pytorch_model.bin").write_bytes(b"not kept")
    (folder / "model.safetensors.index.json.bak").write_text("kept")
    quantize_checkpoint(Checkpoint(folder), tmp_path / "out", INT8)
    names = {path.name for path in folder.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "notes.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"quantization_config", "penstock_head_quantization"}


@pytest.mark.parametrize("kind", ["fp8-blocks", "gptq-4-asym"])
def test_from_a_quantized_checkpoint(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_checkpoint(tmp_path / "plain", "llama", num_hidden_layers=1)
    folder = WRITERS[kind].write(plain, tmp_path / "stored")
    quantize_checkpoint(Checkpoint(folder), tmp_path / "out", INT8)
    assert caplog.text.count("quantized already") == 1
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith(("qweight", "scale_inv", "g_idx")) for name in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    stored, made = load(tmp_path / "out").linears, load(folder, "int8").linears
    for a, b in zip(stored, made):
        assert (a.dequantize() - b.dequantize()).norm() < 0.01 * b.dequantize().norm()


def test_from_a_gguf_file(tmp_path: Path) -> None:
    """Which answers for the files of a folder: out comes a whole checkpoint."""
    plain = make_checkpoint(tmp_path / "plain", "qwen3", hidden_size=128, intermediate_size=128)
    file = write_gguf(plain, tmp_path / "model.gguf", "Q8_0")
    quantize_checkpoint(resolve(str(file)), tmp_path / "out", INT4)
    assert Texts.from_checkpoint(Checkpoint(tmp_path / "out")).tokenizer.encode("Water")
    stored, made = load(tmp_path / "out").linears, Keeps()
    load_model(resolve(str(file)), made, "bfloat16", quantization="int4")
    assert [w.bits for w in stored] == [w.bits for w in made.linears]
    for a, b in zip(stored, made.linears):
        difference = (a.dequantize() - b.dequantize()).norm()
        assert difference < 0.05 * b.dequantize().norm()


_MEASURE = """
import sys
from pathlib import Path

from penstock.checkpoint import Checkpoint
from penstock.engine.quantization.convert import quantize_checkpoint
from penstock.engine.quantization.schemes import INT4


def kibibytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


big, small, out = map(Path, sys.argv[1:])
quantize_checkpoint(Checkpoint(small), out / "small", INT4)  # what a first use of torch costs
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = kibibytes("VmRSS:")
report = quantize_checkpoint(Checkpoint(big), out / "big", INT4)
print(report.bytes_before, (kibibytes("VmHWM:") - before) * 1024)
"""


def test_one_linear_in_memory_at_a_time(source: Path, tmp_path: Path) -> None:
    """By the kernel's count of the process's peak; the largest linear has 1 MB."""
    big = make_checkpoint(
        tmp_path / "big", "llama", num_hidden_layers=12, hidden_size=256, intermediate_size=1024
    )
    words = [sys.executable, "-c", _MEASURE, str(big), str(source), str(tmp_path / "out")]
    done = subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    size, grown = (int(word) for word in done.stdout.split())
    assert size > 40e6 and grown < size / 2, (size, grown)


_STUCK = """
import sys
from penstock.cli.main import main
from penstock.engine.loading import safetensors_writer

def stuck(*_):
    print("stuck", flush=True)
    sys.stdin.read()

safetensors_writer._write = stuck
sys.exit(main(sys.argv[1:]))
"""


class TestAllOrNothing:
    def refused(self, kind: type[Exception], source: Path, out: Path) -> str:
        beside = set(out.parent.iterdir())
        with pytest.raises(kind) as caught:
            quantize_checkpoint(Checkpoint(source), out, INT8)
        assert set(out.parent.iterdir()) == beside
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_there_already(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine").write_text("mine")
        assert "exists already" in self.refused(ConfigError, source, out)
        assert (out / "mine").read_text() == "mine"

    def test_a_disk_that_is_too_small(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Known before a byte is written."""
        monkeypatch.setattr(
            convert.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1)
        )
        message = self.refused(CheckpointError, source, tmp_path / "out")
        assert "the disk is full; nothing is left of it" in message

    def test_a_disk_that_fills_up(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, calls = safetensors_writer._write, []

        def full(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(*arguments)

        monkeypatch.setattr(safetensors_writer, "_write", full)
        monkeypatch.setattr(
            convert.quantize_checkpoint, "__kwdefaults__",
            convert.quantize_checkpoint.__kwdefaults__ | {"max_shard_bytes": 60_000},
        )  # fmt: skip
        message = self.refused(CheckpointError, source, tmp_path / "out")
        assert "the disk is full" in message and len(calls) == 2

    def test_a_file_size_limit_of_the_system(self, source: Path, tmp_path: Path) -> None:
        """A write that fails for real, by the process's limit of a file's size."""
        code = (
            "import resource, signal, sys\n"
            "from penstock.cli.main import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        words = ["quantize", str(source), str(tmp_path / "out"), "--scheme", "int8"]
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "src"},
        )  # fmt: skip
        assert done.returncode == 1 and "cannot be written: File too large" in done.stderr
        assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())

    def test_a_weight_that_is_not_finite(self, source: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(source, tmp_path / "source"))
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        message = self.refused(CheckpointError, folder, tmp_path / "out")
        assert "layers.1.mlp.up_proj" in message

    def test_interrupted(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any) -> Report:
            raise KeyboardInterrupt

        monkeypatch.setattr(safetensors_writer, "_write", interrupted)
        self.refused(KeyboardInterrupt, source, tmp_path / "out")

    def test_a_parent_that_is_no_folder(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=r"cannot be written: .*/file is a file"):
            quantize_checkpoint(Checkpoint(source), tmp_path / "file" / "out", INT8)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
    def test_ended_from_outside(
        self, source: Path, tmp_path: Path, number: signal.Signals, caplog: Any
    ) -> None:
        """A run that is killed outright leaves its folder to the next, which spares what is alive
        and what is somebody else's."""
        out = tmp_path / "out"
        words = ["quantize", str(source), str(out), "--scheme=int8"]
        killed = number == signal.SIGKILL
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", _STUCK, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
                # nohup is honoured, and may be what the tests run under.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )
            for _ in range(1 + killed)
        ]
        try:
            for run in runs:
                assert run.stdout is not None and run.stdout.readline() == b"stuck\n"
            assert len(list(tmp_path.iterdir())) == len(runs)
            runs[0].send_signal(number)
            assert runs[0].wait(60) == (-number if killed else 130)
            assert len(list(tmp_path.iterdir())) == 2 * killed
            mine = tmp_path / ".out-backup01"
            mine.mkdir()
            (mine / "mine").write_text("mine")
            quantize_checkpoint(Checkpoint(source), out, INT8)
            left = set(tmp_path.iterdir()) - {out, mine}
            assert len(left) == killed and (mine / "mine").read_text() == "mine"
            assert ("left behind" in caplog.text) == killed
        finally:
            for run in runs:
                run.kill()
                run.communicate()


class TestCommand:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
        def run(*words: object) -> tuple[int, str, str]:
            code = main(["quantize", *map(str, words)])
            said = capsys.readouterr()
            return code, said.out, said.err

        return run

    def test_says_sizes_and_errors(self, run: Any, source: Path, tmp_path: Path) -> None:
        code, out, _ = run(source, tmp_path / "out", "--scheme=int4", "--group-size=64")
        assert code == 0
        assert "MiB before" in out and "down_proj" in out and f"written to {tmp_path}" in out
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        group = config["quantization_config"]["config_groups"]["group_0"]
        assert group["weights"]["group_size"] == 64
        assert "perplexity" not in out  # there is no text for it

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((), "--scheme"),
            (("--scheme=int3",), "'int3': int8 and int4 are there"),
            (("--scheme=int8", "--group-size=64"), "leave --group-size out"),
            (("--scheme=int4", "--group-size=7"), "none of 32, 64, 128"),
        ],
    )
    def test_wrong(
        self, run: Any, source: Path, tmp_path: Path, words: tuple[str, ...], message: str
    ) -> None:
        code, _, err = run(source, tmp_path / "out", *words)
        assert code == 2 and message in err and not (tmp_path / "out").exists()

    def test_refusals_are_one_line(self, run: Any, source: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        code, out, err = run(source, tmp_path / "file", "--scheme=int8")
        assert code == 2 and out == ""
        assert err.startswith("penstock: ") and err.count("\n") == 1
        code, _, err = run(source, tmp_path / "out", "--scheme=int8")
        assert (code, err) == (0, "")

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_bar_where_somebody_looks(self, exists: bool, source: Path, tmp_path: Path) -> None:
        """And none, nor a line for it, before it begins."""
        if exists:
            (tmp_path / "out").mkdir()
        master, slave = pty.openpty()
        words = ["quantize", str(source), str(tmp_path / "out"), "--scheme=int8"]
        environment = os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        done = subprocess.run(
            [sys.executable, "-m", "penstock.cli.main", *words],
            stdout=subprocess.DEVNULL, stderr=slave, env=environment,
        )  # fmt: skip
        os.close(slave)
        shown = os.read(master, 1 << 16)
        os.close(master)
        assert done.returncode == (2 if exists else 0)
        assert shown.startswith(b"penstock: ") if exists else b"quantizing" in shown
