"""A real etcd for tests: Debian's etcd-server, or whichever `etcd` stands on the path."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.helpers.server import free_port


@dataclass
class Etcd:
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"etcd://127.0.0.1:{self.port}"

    def start(self, tries: int = 5) -> None:
        """At another port where somebody was faster; but once it has run, at the same."""
        first = self.process is None
        for left in reversed(range(tries)):
            self._launch()
            if self._ready():
                return
            assert left, "etcd has ended"
            if first:
                self.port = free_port()

    def _launch(self) -> None:
        client = f"http://127.0.0.1:{self.port}"
        peer = f"http://127.0.0.1:{free_port()}"
        self.process = subprocess.Popen(
            [
                "etcd", "--data-dir", str(self.folder / "data"), "--name", "test",
                "--listen-client-urls", client, "--advertise-client-urls", client,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", f"test={peer}",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _ready(self, timeout_s: float = 60.0) -> bool:
        """False: it has ended."""
        import httpx

        assert self.process is not None
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                return False
            with contextlib.suppress(httpx.TransportError):
                found = httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=2.0)
                if found.json().get("health") == "true":
                    return self.process.poll() is None  # else it is another who answers
            time.sleep(0.05)
        raise AssertionError("etcd did not become healthy")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """It is there, and takes what it is sent, and does not answer."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        # Its threads may do a little more until then.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


@contextlib.contextmanager
def running_etcd(folder: Path) -> Iterator[Etcd]:
    """Skips the test, with a word, where there is no etcd or no client for it."""
    pytest.importorskip("aetcd", reason="no client for etcd: pip install 'penstock[etcd]'")
    if shutil.which("etcd") is None:
        pytest.skip("no etcd here: apt-get install etcd-server")
    etcd = Etcd(folder)
    try:
        etcd.start()
        yield etcd
    finally:
        etcd.stop()
