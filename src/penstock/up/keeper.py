"""Keeps one `penstock` process running on the machine that it is on: what a Ray actor does for
`penstock up`. Knows nothing of Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

#: A process that ran for so long was well: the next pause is short again.
_WELL_AFTER_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0


class Keeper:
    """Starts the process at once, and again whenever it ends, until `stop`."""

    def __init__(
        self, name: str, arguments: Sequence[str], env: Mapping[str, str], digest: str
    ) -> None:
        self._name = name
        self._arguments = tuple(arguments)
        self._env = dict(env)
        self._digest = digest
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._starts = 0
        self._last_exit: int | None = None
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def status(self) -> dict[str, Any]:
        with self._lock:
            running = self._process.poll() is None
            return {
                "name": self._name,
                "digest": self._digest,
                "pid": self._process.pid,
                "running": running,
                "restarts": self._starts - 1,
                "last_exit": self._last_exit,
                "hostname": os.uname().nodename,
            }

    def stop(self, timeout_s: float = 35.0) -> None:
        """SIGTERM, on which it finishes what it has; SIGKILL after `timeout_s`."""
        self._stopping.set()
        with self._lock:
            process = self._process
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._thread.join()

    def _start(self) -> subprocess.Popen[bytes]:
        self._starts += 1
        command = [sys.executable, "-m", "penstock.cli.main", *self._arguments]
        if self._arguments[0] == "worker":
            # Later starts of a name replace earlier ones, on whichever node those were.
            command += [f"--incarnation={time.time_ns()}", f"--parent-pid={os.getpid()}"]
        return subprocess.Popen(command, env=os.environ | self._env, stdin=subprocess.DEVNULL)

    def _watch(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began_s = time.monotonic()
            code = self._process.wait()
            if time.monotonic() - began_s > _WELL_AFTER_S:
                pause_s = _FIRST_PAUSE_S
            self._last_exit = code
            if self._stopping.wait(pause_s):
                return
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            with self._lock:
                if self._stopping.is_set():
                    return
                print(f"{self._name} ended with {code}: starting it again", flush=True)
                try:
                    self._process = self._start()
                except OSError as exc:  # such as no memory; the next try comes after a longer pause
                    print(f"{self._name} cannot be started: {exc.strerror or exc}", flush=True)
