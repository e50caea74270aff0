"""What several tests with real processes need."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint so small that several engines of it start at once."""
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, "qwen3", num_hidden_layers=2, hidden_size=64)
    return str(folder)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Its file and its key's: self-signed, for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate")
    key, found = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out",
         str(found)],
        check=True, capture_output=True,
    )  # fmt: skip
    return found, key
