"""What ran when, on which thread: a trace in Chrome's event format, which ui.perfetto.dev opens.

Off, a trace is `NO_TRACE`, whose methods do nothing. On, threads only append to a queue; a thread
of its own writes them out a few times a second. The file is an array of one event a line, and the
format lets the closing bracket be missing: what a killed process has left behind loads.

Times are CLOCK_MONOTONIC, which all processes of a machine share, and lines are appended in whole
writes: service and engine write to one file, and stand in it side by side by their process ids.
The format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from penstock.protocol.errors import ConfigError

log = logging.getLogger(__name__)

#: Of each process. A quarter of an hour of decoding at 25 ms a step; Perfetto still likes it.
MAX_BYTES = 128 << 20
_FLUSH_EVERY_S = 0.2
#: Events that may wait for the writer; a reader who wants every one of them has it at half of this.
_MAX_WAITING = 1 << 18

_NOTHING: AbstractContextManager[None] = nullcontext()

Args = dict[str, Any] | Callable[[], dict[str, Any]]


class Trace:
    """The trace that is off, and the interface of the one that is on."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """From entering to leaving the block, on the track of the calling thread."""
        return _NOTHING

    def add(self, name: str, start_s: float, end_s: float, args: Args | None = None) -> None:
        """A span whose times (`time.perf_counter`) are known. `args` may be a function, which is
        called at once, and only by a trace that is on: what waits for the writer are plain values.
        """

    def count(self, name: str, value: float) -> None:
        """The value of a counter from now on."""

    def close(self) -> None:
        """Write what is left."""


NO_TRACE = Trace()


class FileTrace(Trace):
    """Appends to `path`. When `max_bytes` are written, or the file takes no more (a full disk), it
    says so and records nothing more. Raises `ConfigError` where the file cannot be written.
    """

    def __init__(self, path: Path, process: str, *, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._pid = os.getpid()
        self._left_bytes = max_bytes
        self._events: deque[tuple[Any, ...]] = deque(maxlen=_MAX_WAITING)
        self._threads: dict[int, int] = {}  # threading.get_ident() -> the kernel's id
        self._names: deque[tuple[int, str]] = deque()  # threads that the file does not name yet
        self._closing = threading.Event()
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._begin(process)
        except OSError as exc:
            raise _refused(path, exc) from exc
        self._writer = threading.Thread(target=self._run, name="penstock-trace", daemon=True)
        self._writer.start()

    def _begin(self, process: str) -> None:
        try:
            start = "" if os.fstat(self._fd).st_size else "[\n"
            self._write(start + self._meta("process_name", 0, process))
        except OSError:
            os.close(self._fd)
            raise

    def span(self, name: str) -> AbstractContextManager[None]:
        return _Span(self, name)

    def add(self, name: str, start_s: float, end_s: float, args: Args | None = None) -> None:
        plain = args() if callable(args) else args
        self._events.append((name, self._thread(), start_s, end_s, plain))

    def count(self, name: str, value: float) -> None:
        self._events.append((name, time.perf_counter(), value))

    def close(self) -> None:
        if not self._closing.is_set():
            self._closing.set()
            self._writer.join()
            os.close(self._fd)

    def _thread(self) -> int:
        ident = threading.get_ident()
        thread = self._threads.get(ident)
        if thread is None:
            thread = self._threads[ident] = threading.get_native_id()
            self._names.append((thread, threading.current_thread().name))
        return thread

    # --- the writer's thread -------------------------------------------------------------------

    def _run(self) -> None:
        """However it ends, nothing is recorded after it: nobody would take it from the queue."""
        try:
            while not self._closing.wait(_FLUSH_EVERY_S):
                if not self._flush():
                    return
            self._flush()
        except OSError as exc:
            log.warning("tracing stops: %s cannot be written: %s", self._path, exc.strerror)
        finally:
            self._switch_off()

    def _flush(self) -> bool:
        """False when the file has had its share."""
        lines = []
        while self._names:
            lines.append(self._meta("thread_name", *self._names.popleft()))
        for _ in range(len(self._events)):
            lines.append(self._line(self._events.popleft()))
        text = "".join(lines)
        if len(text) > self._left_bytes:
            self._write_end()
            log.warning("the trace has reached its size; nothing more is recorded")
            return False
        if text:
            self._left_bytes -= len(text)
            self._write(text)
        return True

    def _write_end(self) -> None:
        event = {"name": "the trace ends here: its size is bounded", "ph": "i", "s": "p",
                 "ts": time.perf_counter() * 1e6, "pid": self._pid, "tid": 0}  # fmt: skip
        self._write(json.dumps(event) + ",\n")

    def _switch_off(self) -> None:
        # Whoever traces keeps this very object, and what is off should cost nothing.
        off = NO_TRACE
        self.span, self.add, self.count = off.span, off.add, off.count  # type: ignore[method-assign]
        self._events.clear()
        self._names.clear()

    def _write(self, text: str) -> None:
        """One call for whole lines: another process may be appending too, and may have done so
        behind the half line that a short write (a full disk) leaves."""
        data = text.encode()
        while (written := os.write(self._fd, data)) < len(data):
            whole = data.rfind(b"\n", 0, written) + 1
            self._blank(written - whole)
            data = data[whole:]

    def _blank(self, num_bytes: int) -> None:
        """Overwrite the last bytes that this process has appended, where they stand. JSON does not
        mind spaces, and spaces over bytes that are there need no room."""
        end = os.lseek(self._fd, 0, os.SEEK_CUR)
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        # With O_APPEND Linux appends even where a position is given.
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_APPEND)
        try:
            os.pwrite(self._fd, b" " * num_bytes, end - num_bytes)
        finally:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)

    def _line(self, event: tuple[Any, ...]) -> str:
        if len(event) == 3:
            name, at_s, value = event
            args = {"value": value}
            found = {"ph": "C", "name": name, "ts": at_s * 1e6, "pid": self._pid, "args": args}
        else:
            name, thread, start_s, end_s, args = event
            found = {"ph": "X", "name": name, "ts": round(start_s * 1e6, 3),
                     "dur": round((end_s - start_s) * 1e6, 3),
                     "pid": self._pid, "tid": thread}  # fmt: skip
            if args is not None:
                found["args"] = args
        return json.dumps(found) + ",\n"

    def _meta(self, what: str, thread: int, name: str) -> str:
        found = {"ph": "M", "name": what, "pid": self._pid, "tid": thread, "args": {"name": name}}
        return json.dumps(found) + ",\n"


class _Span:
    __slots__ = ("_name", "_start_s", "_trace")

    def __init__(self, trace: FileTrace, name: str) -> None:
        self._trace = trace
        self._name = name

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._trace.add(self._name, self._start_s, time.perf_counter())


def new_file(path: str) -> None:
    """Begin a trace file anew. Raises `ConfigError` where it cannot be written."""
    try:
        Path(path).write_text("[\n")
    except OSError as exc:
        raise _refused(path, exc) from exc


def _refused(path: str | Path, exc: OSError) -> ConfigError:
    return ConfigError(f"--trace {path} cannot be written: {exc.strerror}")


def open_trace(path: str | None, process: str) -> Trace:
    """A trace that appends to `path` under the name of `process`; None: the one that is off. Raises
    `ConfigError` where it cannot be written."""
    return NO_TRACE if path is None else FileTrace(Path(path), process)
