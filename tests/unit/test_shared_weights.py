"""Weights that engines share: the same model comes out of the segment, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.checkpoints import make_checkpoint

from penstock.checkpoint import Checkpoint
from penstock.engine.loading import sources
from penstock.engine.loading.loader import load_model
from penstock.engine.loading.shared_weights import _HEADER_BYTES, Segment, Sharing
from penstock.engine.memory.shared_pages import SharedPages
from penstock.engine.models.base import Model
from penstock.engine.platforms.cpu import linear
from penstock.engine.platforms.cpu.platform import CpuPlatform

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("test-weights")
    yield fd
    os.close(fd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), "qwen2")


def checkpoint(path: Path, family: str, **more: Any) -> Path:
    make_checkpoint(path, family, num_hidden_layers=2, hidden_size=64, **more)
    return path


def shares() -> bool:
    return linear.cannot_run(CpuPlatform().ops, torch.float32) is None


pytestmark = pytest.mark.skipif(not shares(), reason="linears here are not ours to share")


def load(folder: Path, fd: int | None, digest: str = "same", **options: Any) -> Model:
    segment = None if fd is None else Segment(fd)
    options = {"dtype": "float32", **options}
    model, _ = load_model(
        Checkpoint(folder), CpuPlatform(), share=segment, digest=lambda: digest, **options
    )
    return model


def numbers(model: Any) -> torch.Tensor:
    """Of all that the model keeps: embedding, norms, linears with their biases, head."""
    with torch.inference_mode():
        hidden_TE = model._embed(torch.arange(7))
        for layer in model._layers:
            normed_TE = layer._platform.rms_norm(hidden_TE, layer.input_norm_E, 1e-6)
            hidden_TE = hidden_TE + layer._mlp(normed_TE)
            hidden_TE = hidden_TE + layer._attention._qkv(normed_TE)[:, : hidden_TE.shape[1]]
        return model.logits(hidden_TE)


def reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from files from now on."""
    read: list[str] = []
    plain = sources.FromCheckpoint._fill_plain

    def noted(self: Any, name: str, out: torch.Tensor) -> None:
        read.append(name)
        plain(self, name, out)

    monkeypatch.setattr(sources.FromCheckpoint, "_fill_plain", noted)
    return read


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["auto", "int8", "int4"])
def test_the_second_engine_reads_nothing_and_is_the_same(
    tmp_path: Path,
    fd: int,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
    dtype: str,
    quantization: str,
) -> None:
    if dtype == "bfloat16" and linear.cannot_run(CpuPlatform().ops, torch.bfloat16) is not None:
        pytest.skip("oneDNN runs bfloat16 here")
    folder = checkpoint(tmp_path, "qwen2", tie_word_embeddings=tied)
    options = {"dtype": dtype, "quantization": quantization}
    alone = numbers(load(folder, None, **options))
    first = load(folder, fd, **options)
    read = reading(monkeypatch)
    second = load(folder, fd, **options)
    assert not read
    assert torch.equal(numbers(first), alone) and torch.equal(numbers(second), alone)
    del first  # a mapping holds by itself
    assert torch.equal(numbers(second), alone)


def test_random_weights_are_shared_too(fd: int, folder: Path) -> None:
    alone = numbers(load(folder, None, load_format="dummy", seed=5))
    both = [numbers(load(folder, fd, load_format="dummy", seed=5)) for _ in range(2)]
    assert all(torch.equal(each, alone) for each in both)


def test_nobody_can_write_to_what_is_shared(fd: int, folder: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from tests.unit.test_shared_weights import load\n"
        "model = load(Path(sys.argv[1]), int(sys.argv[2]))\n"
        "print('loaded', flush=True); model._norms_E[0].fill_(7.0)\n"
    )
    for _ in range(2):  # who has published, and who has mapped
        done = started(code, str(folder), str(fd), fd=fd)
        out, _ = done.communicate(timeout=120)
        assert "loaded" in out and done.returncode == -signal.SIGSEGV
    assert torch.equal(numbers(load(folder, fd)), numbers(load(folder, None)))


