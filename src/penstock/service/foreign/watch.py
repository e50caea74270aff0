"""Asks each engine how it is: health, models, and how much others have running there."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import msgspec

from penstock.service.foreign.config import RouterConfig
from penstock.service.foreign.engine import Engine
from penstock.service.foreign.fleet import Fleet
from penstock.service.foreign.headers import Headers
from penstock.service.foreign.upstream import UpstreamError

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 4 << 20
#: What engines call the requests that they run and that wait there: vLLM, SGLang, llama.cpp, ours.
_RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs",
            "llamacpp:requests_processing", "penstock:num_requests_running")  # fmt: skip
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs",
            "llamacpp:requests_deferred", "penstock:num_requests_waiting")  # fmt: skip
_SAMPLE = re.compile(rb"^([a-z_]+:[a-z_]+)(?:\{[^}\n]*\})? (\S{1,64})", re.MULTILINE)
#: More requests than an engine has: such a figure is none.
_TOO_MANY = 1e6


def _number(value: bytes) -> float:
    """Of requests; 0 for what cannot be one, such as NaN and +Inf."""
    try:
        number = float(value)
    except ValueError:
        return 0.0
    return number if 0.0 <= number <= _TOO_MANY else 0.0


class _Whole:
    """A sink that keeps a small answer."""

    def __init__(self) -> None:
        self.done: asyncio.Future[UpstreamError | None] = asyncio.Future()
        self.status = 0
        self.body = bytearray()

    def on_head(self, status: int, headers: Headers) -> None:
        self.status = status

    def on_body(self, data: bytes) -> None:
        if len(self.body) < _MAX_BODY_BYTES:
            self.body += data

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def on_failure(self, error: UpstreamError) -> None:
        if not self.done.done():
            self.done.set_result(error)


class Watch:
    """One task for each engine."""

    def __init__(self, fleet: Fleet, config: RouterConfig) -> None:
        self._fleet = fleet
        self._config = config
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._watch(e)) for e in self._fleet.engines]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, engine: Engine) -> None:
        models_at_s = 0.0
        mistake = ""
        while True:
            try:
                await self.check(engine)
                now_s = self._fleet.clock()
                if engine.state in ("active", "draining") and now_s >= models_at_s:
                    await self.ask_models(engine)
                    models_at_s = self._fleet.clock() + self._config.models_every_s
                if engine.state == "active":
                    await self.ask_load(engine)
            except UpstreamError as exc:
                log.debug("engine %s %s", engine.name, exc.what)
            except Exception as exc:
                # Ours, but a watch that ends leaves its engine as it was, for good. Told once.
                if repr(exc) != mistake:
                    log.exception("engine %s could not be looked at", engine.name)
                mistake = repr(exc)
            await asyncio.sleep(self._config.health_every_s)

    async def check(self, engine: Engine) -> None:
        """Its /health; servers without one are asked for their models. One that sends answers
        meanwhile lives, though it be too busy to say so (llama-cpp-python computes in its loop)."""
        began_s = self._fleet.clock()
        try:
            status, _ = await self.get(engine, "/health")
            if status in (404, 405, 501):
                status, _ = await self.get(engine, "/v1/models")
            problem = "" if status < 500 else f"answers its health check with {status}"
        except UpstreamError as exc:
            problem = "" if engine.spoke_s > began_s else exc.what
        if not problem:
            self._well(engine)
        else:
            self._unwell(engine, problem)

    def _well(self, engine: Engine) -> None:
        engine.failed_checks, engine.refusal = 0, ""
        engine.heard_s = self._fleet.clock()
        if engine.state in ("connecting", "lost"):
            log.info("engine %s is up", engine.name)
            engine.state = "draining" if engine.drained else "active"

    def _unwell(self, engine: Engine, problem: str) -> None:
        engine.failed_checks += 1
        engine.refusal = problem
        if engine.failed_checks < self._config.health_failures or engine.state == "lost":
            return
        if engine.state in ("active", "draining"):
            log.warning("engine %s is lost: it %s", engine.name, problem)
            engine.state = "lost"
            engine.sent.clear()  # whoever comes back has, as a rule, been started anew
        engine.others_queued = engine.others_running = 0.0

    async def ask_models(self, engine: Engine) -> None:
        status, body = await self.get(engine, "/v1/models")
        if status != 200:
            return  # it has no list: it is taken to serve whatever is asked of it
        try:
            cards: Any = msgspec.json.decode(body)["data"]
            engine.models = {str(card["id"]): card for card in cards}
        except (msgspec.DecodeError, KeyError, TypeError):
            log.warning("engine %s: /v1/models is no list of models", engine.name)

    async def ask_load(self, engine: Engine) -> None:
        """Requests there that are not ours: other routers', or direct ones."""
        status, body = await self.get(engine, "/metrics")
        if status != 200:
            return
        values: dict[str, float] = {}
        for name, value in _SAMPLE.findall(body):
            key = name.decode()
            if key in _RUNNING or key in _WAITING:
                values[key] = values.get(key, 0.0) + _number(value)
        running = sum(values.get(name, 0.0) for name in _RUNNING)
        waiting = sum(values.get(name, 0.0) for name in _WAITING)
        engine.others_running = max(0.0, running - engine.running)
        engine.others_queued = max(0.0, waiting - engine.queued)

    async def get(self, engine: Engine, path: str) -> tuple[int, bytes]:
        """Raises `UpstreamError`, also when it takes too long."""
        sink, connection = _Whole(), None
        try:
            async with asyncio.timeout(self._config.health_timeout_s):
                connection = await engine.pool.connect()
                connection.ask(self._request(engine, path), sink, last=True)
                error = await sink.done
        except TimeoutError:
            error = UpstreamError(f"did not answer within {self._config.health_timeout_s:g} s")
        finally:
            if connection is not None:
                connection.abandon()  # ours alone: it is never kept for another request
        if error is not None:
            raise error
        return sink.status, bytes(sink.body)

    def _request(self, engine: Engine, path: str) -> bytes:
        lines = [f"GET {path} HTTP/1.1".encode(), b"host: " + engine.pool.netloc]
        if self._config.engine_api_key is not None:
            lines.append(b"authorization: Bearer " + self._config.engine_api_key.encode())
        return b"\r\n".join([*lines, b"connection: close", b"", b""])
