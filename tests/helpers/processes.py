"""Routers, workers and servers as processes of their own, ended for certain."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from tests.helpers.server import environment, free_port

PATIENCE_S = 90.0
MAIN = "penstock.cli.main"


@dataclass
class Command:
    process: subprocess.Popen[bytes]
    log_file: Path
    url: str = ""

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}{path}", timeout=10.0).json()
        return found

    def active(self) -> set[str]:
        """Instances that this service uses."""
        try:
            instances = self.get("/health")["instances"]
        except httpx.TransportError:
            return set()
        return {i["name"] for i in instances if i["state"] == "active"}

    def child(self, word: str) -> psutil.Process:
        """The child whose command line has this word, as soon as there is one: who has just been
        killed is a zombie without one for a moment."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            children = psutil.Process(self.process.pid).children()
            found = [c for c in children if word in _words(c)]
            if len(found) == 1 or time.monotonic() > deadline_s:
                (one,) = found
                return one
            time.sleep(0.02)


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
        return process.cmdline()
    return []


class Processes:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Command] = []

    def start(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        namespace: str | None = None,
        module: str = MAIN,
    ) -> Command:
        """`namespace`: of the network, in place of ours."""
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        log_file = self._folder / f"{len(self._started)}-{Path(arguments[0]).name}.log"
        with log_file.open("wb") as out:
            process = subprocess.Popen(
                [*inside, sys.executable, "-m", module, *arguments],
                env=environment(**(env or {})),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._started.append(Command(process, log_file))
        return self._started[-1]

    def server(
        self, command: str, model: str, *flags: str, env: dict[str, str] | None = None
    ) -> Command:
        """`serve` or `router`, on a port of its own."""
        port = free_port()
        found = self.start(command, model, "--port", str(port), "--no-banner", *flags, env=env)
        found.url = f"http://127.0.0.1:{port}"
        return found

    def until(self, what: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline_s, f"it did not happen:\n{self._logs()}"
            time.sleep(0.05)

    def _logs(self) -> str:
        return "\n".join(f"--- {c.log_file.name}\n{c.log}" for c in self._started)

    def close(self) -> None:
        children: list[psutil.Process] = []
        for command in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                children += psutil.Process(command.process.pid).children(recursive=True)
            if command.process.poll() is None:
                command.process.terminate()
        for command in self._started:
            try:
                command.process.wait(15)
            except subprocess.TimeoutExpired:
                command.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    found = Processes(folder)
    try:
        yield found
    finally:
        found.close()
