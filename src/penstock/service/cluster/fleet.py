"""The engines that this command has started: one process each, together a fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from penstock.service.cluster.supervisor import Worker
from penstock.service.config import RestartPolicy


class Fleet:
    """`on_ended(name, starts again)`: an engine's process has ended. `on_failed(reason)`: none is
    left, and none will come back: the service is of no use any more."""

    def __init__(
        self,
        num_engines: int,
        worker_args: tuple[str, ...],
        policy: RestartPolicy,
        *,
        on_ended: Callable[[str, bool], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._on_ended = on_ended
        self._on_failed = on_failed
        self._given_up: set[str] = set()
        self._was_ready = False
        self.workers = {
            name: Worker(name, worker_args, policy, self._ended)
            for name in (f"engine-{number}" for number in range(num_engines))
        }

    def start(self) -> None:
        """Raises `StartupError` when the machine has no process to give."""
        for worker in self.workers.values():
            worker.start()

    def __contains__(self, name: str) -> bool:
        return name in self.workers

    def ready(self, name: str) -> None:
        if name in self.workers:
            self.workers[name].ready()
            self._was_ready = True

    def _ended(self, name: str, code: int, again: bool) -> None:
        self._on_ended(name, again)
        if again:
            return
        self._given_up.add(name)
        if len(self._given_up) < len(self.workers):
            return
        if self._was_ready:
            self._on_failed(f"engine {name} keeps failing; giving up")
        else:  # trying the same again will not help, and it has said why
            self._on_failed(f"the engine did not start (exit code {code}): its reason is above")

    def kill_unless(self, name: str, is_well: Callable[[], bool], after_s: float) -> None:
        """Kill the process that now has this name, unless by then `is_well()`."""
        worker = self.workers[name]
        incarnation = worker.incarnation

        def look() -> None:
            if worker.incarnation == incarnation and not is_well():
                worker.kill()

        asyncio.get_running_loop().call_later(after_s, look)

    async def stop(self, timeout_s: float) -> None:
        await asyncio.gather(*(worker.stop(timeout_s) for worker in self.workers.values()))
