"""What benchmarks need and a stranger's clone does not have is one line, before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import mooncake_routing, needs, pd_sweep

ROOT = Path(__file__).parents[2]


def test_a_missing_package_is_one_line() -> None:
    needs.packages("json", "pytest")
    with pytest.raises(SystemExit, match="needs no_such_one and nor_this: make install-dev"):
        needs.packages("json", "no_such_one", "nor_this")


@pytest.mark.parametrize("name", ["restart", "router", "simulator_validation", "faults"])
def test_benchmarks_ask_before_they_import(name: str) -> None:
    """Without psutil, as after `make install`."""
    program = (
        "import importlib.util as u, runpy; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'psutil' else found(name, *a)\n"
        f"runpy.run_module('benchmarks.{name}', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == "this benchmark needs psutil: make install-dev\n"


@pytest.mark.parametrize("module", [pd_sweep, mooncake_routing])
def test_a_missing_trace_is_one_line(
    module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--traces", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"there is no .*gz.*docs/benchmarks.md says under Traces"):
        module.main()
    words = (ROOT / "docs" / "benchmarks.md").read_text()
    assert "## Traces" in words
