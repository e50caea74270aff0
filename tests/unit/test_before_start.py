"""Mistakes that every engine would make are said before one is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli.before_start import GIB, check_disk, check_memory
from penstock.cli.main import main
from penstock.engine.config import EngineConfig
from penstock.protocol.errors import ConfigError


def disk(folder: str) -> EngineConfig:
    return EngineConfig("toy", kv_disk_cache_bytes=1 << 20, kv_disk_path=folder)


def test_a_folder_that_nothing_can_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--kv-disk-path /proc/x"):
        check_disk(disk("/proc/x"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--kv-disk-path"):
        check_disk(disk(str(tmp_path / "file")))
    check_disk(disk(str(tmp_path / "new" / "folder")))
    check_disk(EngineConfig("toy"))


def test_more_instances_than_the_host_has_memory_for() -> None:
    with pytest.raises(ConfigError, match="--instances 100"):
        check_memory(EngineConfig("toy"), 100, total_bytes=8 * GIB)
    with pytest.raises(ConfigError, match=r"at least 8\.2 GiB"):
        check_memory(EngineConfig("toy", kv_cache_bytes=4 * GIB), 2, total_bytes=8 * GIB)
    check_memory(EngineConfig("toy"), 100, total_bytes=64 * GIB)
    check_memory(EngineConfig("toy", kv_cache_bytes=9 * GIB), 1, total_bytes=8 * GIB)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kv-store", "foo"], "--kv-store foo: give mooncake://host:port"),
        (["--kv-disk-path", "/tmp"], "--kv-disk-cache-bytes and --kv-disk-path go together"),
        (["--kv-disk-path", "/proc/x", "--kv-disk-cache-bytes", "1M"], "--kv-disk-path /proc/x"),
        (["--instances", "1000000"], "this host has"),
    ],
)
def test_serve_says_so_at_once(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "toy", "--port", "0", *flags]) != 0
    assert said in capsys.readouterr().err
