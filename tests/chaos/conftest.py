"""What several tests of misfortunes need."""

from __future__ import annotations

import pytest

from tests.helpers.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture(scope="module")
def slower_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Slow enough that something can happen in the middle of an answer."""
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, "qwen3", num_hidden_layers=4, hidden_size=128)
    return str(folder)
