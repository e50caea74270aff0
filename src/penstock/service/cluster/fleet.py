"""The engines that this command has started: one process each, together a fleet."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from penstock.service.cluster.roster import LocalRoster, Roster
from penstock.service.cluster.spare import NoSpare, Spare
from penstock.service.cluster.supervisor import Worker
from penstock.service.config import RestartPolicy

#: How long an engine that is to go may be silent: it gives its memory back, and has time.
_ENDS_WITHIN_S = 30.0


class Fleet:
    """`on_ended(name, starts again)`: an engine's process has ended. `on_failed(reason)`: none is
    left, and none will come back: the service is of no use any more. `on_drained(name)`: the roster
    has taken it out, and it has gone."""

    def __init__(
        self,
        num_engines: int,
        worker_args: tuple[str, ...],
        policy: RestartPolicy,
        *,
        on_ended: Callable[[str, bool], None],
        on_failed: Callable[[str], None],
        on_drained: Callable[[str], None] = lambda name: None,
        roster: Roster | None = None,
        share_weights: bool = False,
        spare_engine: bool = False,
    ) -> None:
        self._roster = roster or LocalRoster()
        self._on_ended = on_ended
        self._on_failed = on_failed
        self._given_up: set[str] = set()
        self._was_ready = False
        # Held open here, so that what the engines put there outlives each of them, and never us.
        self._weights_fd = os.memfd_create("penstock-weights") if share_weights else None
        inherited = () if self._weights_fd is None else (self._weights_fd,)
        self._spare = Spare(inherited) if spare_engine else NoSpare()
        self.workers = {
            name: Worker(
                *(name, worker_args, policy, self._ended, self._roster, on_drained),
                weights_fd=self._weights_fd,
                spare=self._spare,
            )
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
            self._spare.prepare()  # not before: it would take time from those that start

    def _ended(self, name: str, code: int, again: bool) -> None:
        self._on_ended(name, again)
        if again:
            return
        self._given_up.add(name)
        if any(n not in self._given_up and not w.rests for n, w in self.workers.items()):
            return
        if self._was_ready:
            self._on_failed(f"engine {name} keeps failing; giving up")
        else:  # trying the same again will not help, and it has said why
            self._on_failed(f"the engine did not start (exit code {code}): its reason is above")

    def follow_roster(self) -> None:
        for name, worker in self.workers.items():
            if worker.follow_roster():
                self._given_up.discard(name)

    def kill_unless(self, name: str, is_well: Callable[[], bool], after_s: float) -> None:
        """Kill the process that now has this name, unless by then `is_well()`. One that drains gets
        more time to end by itself."""
        worker = self.workers[name]
        incarnation = worker.incarnation

        loop = asyncio.get_running_loop()

        def look(waited_s: float) -> None:
            if worker.incarnation != incarnation or is_well():
                return
            if self._roster.is_out(name) and waited_s < _ENDS_WITHIN_S:
                loop.call_later(_ENDS_WITHIN_S - waited_s, look, _ENDS_WITHIN_S)
            else:
                worker.kill()

        loop.call_later(after_s, look, after_s)

    async def stop(self, timeout_s: float) -> None:
        self._spare.close()
        await asyncio.gather(*(worker.stop(timeout_s) for worker in self.workers.values()))
        if self._weights_fd is not None:
            os.close(self._weights_fd)
            self._weights_fd = None
