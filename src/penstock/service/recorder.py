"""--record FILE: a service's core that writes down whatever goes into it (`recording.py`).

`RecordedCore` is the core and nothing else: each of its inputs is packed, passed on, and written
with a digest of the effects. Without --record there is none, and nothing is paid. A thread deflates
and writes a few times a second, so a process that is killed loses the last moments of its record;
one whose core breaks does not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock import __version__
from penstock.protocol.codec import PROTOCOL_VERSION
from penstock.protocol.effects import Effect
from penstock.protocol.errors import ConfigError, PenstockError
from penstock.service.cluster.finder import Finder
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.policies.routing import Policy
from penstock.service.recipe import CoreRecipe
from penstock.service.recording import (
    Header,
    Step,
    array_of,
    code_digest,
    digest_of,
    encode_header,
    encode_step,
    pack_call,
    piece,
    sends_of,
)

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 30
_FLUSH_EVERY_S = 0.2
#: Of one piece, before it is deflated.
_PIECE_BYTES = 1 << 20
#: Waiting for a disk that does not keep up.
_WAITING_BYTES = 256 << 20


class Tape:
    """Where steps go. This one takes none: nothing is recorded."""

    #: Why it takes no more; "" while it does.
    stopped: str = ""

    def header(self, recipe: CoreRecipe) -> None:
        """Told once, first."""

    def add(self, step: Step) -> None: ...

    def stop(self, why: str) -> None:
        """Take no more."""

    def flush(self) -> None:
        """Returns when what was added is written."""

    def close(self) -> None: ...


NO_TAPE = Tape()


class FileTape(Tape):
    """Writes to `path`, or to `path`.1, .2, ... where there is such a file already: no recording is
    ever overwritten. With `max_bytes` written, or on an error of the disk, it says so and stops:
    what it has is replayed up to there. Raises `ConfigError` where nothing can be written."""

    def __init__(
        self, path: Path, max_bytes: int = MAX_BYTES, facts: Mapping[str, str] | None = None
    ) -> None:
        self.path, self._fd = _create(path)
        self._left_bytes = max_bytes
        self._facts = dict(facts or {})
        self._waiting: deque[bytes] = deque()
        #: By the thread of the core, and by whoever writes.
        self._added_bytes = self._taken_bytes = 0
        self.stopped = ""
        self._lock = threading.Lock()  # held while writing
        self._closed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def header(self, recipe: CoreRecipe) -> None:
        header = Header(
            version=__version__,
            code=code_digest(),
            protocol=PROTOCOL_VERSION,
            python=platform.python_version(),
            started_unix_s=time.time(),
            recipe=recipe,
            facts=self._facts,
        )
        self._write(encode_header(header))
        log.info("recording to %s, prompts and answers included", self.path)
        self._thread.start()

    def add(self, step: Step) -> None:
        if self._closing.is_set():
            return  # nobody would write it
        data = encode_step(step)
        self._waiting.append(data)
        self._added_bytes += len(data)
        if self._added_bytes - self._taken_bytes > _WAITING_BYTES:
            self.stop(f"{self.path} is on a disk that does not keep up")

    def flush(self) -> None:
        with self._lock:
            while not self.stopped and not self._closed and (taken := self._take()):
                self._write(piece(array_of(taken)))

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()
        with self._lock:  # the number may be another file's from now on
            self._closed = True
            os.close(self._fd)

    def _run(self) -> None:
        while not self._closing.wait(_FLUSH_EVERY_S):
            self.flush()

    def _take(self) -> list[bytes]:
        taken, size = [], 0
        with contextlib.suppress(IndexError):  # no more; `stop` may clear it at any moment
            while size < _PIECE_BYTES:
                taken.append(self._waiting.popleft())
                size += len(taken[-1])
        self._taken_bytes += size
        return taken

    def _write(self, data: bytes) -> None:
        if len(data) > self._left_bytes:
            self.stop(f"{self.path} has reached --record-max-bytes")
            return
        self._left_bytes -= len(data)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as exc:
            self.stop(f"{self.path} cannot be written: {exc.strerror}")

    def stop(self, why: str) -> None:
        if not self.stopped:
            self.stopped = why
            log.warning("%s: nothing more is recorded", why)
        self._waiting.clear()


def _create(path: Path) -> tuple[Path, int]:
    if path.is_dir():
        raise ConfigError(f"--record {path} is a folder: name a file in it, {path / 'incident'}")
    number = 0
    while True:
        named = path if not number else path.with_name(f"{path.name}.{number}")
        try:
            # Prompts are in there: for nobody else's eyes.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            return named, os.open(named, flags, 0o600)
        except FileExistsError:
            number += 1
        except OSError as exc:
            raise ConfigError(f"--record {path} cannot be written: {exc.strerror}") from None


def _tap(name: str) -> Any:
    """The method of that name, with its calls on the tape."""
    method = getattr(ServiceCore, name)

    def call(self: RecordedCore, *args: Any, **kwargs: Any) -> Any:
        if self._inside:  # one input that the core makes of another
            return method(self, *args, **kwargs)
        self._inside = True
        try:
            effects = method(self, *args, **kwargs)
        except PenstockError as exc:
            self._note(name, args, kwargs, (), exc.code)
            raise
        except BaseException as exc:
            self._note(name, args, kwargs, (), f"{type(exc).__name__}: {exc}")
            self._tape.flush()
            raise
        finally:
            self._inside = False
        self._note(name, args, kwargs, effects or ())
        return effects

    return call


class RecordedCore(ServiceCore):
    """A `ServiceCore` that is recorded."""

    def __init__(
        self, config: ServiceCoreConfig, policy: Policy, finder: Finder, tape: Tape
    ) -> None:
        super().__init__(config, policy, finder)
        self._tape = tape
        self._inside = False

    def _note(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        effects: Sequence[Effect],
        raised: str = "",
    ) -> None:
        """What went in is as it was: messages are frozen, and the core takes no list for its own.
        Whatever may be wrong with the recorder, the service goes on."""
        if self._tape.stopped:
            return
        try:
            call, digest = pack_call(name, args, kwargs), digest_of(effects)
            self._tape.add(Step(call, digest, len(effects), sends_of(effects), raised))
        except Exception as exc:
            log.exception("a call of %s cannot be recorded", name)
            self._tape.flush()
            self._tape.stop(f"{type(exc).__name__}: {exc}")

    submit = _tap("submit")
    cancel = _tap("cancel")
    on_message = _tap("on_message")
    on_timer = _tap("on_timer")
    add_instance = _tap("add_instance")
    expect = _tap("expect")
    on_instance_lost = _tap("on_instance_lost")
    on_instance_refused = _tap("on_instance_refused")
    doubt = _tap("doubt")
    lead = _tap("lead")
    assign = _tap("assign")
    drain_instance = _tap("drain_instance")
    take_out = _tap("take_out")
    bring_back = _tap("bring_back")
    on_drained = _tap("on_drained")
    remove_instance = _tap("remove_instance")
    close_all = _tap("close_all")


def make_core(recipe: CoreRecipe, tape: Tape = NO_TAPE) -> ServiceCore:
    """Recorded, unless `tape` is the one that takes nothing."""
    if tape is NO_TAPE:
        return recipe.make()
    tape.header(recipe)
    return recipe.make(lambda config, policy, finder: RecordedCore(config, policy, finder, tape))
