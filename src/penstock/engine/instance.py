"""The driver of one engine instance: a real clock, a real wire, a real runner around the core.

One thread does everything but compute: it waits for frames, finished steps and timers, hands them
to the core and carries out what the core answers. Compute never starves it, so its heartbeats mean
something.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import chain

import msgspec

from penstock import __version__
from penstock.engine.build import Engine, build_engine
from penstock.engine.config import WorkerConfig
from penstock.engine.core import InstanceCore
from penstock.engine.cost import CostFitter
from penstock.engine.peers import Peers
from penstock.engine.platforms.cpu import placement
from penstock.engine.runtime.runner import Runner
from penstock.engine.scheduler.batch import StepResult
from penstock.engine.transfer.jobs import Moved, Mover
from penstock.engine.transfer.open import NoMover
from penstock.protocol.codec import PROTOCOL_VERSION, decode, encode
from penstock.protocol.effects import Connect, Effect, Launch, Move, Send, SetTimer, Stop
from penstock.protocol.errors import EngineFailed, ProtocolError, VersionMismatch, from_info
from penstock.protocol.instance import Attach, Detach, Drain, InstanceCard
from penstock.protocol.kv import Refused
from penstock.protocol.request import SamplingParams, Submit
from penstock.protocol.tokens import TokenRow, Tokens
from penstock.protocol.transport.base import Endpoint
from penstock.protocol.transport.open import listen
from penstock.registry import here
from penstock.registry.announce import Announcer, NoAnnouncer
from penstock.registry.base import InstanceEntry
from penstock.repeats import OneASecond
from penstock.trace import NO_TRACE, Trace, new_file, open_trace

log = logging.getLogger(__name__)
_DROPPED = "dropped a frame from %s: %s"
log.addFilter(OneASecond(_DROPPED))

#: os.eventfd_write lets go of the interpreter lock: whoever it wakes would take it, and the compute
#: thread, which rings after each step, would wait for all of the driver's turn before it could
#: start the next one. Called this way the lock stays where it is until the step computes.
_eventfd_write = ctypes.PyDLL(None).eventfd_write
_eventfd_write.argtypes = [ctypes.c_int, ctypes.c_uint64]

#: Frames taken in before finished steps get their turn again.
_FRAMES_A_TURN = 256
#: How soon what waits for a connection to a peer is tried again.
_RETRY_S = 0.001
#: Python's default of 5 ms is a step's length with a small model.
_SWITCH_INTERVAL_S = 0.0005
#: What an engine in a thread gets to finish its step.
_CLOSE_TIMEOUT_S = 60.0
#: Who asks for the warm-up tokens; no transport lets a peer have this name.
_SELF = "\0self"


class InstanceDriver:
    """`run` until `stop` is called or the core has drained."""

    def __init__(
        self,
        core: InstanceCore,
        runner: Runner,
        clock: Callable[[], float] = time.monotonic,
        trace: Trace = NO_TRACE,
        mover: Mover | None = None,
    ) -> None:
        self.core = core
        self._mover = mover or NoMover()
        self._moved: deque[Moved] = deque()
        self._trace = trace
        self._runner = runner
        self._clock = clock
        self._endpoint: Endpoint | None = None
        self._poller = select.poll()
        self._peers = Peers(self._poller, clock)
        self._done: deque[StepResult] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Reentrant: a signal's handler may ring while this very thread closes the bell.
        self._bell = threading.RLock()
        self._timer_s = 0.0
        self._stopping = False
        self._failure: str | None = None
        self._draining = False
        self._own_rows: list[TokenRow] = []

    # --- the loop ------------------------------------------------------------------------------

    def run(self, endpoint: Endpoint) -> None:
        """Serve `endpoint`. Returns after a drain or `stop`; closes the endpoint and the runner."""
        self._endpoint = endpoint
        self._poller.register(endpoint.fileno(), select.POLLIN)
        self._poller.register(self._wake, select.POLLIN)
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._peers.close()
            endpoint.close(flush_s=1.0)
            self._mover.close()  # it reads and writes what the runner's end unmaps
            if self._failure is None:  # else its thread hangs, and so would we
                self._runner.close()
                self._close_bell()
            self._trace.close()  # now it has the last step too
        if self._failure is not None:
            raise EngineFailed(self._failure)

    def _turn(self) -> None:
        busy = self._done or self._moved
        wait_s = 0.0 if busy else max(0.0, self._timer_s - self._clock())
        if self._peers.send_waiting():
            wait_s = min(wait_s, _RETRY_S)
        ready = [fd for fd, _ in self._poller.poll(wait_s * 1000)]
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._draining and not self.core.draining:
            self._carry_out(self.core.on_message(_SELF, Drain(), self._clock()))
        self._take_finished()
        assert self._endpoint is not None
        frames = chain(
            self._endpoint.drain(_FRAMES_A_TURN), self._peers.receive(ready, _FRAMES_A_TURN)
        )
        for peer, frame in frames:
            with self._trace.span("message"):
                self._receive(peer, frame)
            if self._done:
                break  # the device must not wait behind a crowd of messages
        if self._clock() >= self._timer_s:
            with self._trace.span("timer"):
                self._carry_out(self.core.on_timer(self._clock()))
            self._peers.close_unused()

    def _take_finished(self) -> None:
        """Steps, then moves. Raises `EngineFailed` if the runner is lost: the process ends and its
        successor, not this one, goes on with the requests."""
        while self._done:
            result = self._done.popleft()
            if result.fatal:
                assert result.error is not None
                raise from_info(result.error)
            with self._trace.span("schedule"):
                effects = self.core.on_step_done(result, self._clock())
            self._trace.count("KV blocks in use", self.core.scheduler.pool.num_held)
            with self._trace.span("launch and publish"):
                self._carry_out(effects)
        while self._moved:
            with self._trace.span("moved"):
                moved = self._moved.popleft()
                self._carry_out(self.core.on_moved(moved, self._clock()))

    def _receive(self, peer: str, frame: bytes) -> None:
        try:
            message = decode(frame)
        except VersionMismatch as exc:
            refused = Refused("attach", exc.message, code=exc.code)
            self._carry_out([Send(peer, refused)])
            return
        except ProtocolError as exc:
            log.warning(_DROPPED, peer, exc)
            return
        self._carry_out(self.core.on_message(peer, message, self._clock()))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Launch(batch=batch):
                    # Runs would hold tokens back and win nothing: batches overlap. So nobody asks
                    # for them here, nor for their early end (`Shorten`).
                    assert batch.steps == 1, "runs of steps are for simulations"
                    self._runner.launch(batch, self._finished)
                case Send(peer=peer, message=message):
                    if peer == _SELF:
                        self._own_rows += message.rows if isinstance(message, Tokens) else []
                    elif self._endpoint is not None:
                        frame = encode(message)
                        taken = self._peers.send(peer, frame)
                        if taken is None:
                            taken = self._endpoint.send(peer, frame)
                        self.core.on_sent(peer, taken, self._clock())
                case Connect(peer=peer, address=address):
                    assert self._endpoint is not None
                    self._peers.connect(peer, address, self._endpoint.name)
                case Move(job=job):
                    self._mover.start(job, self._has_moved)
                case SetTimer(at_s=at_s):
                    self._timer_s = at_s
                case Stop(failure=failure):
                    self._stopping = True
                    self._failure = failure

    def _finished(self, result: StepResult) -> None:
        """Called by the runner's thread."""
        self._done.append(result)
        self._ring()

    def _has_moved(self, moved: Moved) -> None:
        """Called by the data plane's threads."""
        self._moved.append(moved)
        self._ring()

    def reached_at(self, address: str) -> None:
        """Say on the card where peers find this instance, now that it is known."""
        card = self.core.card
        endpoints = {"control": address, **card.endpoints}
        self.core.card = msgspec.structs.replace(card, endpoints=endpoints)

    # --- from outside --------------------------------------------------------------------------

    def warm_up(self, prompt_tokens: int = 32, output_tokens: int = 4) -> None:
        """Draw real tokens before anybody may attach. Raises `EngineFailed` if that fails.

        Twice, since the first steps are slow (memory is touched, kernels are chosen), and the cost
        model would take that for the machine's speed.
        """
        self._draw("warm-up", prompt_tokens, output_tokens)
        self.core.cost = CostFitter()
        self._draw("calibration", prompt_tokens, output_tokens)

    def _draw(self, request_id: str, prompt_tokens: int, output_tokens: int) -> None:
        card = self.core.card
        prompt_tokens = max(1, min(prompt_tokens, card.max_model_len - output_tokens))
        attach = Attach(_SELF, 1, PROTOCOL_VERSION)
        self._carry_out(self.core.on_message(_SELF, attach, self._clock()))
        submit = Submit(
            request_id=request_id,
            attempt=1,
            service=_SELF,
            service_incarnation=1,
            prompt_ids=[i % card.vocab_size for i in range(prompt_tokens)],
            sampling=SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True),
        )
        self._carry_out(self.core.on_message(_SELF, submit, self._clock()))
        while not (self._own_rows and self._own_rows[-1].finish):
            select.select([self._wake], [], [])
            os.eventfd_read(self._wake)
            self._take_finished()
        error = self._own_rows[-1].error
        if error is not None:
            raise EngineFailed(f"the engine cannot produce a token: {error.message}")
        self._carry_out(self.core.on_message(_SELF, Detach(_SELF, 1), self._clock()))
        self._own_rows.clear()

    def _ring(self) -> None:
        """Wake the loop; nothing if it has ended, which it may do while somebody stops it."""
        with self._bell:
            if self._wake >= 0:
                _eventfd_write(self._wake, 1)

    def _close_bell(self) -> None:
        with self._bell:
            os.close(self._wake)
            self._wake = -1

    def drain(self) -> None:
        """Finish what runs, take nothing new, then return from `run`. From any thread or signal."""
        self._draining = True
        self._ring()

    def stop(self) -> None:
        """Return from `run` as soon as the batch in flight is done."""
        self._stopping = True
        self._ring()


