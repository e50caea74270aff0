"""Processes that this service owns: started, watched, started again, stopped.

A process's end is noticed through its pidfd the moment it happens, not by a missed heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable

from penstock.protocol.errors import StartupError
from penstock.service.cluster.folders import SocketFolder
from penstock.service.cluster.roster import Roster
from penstock.service.cluster.spare import NoSpare
from penstock.service.config import RestartPolicy

log = logging.getLogger(__name__)


class Process(ABC):
    """One process under one name, a `penstock` command. `on_exit` is told of each end that was not
    asked for, and whether another start follows."""

    #: What people call it.
    kind = "process"

    def __init__(
        self, name: str, policy: RestartPolicy, on_exit: Callable[[str, int, bool], None]
    ) -> None:
        self.name = name
        self._policy = policy
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None
        #: Counts the starts.
        self.incarnation = 0
        self._failures = 0
        self._was_ready = False
        self._stopping = False
        self._restart: asyncio.TimerHandle | None = None
        self._exited = asyncio.Event()

    @abstractmethod
    def arguments(self) -> list[str]:
        """The command and its arguments, for the next start."""

    def inherited(self) -> tuple[int, ...]:
        """Descriptors that it gets."""
        return ()

    def environment(self) -> dict[str, str] | None:
        return None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Raises `StartupError` when the machine has no process to give, the first time; later
        that counts as an end like others, and is tried again."""
        try:
            self._start()
        except OSError as exc:
            reason = f"the {self.kind}'s process cannot be started: {exc.strerror}"
            if not self._was_ready:
                raise StartupError(reason) from exc
            log.error("%s", reason)
            self._has_ended(1)

    def _start(self) -> None:
        self._restart = None
        self.incarnation += 1
        process = self._spawn(self.arguments())
        try:
            fd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise
        self._process = process
        self._exited.clear()
        asyncio.get_running_loop().add_reader(fd, self._ended, fd)

    def _spawn(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in the terminal is for the service, which then drains it.
        return subprocess.Popen(
            [sys.executable, "-m", "penstock.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=self.inherited(),
            env=self.environment(),
        )

    def ready(self) -> None:
        """It has attached: a later failure starts a new count."""
        self._failures = 0
        self._was_ready = True

    def kill(self) -> None:
        """It does not answer: end it. It is started again like one that ended by itself."""
        if self.running:
            assert self._process is not None
            log.error("%s %s does not answer; it is killed", self.kind, self.name)
            self._process.kill()

    def _ended(self, fd: int) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(fd)
        os.close(fd)
        assert self._process is not None
        code = self._process.wait()
        self._exited.set()
        if not self._stopping:
            self._has_ended(code)

    def _has_ended(self, code: int) -> None:
        self._failures += 1
        again = (
            self._policy.enabled
            and self._was_ready  # else the same start would end in the same way
            and self._failures <= self._policy.max_failures
        )
        what_next = "; starting it again" if again else ""
        log.error("%s %s ended (%s)%s", self.kind, self.name, describe_exit(code), what_next)
        if again:
            loop = asyncio.get_running_loop()
            self._restart = loop.call_later(self._delay_s(), self.start)
        self._on_exit(self.name, code, again)

    def _delay_s(self) -> float:
        if self._failures <= 1:
            return self._policy.first_delay_s
        return min(self._policy.max_delay_s, 0.5 * 2.0 ** (self._failures - 2))

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL after `timeout_s`. Leaves nothing behind."""
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._exited.wait(), timeout_s)
            except TimeoutError:
                self._process.kill()
                await self._exited.wait()


class Worker(Process):
    """An engine. Of one that the roster has taken out no process is started, and the end of the one
    there was is no failure; `on_drained` is told of it."""

    kind = "engine"

    def __init__(
        self,
        name: str,
        worker_args: tuple[str, ...],
        policy: RestartPolicy,
        on_exit: Callable[[str, int, bool], None],
        roster: Roster,
        on_drained: Callable[[str], None],
        weights_fd: int | None = None,
        spare: NoSpare | None = None,
    ) -> None:
        super().__init__(name, policy, on_exit)
        self._args = worker_args
        self._weights_fd = weights_fd
        self._spare = spare or NoSpare()
        self._roster = roster
        self._on_drained = on_drained
        self.rests = False
        self._folder = SocketFolder()
        self.address = f"ipc://{self._folder.path}/{name}.sock"

    def arguments(self) -> list[str]:
        return [
            *("worker", "--address", self.address, "--name", self.name),
            *("--incarnation", str(self.incarnation), "--parent-pid", str(os.getpid())),
            *(() if self._weights_fd is None else ("--weights-fd", str(self._weights_fd))),
            *self._args,
        ]

    def _spawn(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        return self._spare.take(arguments) or super()._spawn(arguments)

    def inherited(self) -> tuple[int, ...]:
        return () if self._weights_fd is None else (self._weights_fd,)

    def _has_ended(self, code: int) -> None:
        if self._roster.is_out(self.name):
            log.info("%s %s is drained (%s)", self.kind, self.name, describe_exit(code))
            self._rest()
        else:
            super()._has_ended(code)

    def follow_roster(self) -> bool:
        """Start what has been brought back (True then), and nothing that has been taken out."""
        out = self._roster.is_out(self.name)
        if out and not self.rests and not self.running:
            if self._restart is not None:
                self._restart.cancel()
                self._restart = None
            self._rest()
        elif not out and self.rests and not self._stopping:
            self.rests = False
            self.start()
            return True
        return False

    def _rest(self) -> None:
        self._failures = 0
        self.rests = True
        self._roster.gone(self.name)
        self._on_drained(self.name)

    async def stop(self, timeout_s: float) -> None:
        await super().stop(timeout_s)
        self._folder.remove()


def describe_exit(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
