"""Processes that belong to each other."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1


def stop_with_parent() -> None:
    """Ask for SIGTERM when the parent ends, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:  # it was gone before we asked
            sys.exit(0)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that it cleans up; once, so that another
    does not interrupt the cleaning. In the main thread only."""
    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]

    def interrupt(*_: object) -> None:
        for number in wanted:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def child(arguments: list[str], *, stop_s: float = 10.0) -> Iterator[subprocess.Popen[bytes]]:
    """A `penstock` command of our own version; ended with SIGTERM, after `stop_s` with SIGKILL.

    It has a session of its own, so that Ctrl-C in the terminal is ours alone.
    """
    command = [sys.executable, "-m", "penstock.cli.main", *arguments]
    started = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(stop_s)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