def run_worker(config: WorkerConfig, build: Callable[..., Engine] = build_engine) -> int:
    """One engine instance as a process. SIGTERM drains; a second one, or SIGINT, stops. `build`:
    what takes the place of `build_engine`, with its arguments."""
    if config.parent_pid is not None:
        _die_with_parent(config.parent_pid)
    # The driver's thread must get its turn between the many small calls of the compute thread.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    trace = _open_trace(config)
    engine = build(
        config.engine,
        name=config.name,
        incarnation=config.incarnation or time.time_ns(),
        trace=trace,
        address=config.address,
        registry=config.registry,
        weights_fd=config.weights_fd,
    )
    placement.leave(engine.cpus)
    driver = InstanceDriver(engine.core, engine.runner, trace=trace, mover=engine.mover)

    def on_term(_signum: int, _frame: object) -> None:
        driver.stop() if driver.core.draining else driver.drain()

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, lambda *_: driver.stop())
    driver.warm_up()
    # What is alive now stays: the collector need not walk through all of torch in some step.
    gc.collect()
    gc.freeze()
    endpoint = listen(config.address, config.name)
    driver.reached_at(here.reachable(endpoint.address, config.registry or ""))
    announced = _announce(config, engine.core.card, endpoint.address)
    try:
        driver.run(endpoint)
    finally:
        announced.close()
        gc.unfreeze()  # some libraries complain of what is alive at the very end
    return 0