@pytest.mark.parametrize("place", ["data", "manifest", "header"])
def test_a_damaged_segment_is_refused_and_written_again(
    fd: int, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    alone = numbers(load(folder, None))
    load(folder, fd)
    header = Segment(fd).header()
    assert header is not None
    end = _HEADER_BYTES + header.data_bytes
    at = {"data": _HEADER_BYTES + 1000, "manifest": end + 5, "header": 25}[place]
    byte = os.pread(fd, 1, at)[0]
    os.pwrite(fd, bytes([byte ^ 0x10]), at)
    read = reading(monkeypatch)
    assert torch.equal(numbers(load(folder, fd)), alone)
    assert read
    read.clear()
    assert torch.equal(numbers(load(folder, fd)), alone)
    assert not read and Segment(fd).header() == header


def test_other_weights_leave_it_alone(
    fd: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoint(tmp_path, "qwen2", seed=9)
    first = load(folder, fd)
    before, header = numbers(first), Segment(fd).header()
    read = reading(monkeypatch)
    second = load(other, fd, digest="other")
    assert read and torch.equal(numbers(second), numbers(load(other, None)))
    assert torch.equal(numbers(first), before) and Segment(fd).header() == header


def test_what_cannot_be_shared_whole_is_not_shared(
    fd: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = numbers(load(folder, None))
    monkeypatch.setattr(linear, "packable", lambda weight: weight.shape[0] != 64)
    assert torch.allclose(numbers(load(folder, fd)), alone, atol=1e-5)
    monkeypatch.undo()
    read = reading(monkeypatch)
    assert torch.equal(numbers(load(folder, fd)), alone)
    assert read, "half a model was taken for a whole one"


def started(code: str, *arguments: str, fd: int) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        pass_fds=(fd,),
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


_DIES = """
import os, signal, sys
from pathlib import Path
from penstock.engine.loading import shared_weights
from tests.unit.test_shared_weights import load

kept, last = shared_weights.Publishing.keep, int(sys.argv[3])
def keep(self, *args):
    keep.count += 1
    if keep.count == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return kept(self, *args)
keep.count = 0
shared_weights.Publishing.keep = keep
if last < 0:
    shared_weights._digest = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
load(Path(sys.argv[1]), int(sys.argv[2]))
"""


@pytest.mark.parametrize("last", [1, 9, -1], ids=["first", "middle", "all but the header"])
def test_a_publisher_that_is_killed_leaves_nothing_that_counts(
    fd: int, folder: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    alone = numbers(load(folder, None))
    dying = started(_DIES, str(folder), str(fd), str(last), fd=fd)
    assert dying.wait(timeout=120) == -signal.SIGKILL
    assert Segment(fd).header() is None
    read = reading(monkeypatch)
    assert torch.equal(numbers(load(folder, fd)), alone) and read
    read.clear()
    assert torch.equal(numbers(load(folder, fd)), alone) and not read


def test_several_at_once_publish_once(fd: int, folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from penstock.engine.loading.shared_weights import Publishing\n"
        "from tests.unit.test_shared_weights import load, numbers\n"
        "publish = Publishing.publish\n"
        "Publishing.publish = lambda self, key: (print('published'), publish(self, key))\n"
        "print(float(numbers(load(Path(sys.argv[1]), int(sys.argv[2]))).sum()))\n"
    )
    several = [started(code, str(folder), str(fd), fd=fd) for _ in range(3)]
    said = [each.communicate(timeout=180)[0].split() for each in several]
    assert sum("published" in words for words in said) == 1
    assert len({words[-1] for words in said}) == 1


def big(platform: CpuPlatform) -> torch.Tensor:
    return platform.keeper.keep((1 << 20,), torch.float32, lambda out: out.fill_(3.0))


def shared(fd: int, read: Callable[[CpuPlatform], Any], digest: str, most_bytes: int) -> Any:
    platform = CpuPlatform()
    return Sharing(Segment(fd), lambda: digest).load(
        platform, lambda: read(platform), lambda: read(platform), most_bytes
    )


def used_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_room_that_is_too_small_costs_sharing_and_nothing_else(fd: int) -> None:
    assert float(shared(fd, big, "same", 4096).sum()) == 3.0 * (1 << 20)
    assert used_bytes(fd) < 1 << 20


def test_what_nobody_can_share_holds_no_memory(fd: int) -> None:
    def half_ours(platform: CpuPlatform) -> torch.Tensor:
        embedding = big(platform)
        platform.keeper.leaves_out("linears are of another form")
        return embedding

    for _ in range(2):
        assert float(shared(fd, half_ours, "same", 8 << 20).sum()) == 3.0 * (1 << 20)
        assert used_bytes(fd) < 1 << 20


def test_other_weights_take_the_place_of_those_that_nobody_uses(fd: int) -> None:
    code = (
        "import sys; from tests.unit.test_shared_weights import big, shared\n"
        "shared(int(sys.argv[1]), big, 'old', 8 << 20)\n"
    )
    assert started(code, str(fd), fd=fd).wait(timeout=120) == 0
    held = used_bytes(fd)
    assert held >= 4 << 20
    new = shared(fd, big, "new", 8 << 20)
    header = Segment(fd).header()
    assert header is not None and used_bytes(fd) <= held
    assert float(shared(fd, big, "old", 8 << 20).sum()) == float(new.sum())
    assert Segment(fd).header() == header, "somebody uses it"


def test_a_system_that_refuses_costs_sharing_and_nothing_else(fd: int) -> None:
    code = (
        "import resource, sys; from tests.unit.test_shared_weights import big, shared\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "print(float(shared(int(sys.argv[1]), big, 'same', 8 << 20).sum()))\n"
    )
    alone = started(code, str(fd), fd=fd)
    assert alone.communicate(timeout=120)[0].split() == [str(3.0 * (1 << 20))]


def test_half_a_mapping_is_none() -> None:
    def num_mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    with pytest.raises(OSError):
        SharedPages(-1, 1 << 20)
    before = num_mappings()
    for _ in range(8):
        with pytest.raises(OSError):
            SharedPages(-1, 1 << 20)
    assert num_mappings() <= before + 2
