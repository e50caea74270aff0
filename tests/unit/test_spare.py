"""Processes that wait to be the next engine."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from penstock.service.cluster.spare import Spare


def test_there_is_none_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process that nobody would end")

    spare = Spare()
    spare.close()
    monkeypatch.setattr(subprocess, "Popen", popen)
    spare.prepare()  # an engine said that it is ready while all were stopped
    assert spare.take(["worker"]) is None
