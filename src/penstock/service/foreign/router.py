"""The router of one process: takes requests, hands each to an `Exchange`, and watches the clock."""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from penstock.protocol.errors import EngineUnavailable, Overloaded, PenstockError
from penstock.service.api.auth import AdminDoor, Keys, is_admin
from penstock.service.api.errors import internal_error
from penstock.service.explain import Explainer
from penstock.service.foreign import asked as requests
from penstock.service.foreign.attempt import Attempt
from penstock.service.foreign.client import Answering, Client, Request
from penstock.service.foreign.config import RouterConfig
from penstock.service.foreign.engine import Engine
from penstock.service.foreign.exchange import Exchange, respond_error
from penstock.service.foreign.fleet import Fleet
from penstock.service.foreign.model_counts import ModelCounts
from penstock.service.foreign.pages import Pages
from penstock.service.foreign.upstream import UpstreamError
from penstock.service.generation import ServiceStatus
from penstock.service.metrics import Metrics

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
#: How often deadlines are looked at.
TICK_S = 0.25
#: An answer in one piece counts as running once its prefill should be over, and at the latest now.
_PRESUMED_S = 2.0


class _Answered:
    """Of a request that has had its answer already."""

    def gone(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


_ANSWERED = _Answered()


class Router:
    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.clock = time.perf_counter
        self.loop = asyncio.get_running_loop()
        self.fleet = Fleet(config, self.clock)
        self.metrics = Metrics("all", self.status)
        self.models = ModelCounts()
        self.explainer = Explainer(config.explain_kept)
        self.clients: set[Client] = set()
        #: Requests under way, and those of them that wait for bytes of an engine.
        self.exchanges: dict[Exchange, asyncio.Task[None]] = {}
        self.live: set[Attempt] = set()
        self.draining = False
        self._keys = Keys(config.api_keys)
        self._admin = AdminDoor(config.admin_keys)
        self._pages = Pages(self)
        self._buffered_bytes = 0

    def connection(self) -> Client:
        """The protocol factory of the listening socket."""
        return Client(self.handle, self.config, self.clients)

    # --- requests ------------------------------------------------------------------------------

    def handle(self, client: Client, request: Request) -> Answering:
        known = request.header(b"x-request-id")
        if known is not None and _REQUEST_ID.fullmatch(known):
            request.id = known.decode()
        else:
            request.id = str(uuid.uuid4())  # llama-cpp-python answers 400 to anything else
        try:
            return self._handle(client, request)
        except PenstockError as exc:
            self.metrics.on_refused(exc.code)
            respond_error(client, exc, request.id)
        except Exception as exc:
            respond_error(client, internal_error(exc), request.id)
        return _ANSWERED

    def _handle(self, client: Client, request: Request) -> Answering:
        if request.refusal is not None:
            raise request.refusal
        self._check_key(client, request)
        page = self._pages.find(request)
        if page is not None:
            page(client, request)
            return _ANSWERED
        if self.draining:
            raise EngineUnavailable("the router is stopping: try again", retry_after_s=1.0)
        self._admit(request)
        content_type = request.header(b"content-type") or b""
        asked = requests.read(request.method, request.path, content_type, request.body)
        exchange = Exchange(self, client, request, asked)
        self._buffered_bytes += len(request.body)
        self.exchanges[exchange] = self.loop.create_task(exchange.run())
        return exchange

    def closed(self, exchange: Exchange) -> None:
        del self.exchanges[exchange]
        self._buffered_bytes -= len(exchange.request.body)

    def _check_key(self, client: Client, request: Request) -> None:
        if is_admin(request.path):
            peer = client.transport.get_extra_info("peername") if client.transport else None
            where = peer if isinstance(peer, tuple) else None
            self._admin.check({"headers": request.headers, "client": where})
        else:
            self._keys.check(request.path, request.header(b"authorization"))

    def _admit(self, request: Request) -> None:
        waiting = self.metrics.waiting
        if waiting >= self.config.max_queue:
            raise Overloaded(
                f"{waiting} requests wait already (the limit is {self.config.max_queue}): "
                "try again later",
                retry_after_s=1.0,
            )
        if self._buffered_bytes + len(request.body) > self.config.max_buffered_bytes:
            raise Overloaded(
                f"the requests under way hold {self._buffered_bytes} bytes: try again later",
                retry_after_s=1.0,
            )

    # --- time ----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Nobody waits longer than was promised: engines that say nothing, clients that do not."""
        now_s = self.clock()
        for attempt in list(self.live):
            self._look_at(attempt, now_s)
        for engine in self.fleet.engines:
            engine.pool.tidy()
        loop_s = self.loop.time()
        for client in list(self.clients):
            if client.deadline_s is not None and loop_s >= client.deadline_s:
                client.expire()

    def _look_at(self, attempt: Attempt, now_s: float) -> None:
        config, engine = self.config, attempt.engine
        silent_s = now_s - attempt.news_s
        if attempt.exchange.paused:
            return  # it is the client that does not read
        if not attempt.streams and now_s - attempt.begun_s > _PRESUMED_S:
            attempt.exchange.presume_started()
        begun = attempt.committed or attempt.held_bytes > 0
        limit_s = config.stall_timeout_s if begun else config.first_byte_timeout_s
        if engine.state == "lost":
            # Its health checks fail: whoever has had nothing goes elsewhere.
            limit_s = min(limit_s, config.lost_stall_s if begun else 0.0)
        if silent_s > limit_s:
            attempt.abandon(UpstreamError(f"said nothing for {silent_s:.1f} s"))

    # --- what operators see --------------------------------------------------------------------

    def status(self) -> ServiceStatus:
        ready = self.fleet.ready and not self.draining
        reason = "" if ready else "no engine answers its health check"
        if self.draining:
            reason = "the router is stopping"
        return ServiceStatus(
            live=True,
            ready=ready,
            reason=reason,
            queue_depth=self.metrics.waiting,
            instances=[self._instance(engine) for engine in self.fleet.engines],
            num_resumed=sum(engine.counts.retried for engine in self.fleet.engines),
            facts={
                "service": self.config.name,
                "policy": self.config.policy,
                "routers": [self.config.name],
                "ttft_slo_s": self.config.ttft_slo_s,
                "tpot_slo_s": self.config.tpot_slo_s,
            },
        )

    def _instance(self, engine: Engine) -> dict[str, object]:
        now_s = self.clock()
        heard_s = engine.heard_s
        return {
            "name": engine.name,
            "state": engine.state,
            "draining": engine.drained,
            "refusal": engine.refusal,
            "address": engine.url,
            "silent_s": None if heard_s is None else now_s - heard_s,
            "queue": engine.queued + int(engine.others_queued),
            "running": engine.running + int(engine.others_running),
            "queued_tokens": engine.queued_tokens,
            "running_tokens": engine.running_tokens,
            "ttft_s": engine.recent_ttft_s.summary(now_s, self.config.ttft_slo_s),
            "tpot_s": engine.recent_tpot_s.summary(now_s, self.config.tpot_slo_s),
            "ttft_ratio": engine.ttft.ratio,
        }

    # --- the end -------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take nothing new; what runs goes on."""
        self.draining = True
        for client in list(self.clients):
            client.close_if_idle()

    async def finished(self, timeout_s: float) -> None:
        """Wait for what runs, so long; then tell whoever still waits."""
        if self.exchanges:
            await asyncio.wait(list(self.exchanges.values()), timeout=timeout_s)
        for exchange in list(self.exchanges):
            exchange.stop(EngineUnavailable("was given up: the router was stopped"))
        if self.exchanges:
            await asyncio.wait(list(self.exchanges.values()), timeout=1.0)
        for client in list(self.clients):
            if client.transport is not None:
                client.transport.close()
        for engine in self.fleet.engines:
            engine.pool.close()
