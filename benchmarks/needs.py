"""What a benchmark needs and does not find, said in one line and before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path


def packages(*names: str) -> None:
    """Raises `SystemExit` with a message."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise SystemExit(f"this benchmark needs {' and '.join(missing)}: make install-dev")


def traces(paths: Iterable[Path]) -> None:
    """Files of public traces. Raises `SystemExit` with a message."""
    missing = list(dict.fromkeys(str(path) for path in paths if not path.is_file()))
    if missing:
        raise SystemExit(
            f"there is no {' and no '.join(missing)}: docs/benchmarks.md says under Traces where "
            "it comes from, and --traces FOLDER where it lies"
        )
