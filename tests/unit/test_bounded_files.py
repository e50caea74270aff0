"""Files from strangers are read up to a bound, and ours are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli.main import main
from penstock.loadgen import files
from penstock.loadgen.files import read_small, read_yaml, write_whole
from penstock.protocol.errors import ConfigError


def test_reading_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="larger than 8 MiB"):
        read_small(Path("/dev/zero"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_small(tmp_path)
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_small(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key a is there twice"),
        ("x: [{a: 1, a: 2}]", "the key a is there twice"),
        ("[" * 20_000, "nested too deeply"),
        ("a: [1", "is not YAML"),
    ],
)
def test_yaml_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_keys_may_be_merged_over(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["y"] == {"a": 3, "b": 2}


def test_a_file_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_whole(path, "before")
    (tmp_path / "link").symlink_to(path)
    write_whole(tmp_path / "link", "after")
    assert path.read_text() == "after" and (tmp_path / "link").is_symlink()

    def full(self: Path, text: str, encoding: str) -> int:
        with self.open("w") as file:
            file.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.Path, "write_text", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        write_whole(path, "never")
    assert path.read_text() == "after"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a", "link"]


def test_what_is_no_file_is_written_to() -> None:
    write_whole(Path("/dev/null"), "x")
    assert not Path("/dev/null").is_file()


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115, PTH123
    monkeypatch.setattr("sys.stdout", full)
    assert main(["version"]) == 1
    assert capsys.readouterr().err == "penstock: cannot write: No space left on device\n"
    with pytest.raises(OSError, match="No space"):
        full.close()
