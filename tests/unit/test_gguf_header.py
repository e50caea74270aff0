"""The head of GGUF files: read as the `gguf` package reads it, and never trusted."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.gguf_files import write_gguf

from penstock.checkpoint import resolve
from penstock.engine.loading.digest import checkpoint_digest
from penstock.engine.loading.tensors import CheckpointTensors
from penstock.engine.models.registry import model_config
from penstock.gguf import header
from penstock.gguf.header import read_header
from penstock.gguf.types import TYPES
from penstock.protocol.errors import CheckpointError, PenstockError, UnsupportedModel
from penstock.service.text.texts import Texts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(make_checkpoint(folder / "hf", "llama"), folder / "whole.gguf", "Q8_0")


def use(path: Path) -> None:
    """What serving does before it reads weights."""
    checkpoint = resolve(str(path))
    model_config(checkpoint)
    Texts.from_checkpoint(checkpoint)
    checkpoint_digest(checkpoint)
    with CheckpointTensors(checkpoint) as tensors:
        for file in tensors.files:
            for name in file.tensors:
                file.read(name)


def test_types_are_those_of_the_package() -> None:
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    ours = {n: (kind.name, kind.block_values, kind.block_bytes) for n, kind in TYPES.items()}
    assert ours == sizes


def test_reads_what_the_package_reads(whole: Path) -> None:
    found, reader = read_header(whole), gguf.GGUFReader(whole)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert found.metadata == fields
    assert {name: (t.type.name, t.start, t.num_bytes) for name, t in found.tensors.items()} == {
        t.name: (t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader.tensors
    }
    assert found.tensors["token_embd.weight"].shape == (384, 64)


def test_every_type_of_metadata(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kinds = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
    for kind in kinds:
        getattr(writer, f"add_{kind}")(f"x.{kind}", 7)
    for kind in ("float32", "float64"):
        getattr(writer, f"add_{kind}")(f"x.{kind}", 0.5)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "Köln")
    writer.add_array("x.strings", ["a", "", "東京"])
    writer.add_array("x.floats", [0.25, -1.5])
    writer.add_custom_alignment(64)
    writer.add_tensor("t", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(path)
    assert [found.metadata[f"x.{kind}"] for kind in kinds] == [7] * len(kinds)
    assert found.metadata["x.float64"] == found.metadata["x.float32"] == 0.5
    assert found.metadata["x.bool"] is True and found.metadata["x.string"] == "Köln"
    assert found.metadata["x.strings"] == ["a", "", "東京"]
    assert found.metadata["x.floats"] == [0.25, -1.5]
    assert found.tensors["t"].start % 64 == 0 and found.tensors["t"].shape == (2, 32)


def test_a_long_header_is_read_in_several_pieces(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_header(whole)
    monkeypatch.setattr(header, "_FIRST_READ_BYTES", 100)
    assert read_header(whole) == expected
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="does not end within"):
        read_header(whole)


# --- damage ---


def changed(whole: Path, out: Path, change: Callable[[bytearray], Any]) -> Path:
    data = bytearray(whole.read_bytes())
    change(data)
    path = out / "changed.gguf"
    path.write_bytes(data)
    return path


def test_a_file_cut_anywhere_is_refused(whole: Path, tmp_path: Path) -> None:
    data, path = whole.read_bytes(), tmp_path / "cut.gguf"
    end = read_header(whole).num_bytes
    lengths = [*range(0, 200), *range(200, end, 397), *range(end, len(data), 4001), len(data) - 1]
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_header(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=8),
    early=st.booleans(),
)
def test_flipped_bytes_end_in_a_checkpoint_or_in_one_line(
    whole: Path, tmp_path: Path, flips: list[tuple[float, int]], early: bool
) -> None:
    """Mostly in the first 2 KiB, where counts, lengths, types and the model's dimensions are."""
    end = 2048 if early else read_header(whole).num_bytes

    def flip(data: bytearray) -> None:
        for where, mask in flips:
            data[int(where * (end - 1))] ^= mask

    path = changed(whole, tmp_path, flip)
    try:
        use(path)
    except PenstockError as exc:
        assert "\n" not in str(exc)


COUNTS = {"tensors": 8, "metadata entries": 16}


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("what", COUNTS)
def test_huge_counts_are_refused_without_an_attempt(
    what: str, count: int, whole: Path, tmp_path: Path
) -> None:
    path = changed(whole, tmp_path, lambda data: struct.pack_into("<Q", data, COUNTS[what], count))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=what):
        read_header(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 * path.stat().st_size + (1 << 20)


def test_a_huge_string_and_a_huge_array_are_refused(whole: Path, tmp_path: Path) -> None:
    at = whole.read_bytes().index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    for length in (1 << 33, (1 << 64) - 1):
        path = changed(whole, tmp_path, lambda d, n=length: struct.pack_into("<Q", d, at + 8, n))
        with pytest.raises(CheckpointError, match=r"strings in 'tokenizer\.ggml\.tokens'"):
            read_header(path)
        path = changed(whole, tmp_path, lambda d, n=length: struct.pack_into("<Q", d, at + 16, n))
        with pytest.raises(CheckpointError, match="goes beyond"):
            read_header(path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda d: d.__setitem__(slice(0, 4), b"GGML"), CheckpointError, "is not a GGUF file"),
        (lambda d: struct.pack_into("<I", d, 4, 1), UnsupportedModel, "GGUF version 1"),
        (lambda d: struct.pack_into(">I", d, 4, 3), UnsupportedModel, "big-endian"),
    ],
)
def test_other_files_are_refused_by_name(
    change: Callable[[bytearray], Any], error: type[Exception], words: str, whole: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=words):
        read_header(changed(whole, tmp_path, change))


def test_an_unknown_type_of_tensor_is_refused_by_its_number(whole: Path, tmp_path: Path) -> None:
    name = b"output_norm.weight"
    at = whole.read_bytes().index(name) + len(name) + 4 + 8

    def unknown(data: bytearray) -> None:
        assert struct.unpack_from("<I", data, at)[0] == 0  # F32
        struct.pack_into("<I", data, at, 77)

    with pytest.raises(UnsupportedModel, match=r"output_norm\.weight has ggml type 77"):
        read_header(changed(whole, tmp_path, unknown))