def _announce(config: WorkerConfig, card: InstanceCard, bound: str) -> Announcer | NoAnnouncer:
    if config.registry is None:
        return NoAnnouncer()
    entry = InstanceEntry(
        name=config.name,
        incarnation=card.incarnation,
        pid=os.getpid(),
        address=here.reachable(bound, config.registry),
        host=here.boot_id(),
        hostname=socket.gethostname(),
        model=card.model,
        model_digest=card.model_digest,
        layout_digest=card.layout.digest(),
        protocol_version=PROTOCOL_VERSION,
        version=__version__,
        dtype=card.dtype,
        kv_cache_dtype=card.layout.dtype,
        quantization=card.quantization,
        max_model_len=card.max_model_len,
    )
    return Announcer(config.registry, entry)


class EngineThread:
    """An instance inside this process, for `--in-process` and the offline API.

    Loads and warms up in the calling thread, so that `StartupError`s reach the caller.
    """

    def __init__(self, config: WorkerConfig) -> None:
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
        trace = _open_trace(config)
        engine = build_engine(
            config.engine,
            name=config.name,
            incarnation=config.incarnation,
            trace=trace,
            address=config.address,
        )
        self._driver = InstanceDriver(engine.core, engine.runner, trace=trace, mover=engine.mover)
        self._driver.warm_up()
        endpoint = listen(config.address, config.name)
        self._driver.reached_at(endpoint.address)
        self._thread = threading.Thread(
            target=self._driver.run, args=(endpoint,), name="penstock-engine", daemon=True
        )
        self._thread.start()
        # A daemon thread inside a kernel when the interpreter goes down crashes the process.
        atexit.register(self.close)

    def close(self) -> None:
        """Returns when the step in flight is done; a step that never ends is left behind."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._driver.stop()
            self._thread.join(_CLOSE_TIMEOUT_S)


def _open_trace(config: WorkerConfig) -> Trace:
    """A worker of a service goes on in the file that the service has begun."""
    path = config.engine.trace
    if path is not None and config.parent_pid is None:
        new_file(path)
    return open_trace(path, config.name)


def _die_with_parent(parent_pid: int) -> None:
    """SIGKILL this process when its parent ends, however that ends (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it was gone before we asked
        sys.exit(0)
