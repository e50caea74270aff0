"""A resident engine in a process of its own: JSON lines in and out, deadlines on both."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from typing import IO, Any

from benchmarks.compare.engines import WORKERS, Bench, Variant

START_TIMEOUT_S = 900.0  # vLLM compiles
JOB_TIMEOUT_S = 600.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class EngineFailed(Exception):
    """It ended, fell silent, or said that it has not got what was asked of it."""


class Worker:
    """Starting it blocks until its first token. Raises `EngineFailed`."""

    def __init__(self, bench: Bench, variant: Variant) -> None:
        self.variant = variant
        settings = json.dumps(bench.settings(variant))
        python = str(bench.pythons[variant.kind])
        started_s = time.monotonic()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until close)
        self._process = subprocess.Popen(
            [python, str(WORKERS / "worker.py"), variant.kind, settings],
            env=bench.environment(variant.kind),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._lines = _Lines(self._process.stdout)
        try:
            self.hello = self._reply(START_TIMEOUT_S)
            if "unavailable" in self.hello:
                raise EngineFailed(f"not available: {self.hello['unavailable']}")
        except BaseException:
            self.close()
            raise
        self.start_to_first_token_s = time.monotonic() - started_s

    def run(self, prompts: list[list[int]], max_tokens: list[int], **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        job = {"prompts": prompts, "max_tokens": max_tokens, **more}
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as exc:
            raise EngineFailed(self._last_words()) from exc
        reply = self._reply(JOB_TIMEOUT_S)
        if reply["num_tokens"] != sum(max_tokens):
            raise EngineFailed(f"{reply['num_tokens']} tokens for {sum(max_tokens)}")
        return reply

    def cpu_s(self) -> float:
        """CPU time so far: an engine that waits should use none."""
        with open(f"/proc/{self._process.pid}/stat", encoding="ascii") as stat:  # noqa: PTH123
            user, system = stat.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / _TICKS_PER_S

    def close(self) -> None:
        stop(self._process)
        self._log.close()

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        line = self._lines.next(timeout_s)
        if line is None:
            raise EngineFailed(self._last_words())
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        code = self._process.poll()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        state = "silent" if code is None else f"ended with code {code}"
        return f"{state}: {lines[-1] if lines else 'nothing said'}"


class _Lines:
    """Lines of a pipe, each with a deadline."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None
        self._fd = pipe.fileno()
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._fd, selectors.EVENT_READ)

    def next(self, timeout_s: float) -> bytes | None:
        """None at the end, or when the time is up."""
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if not self._selector.select(max(0.0, deadline_s - time.monotonic())):
                return None
            data = os.read(self._fd, 1 << 16)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def stop(process: subprocess.Popen[bytes], *, gently: bool = False) -> None:
    """End a process that leads its own session, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        if gently:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
