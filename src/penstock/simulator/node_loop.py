"""An asyncio event loop of one node, on the virtual clock: production code that is written with
`async` (what registries and memberships do) runs here as it is, and one seed gives one history.

It has no sockets, threads or signals: what a node says to others goes through its world.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar, TypeVarTuple

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class NodeLoop(asyncio.AbstractEventLoop):
    """`clock()` is the node's time in seconds, and `at(when_s, call)` calls when it shows that, if
    the node still runs then."""

    def __init__(
        self, clock: Callable[[], float], at: Callable[[float, Callable[[], None]], None]
    ) -> None:
        self._clock = clock
        self._at = at
        self._tasks: list[asyncio.Task[Any]] = []
        self._readers: dict[int, Callable[[], object]] = {}
        self._ended = False
        #: What is to run though the process is gone.
        self._last: deque[asyncio.Handle] = deque()
        #: Exceptions that nobody has taken; a test looks here.
        self.troubles: list[dict[str, Any]] = []

    # --- what asyncio asks of a loop -----------------------------------------------------------

    def time(self) -> float:
        return self._clock()

    def call_soon(
        self,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if self._ended:
            self._last.append(handle)
        else:
            self._at(self.time(), lambda: self._run(handle))
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if not self._ended:
            self._at(when, lambda: self._run(handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        return None  # it is done nothing with when its time comes

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Generator[Any, None, _T] | Coroutine[Any, Any, _T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[_T]:
        task: asyncio.Task[_T] = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks = [known for known in self._tasks if not known.done()] + [task]
        return task

    def is_running(self) -> bool:
        return not self._ended

    def is_closed(self) -> bool:
        return self._ended

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._ended:
            self.troubles.append(context)

    def add_reader(self, fd: Any, callback: Callable[[*_Ts], object], *args: *_Ts) -> None:
        self._readers[fd] = lambda: callback(*args)

    def remove_reader(self, fd: Any) -> bool:
        return self._readers.pop(fd, None) is not None

    # --- what the world does -------------------------------------------------------------------

    def enter(self, call: Callable[[], _T]) -> _T:
        """Run `call` as if from within this loop."""
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            return call()
        finally:
            asyncio._set_running_loop(outer)

    def readable(self, fd: int) -> None:
        if fd in self._readers and not self._ended:
            self.enter(self._readers[fd])

    def _run(self, handle: asyncio.Handle) -> None:
        if not handle.cancelled() and not self._ended:
            self.enter(handle._run)

    def end(self) -> None:
        """The process is gone. Its tasks are unwound where nobody hears them."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
        while self._last:
            self.enter(self._last.popleft()._run)
