"""A process that has imported all that an engine needs, and waits to hear which one it is to be.

More than half of the time in which an engine is replaced goes into imports. A spare has that behind
it; with weights that are shared (`--share-weights`) its engine is ready in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Sequence

log = logging.getLogger(__name__)


class NoSpare:
    """Every engine begins with its imports."""

    def prepare(self) -> None:
        pass

    def take(self, arguments: Sequence[str]) -> subprocess.Popen[bytes] | None:
        return None

    def close(self) -> None:
        pass


class Spare(NoSpare):
    """One at a time. `inherited`: descriptors that engines get."""

    def __init__(self, inherited: tuple[int, ...] = ()) -> None:
        self._inherited = inherited
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def prepare(self) -> None:
        """Have one, if the machine has a process to give."""
        if self._closed or (self._process is not None and self._process.poll() is None):
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "penstock.cli.main", "worker", "--standby"],
                stdin=subprocess.PIPE,  # its end is ours
                start_new_session=True,
                pass_fds=self._inherited,
            )
        except OSError as exc:
            log.warning("no spare engine can be started: %s", exc.strerror)
            self._process = None

    def take(self, arguments: Sequence[str]) -> subprocess.Popen[bytes] | None:
        """The spare, which is now the command `arguments`; None if there is none."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
            process.stdin.close()
        except OSError:  # it has just died
            process.kill()
            process.wait()
            return None
        return process

    def close(self) -> None:
        """There is none from now on: an engine may still say that it is ready when all end."""
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
