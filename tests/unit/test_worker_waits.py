"""How threads that compute wait for each other is said before libgomp is loaded."""

from __future__ import annotations

import os

import pytest

from penstock.cli import worker


def test_threads_wait_briefly_unless_somebody_has_said_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(worker, "_when_told", lambda: None)
    assert worker.run(["--standby"]) == 0
    assert int(os.environ["GOMP_SPINCOUNT"]) > 0
    for name, said in (("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7")):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.setenv(name, said)
        worker.run(["--standby"])
        assert os.environ.get("GOMP_SPINCOUNT") in (None, "7")
        monkeypatch.delenv(name)
