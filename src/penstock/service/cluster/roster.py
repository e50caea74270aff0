"""Which engines of this command an operator has taken out of service, until he says otherwise.

Said once and then true, whoever looks: services stop using such an engine, whoever owns its process
lets it end and starts no other. API workers share theirs as files in the folder that they share, so
an order may reach any of them, and none of it is lost with one that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol


class Roster(Protocol):
    def owns(self, name: str) -> bool:
        """Whether the engine's process was started here."""

    def is_out(self, name: str) -> bool: ...

    def take_out(self, name: str) -> None: ...

    def bring_back(self, name: str) -> None: ...

    def has_gone(self, name: str) -> bool:
        """It is out, and its process has ended."""

    def gone(self, name: str) -> None:
        """Said by the owner of the process."""

    def one_at_a_time(self) -> contextlib.AbstractContextManager[None]:
        """Held by whoever looks at what others are before he takes one out."""


class NobodyHere:
    """All engines were started elsewhere."""

    def owns(self, name: str) -> bool:
        return False

    def is_out(self, name: str) -> bool:
        return False

    def take_out(self, name: str) -> None:
        raise AssertionError(f"{name} is not ours")

    bring_back = gone = take_out
    has_gone = is_out

    def one_at_a_time(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class LocalRoster:
    """Of one process that owns its engines. `on_change` is told after each order."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._out: set[str] = set()
        self._gone: set[str] = set()

    def owns(self, name: str) -> bool:
        return True

    def is_out(self, name: str) -> bool:
        return name in self._out

    def take_out(self, name: str) -> None:
        self._out.add(name)
        self.on_change()

    def bring_back(self, name: str) -> None:
        self._out.discard(name)
        self._gone.discard(name)
        self.on_change()

    def has_gone(self, name: str) -> bool:
        return name in self._gone

    def gone(self, name: str) -> None:
        self._gone.add(name)

    def one_at_a_time(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # it has one thread


class FolderRoster:
    """Shared by API workers and their parent, who all look at it a few times a second."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def owns(self, name: str) -> bool:
        return True

    def is_out(self, name: str) -> bool:
        return self._mark(name).exists()

    def take_out(self, name: str) -> None:
        self._mark(name).touch()

    def bring_back(self, name: str) -> None:
        self._mark(name, "gone").unlink(missing_ok=True)
        self._mark(name).unlink(missing_ok=True)

    def has_gone(self, name: str) -> bool:
        return self._mark(name, "gone").exists()

    def gone(self, name: str) -> None:
        self._mark(name, "gone").touch()

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        lock = os.open(self._folder / "roster.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _mark(self, name: str, what: str = "out") -> Path:
        return self._folder / f"{name}.{what}"
