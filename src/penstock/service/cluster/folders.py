"""Private folders for the sockets of engines, and what killed services left of theirs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from penstock.protocol.errors import StartupError

_PREFIX = "penstock-"
#: Held for as long as the service lives; the kernel lets go of it when the service dies.
_LOCK = "lock"
#: What a Unix socket's path may have, less room for our own part of it.
_MAX_BASE_BYTES = 107 - 40


class SocketFolder:
    """Mode 700: nobody else on the host can reach the sockets within.

    Raises `StartupError` where none can be made. Removes those of services that were killed.
    """

    def __init__(self) -> None:
        base = _base()
        remove_abandoned(base)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            self._lock = _locked(self.path)
        except OSError as exc:
            raise StartupError(
                f"no folder for the engine's socket can be made in {base}: {exc.strerror}; "
                "make room there, or set TMPDIR to another place"
            ) from exc

    def remove(self) -> None:
        """May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_abandoned(base: Path) -> None:
    """Folders of this user in `base` whose service is gone."""
    for folder in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, none of ours, or gone meanwhile
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _base() -> Path:
    try:
        base = tempfile.gettempdir()
    except OSError as exc:
        raise StartupError(f"no folder for temporary files: {exc.strerror}; set TMPDIR") from exc
    return Path(base if len(os.fsencode(base)) <= _MAX_BASE_BYTES else "/tmp")


def _locked(folder: Path) -> int | None:
    """The lock appears under its name only once it is held: nobody finds it free in between."""
    early = folder / f"{_LOCK}.new"
    lock = os.open(early, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    early.rename(folder / _LOCK)
    return lock
