"""Real server processes for tests: started by the command line, stopped for certain."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A `penstock serve` process and what it printed so far (`log`)."""

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def engine(self) -> psutil.Process:
        """The engine's process, the only child."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def kill_engine(self) -> int:
        child = self.engine()
        child.send_signal(signal.SIGKILL)
        return int(child.pid)

    def wait_ready(self, timeout_s: float = 90.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log}")

    def metric(self, name: str) -> float:
        """The sum over all label sets of a metric."""
        found = self._lines(name)
        assert found, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def labelled(self, name: str, label: str) -> dict[str, float]:
        """A metric by the values of one of its labels."""
        return {
            line.split(f'{label}="', 1)[1].split('"', 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in self._lines(name)
        }

    def _lines(self, name: str) -> list[str]:
        lines = httpx.get(f"{self.url}/metrics", timeout=5.0).text.splitlines()
        return [line for line in lines if line.startswith((name + "{", name + " "))]


def _limit(limits: dict[int, int]) -> None:
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def penstock(*args: str) -> list[str]:
    return [sys.executable, "-m", "penstock.cli.main", *args]


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | extra


@contextlib.contextmanager
def running(
    model: str,
    *flags: str,
    ready: bool = True,
    env: dict[str, str] | None = None,
    limits: dict[int, int] | None = None,
) -> Iterator[Server]:
    """`penstock serve MODEL --port P FLAGS` for the time of the block; nothing is left behind.

    `limits` are hard ones, by resource.RLIMIT_*.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as out:
            process = subprocess.Popen(
                penstock("serve", model, "--port", str(port), *flags),
                env=environment(**(env or {})),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=functools.partial(_limit, limits or {}),
            )
        server = Server(f"http://127.0.0.1:{port}", process, log_file)
        children: list[psutil.Process] = []
        try:
            if ready:
                server.wait_ready()
            yield server
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
