"""One request from its arrival to the end of its answer: which engines are tried, and what of that
the client sees. Each request gets one answer, of one engine, or one error of ours."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import msgspec

from penstock.protocol.errors import EngineUnavailable, Overloaded, PenstockError
from penstock.service.api.errors import error_body, internal_error
from penstock.service.explain import PlacementRecord, Record
from penstock.service.foreign.asked import Asked
from penstock.service.foreign.attempt import RETRIED, Attempt
from penstock.service.foreign.client import Client, Request
from penstock.service.foreign.engine import Engine
from penstock.service.foreign.fleet import Choice
from penstock.service.foreign.headers import end_to_end, forwarded_for
from penstock.service.foreign.upstream import UpstreamError

if TYPE_CHECKING:
    from penstock.service.foreign.router import Router

log = logging.getLogger("penstock.requests")

#: Ours to say, or not for engines: bodies are read here, so they come uncompressed.
_OURS = frozenset(
    (b"host", b"content-length", b"expect", b"accept-encoding", b"x-request-id", b"x-forwarded-for")
)


class Exchange:
    """`Answering` for the client's connection. All times by `clock`, in seconds."""

    def __init__(self, router: Router, client: Client, request: Request, asked: Asked) -> None:
        self.router = router
        self.config = router.config
        self.clock = router.clock
        self.loop = router.loop
        self.client = client
        self.request = request
        self.asked = asked
        self.attempt: Attempt | None = None
        self.gone_away = False
        #: The client has had a byte of an answer.
        self.begun = False
        self.num_tokens = router.fleet.tokens_of(asked)
        now_s = self.clock()
        self.record = Record(
            request_id=request.id, choice=0, accepted_s=now_s, prompt_tokens=self.num_tokens
        )
        self.metrics = (
            router.metrics.start_request([self.num_tokens], 1, asked.max_tokens or 0)
            if asked.generates
            else None
        )
        self._tried: list[Engine] = []
        self._refused: Attempt | None = None
        #: They answered 500, which some do to a bad request: whose fault it is, another one shows.
        self._suspects: list[Engine] = []
        self._failure: PenstockError | None = None
        self._work_tokens = self._hit_tokens = 0
        self._ahead_tokens = 0.0
        self._rows = 0.0
        self.started = False
        self._first_s = self._last_s = now_s
        self.num_tokens_out = 0
        self.paused = False

    # --- Answering -----------------------------------------------------------------------------

    def gone(self) -> None:
        self.gone_away = True
        if self.attempt is not None:
            self.attempt.abandon(UpstreamError("its client went away"))

    def pause(self) -> None:
        self.paused = True
        if self.attempt is not None and self.attempt.connection is not None:
            self.attempt.connection.pause()

    def resume(self) -> None:
        self.paused = False
        if self.attempt is not None and self.attempt.connection is not None:
            self.attempt.news_s = self.clock()
            self.attempt.connection.resume()

    def stop(self, error: PenstockError) -> None:
        """The router ends: whoever still waits is told so."""
        if self.attempt is not None:
            self._tried = list(self.router.fleet.engines)
            self.attempt.abandon(UpstreamError(error.message))

    # --- the life of a request -----------------------------------------------------------------

    async def run(self) -> None:
        end = "error"
        try:
            end = await self._run()
        except PenstockError as exc:
            self._refuse(exc)
        except Exception as exc:
            self._refuse(internal_error(exc))
        finally:
            self._close(end)

    async def _run(self) -> str:
        """How it ended, in the words of the metrics."""
        fleet = self.router.fleet
        while True:
            try:
                choice = fleet.choose(self.asked, avoid=self._tried)
            except PenstockError as exc:
                return self._give_up(exc)
            engine = choice.engine
            error = await self._try(choice)
            attempt = self.attempt
            self.attempt = None
            if self.gone_away:
                return "abort"
            if error is None:
                assert attempt is not None
                if attempt.committed:
                    return "stop"
                self._tried.append(engine)
                if attempt.status not in RETRIED or not self._may_retry(attempt):
                    attempt.send_whole()
                    return "stop" if attempt.status < 400 else "error"
                self._refused = attempt
            else:
                self._tried.append(engine)
                if attempt is not None and attempt.committed:
                    self._break_off(attempt, error)
                    return "error"
                self._failure = EngineUnavailable(f"engine {engine.name} {error.what}")
                if not self._may_retry(attempt):
                    return self._give_up(self._failure)
            engine.counts.retried += 1

    def _may_retry(self, attempt: Attempt | None) -> bool:
        """What was never sent may always go elsewhere."""
        sent = attempt is not None and attempt.sent
        more = len(self._tried) <= self.config.max_retries
        return more and (self.asked.repeatable or not sent)

    def _give_up(self, error: PenstockError) -> str:
        """An engine's own refusal says more than ours."""
        if self._refused is not None and not self.gone_away:
            self._refused.send_whole()
            return "error"
        error = self._failure or error
        if self._tried and not isinstance(error, Overloaded):
            names = ", ".join(engine.name for engine in self._tried)
            error = EngineUnavailable(
                f"{error.message} (tried: {names})", retry_after_s=error.retry_after_s or 1.0
            )
        raise error

    async def _try(self, choice: Choice) -> UpstreamError | None:
        """None: the answer is whole, and what was held of it is in `self.attempt`."""
        engine = choice.engine
        self._place(choice)
        engine.breaker.begin()
        fresh = False
        error: UpstreamError | None = UpstreamError("could not be asked")
        try:
            while True:
                error = await self._ask(engine, fresh)
                if error is None or not error.stale or self.gone_away:
                    return error
                fresh = True  # the engine had closed the connection that we kept
        finally:  # whatever happens, the engine is not charged with it any longer
            self._leave(engine, error)

    async def _ask(self, engine: Engine, fresh: bool) -> UpstreamError | None:
        self.attempt = attempt = Attempt(self, engine, self.clock())
        connection = None if fresh else engine.pool.idle()
        if connection is None:
            try:
                connection = await engine.pool.connect()
            except UpstreamError as exc:
                return exc
            if attempt.done.done():  # meanwhile the client has left
                connection.abandon()
                return attempt.done.result()
        attempt.connection, attempt.sent = connection, True
        self.router.live.add(attempt)
        try:
            connection.ask(
                self._head_for(engine) + self.request.body, attempt, self.request.method == "HEAD"
            )
            if self.paused:
                connection.pause()
            return await attempt.done
        finally:
            self.router.live.discard(attempt)
            if not attempt.done.done():  # a failure of ours: nobody waits for the answer
                connection.abandon()

    def _head_for(self, engine: Engine) -> bytes:
        request, host = self.request, engine.pool.netloc
        lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.target), b"host: " + host]
        own_key = self.config.engine_api_key
        hides = own_key is not None or bool(self.config.api_keys)
        headers = end_to_end(request.headers)
        for name, value in headers:
            if name not in _OURS and not (hides and name == b"authorization"):
                lines.append(name + b": " + value)
        lines.append(b"x-request-id: " + request.id.encode())
        lines.append(b"x-forwarded-for: " + forwarded_for(headers, self.client.peer))
        if own_key is not None:
            lines.append(b"authorization: Bearer " + own_key.encode())
        if request.body or request.method in ("POST", "PUT", "PATCH"):
            lines.append(b"content-length: %d" % len(request.body))
        lines.append(b"\r\n")
        return b"\r\n".join(lines)

    # --- what engines are charged with ---------------------------------------------------------

    def _place(self, choice: Choice) -> None:
        engine, decision, now_s = choice.engine, choice.decision, self.clock()
        self._hit_tokens = choice.hit_tokens
        self._work_tokens = max(1, self.num_tokens - self._hit_tokens)
        self._ahead_tokens, self._rows = engine.queued_tokens, engine.running
        self.started = False
        engine.placed(self._work_tokens)
        engine.sent.sent(self.asked.keys)
        placement = PlacementRecord(
            attempt=len(self._tried) + 1,
            instance=engine.name,
            at_s=0.0,
            because="new" if not self._tried else "moved: the engine before failed or refused",
            decision=decision,
            num_tokens=self.num_tokens,
            predicted_ttft_s=decision.predicted_ttft_s or None,
            predicted_cached_tokens=self._hit_tokens,
        )
        self.record.placed(placement, now_s)

    def on_events(self, attempt: Attempt, count: int) -> None:
        """Whole events of a stream: about a token each. The hot path."""
        self._last_s = attempt.news_s
        if not self.started:
            self._start(attempt)
        if count > 0:
            self.num_tokens_out += count
            if self.metrics is not None:
                self.metrics.on_tokens(0, count)

    def _start(self, attempt: Attempt) -> None:
        """The first event."""
        engine, now_s = attempt.engine, attempt.news_s
        self.started, self._first_s = True, now_s
        engine.started(self._work_tokens, self.num_tokens)
        placement = self.record.started(self._hit_tokens, None, now_s)
        placement.cached_tokens = None  # nobody has said
        predicted_s, ttft_s = placement.predicted_ttft_s, placement.actual_ttft_s
        if not self.asked.generates or ttft_s is None:
            return
        engine.cost.first_token(self._ahead_tokens + self._work_tokens, self._rows, ttft_s)
        engine.recent_ttft_s.add(ttft_s, now_s)
        if predicted_s:
            engine.ttft.observe(predicted_s, ttft_s)

    def presume_started(self) -> None:
        """Of an answer that comes whole nobody sees the first token."""
        if self.attempt is not None and not self.started:
            self.started = True
            self.attempt.engine.started(self._work_tokens, self.num_tokens)

    def _leave(self, engine: Engine, error: UpstreamError | None) -> None:
        attempt, now_s = self.attempt, self.clock()
        assert attempt is not None
        engine.left(self.started, self._work_tokens, self.num_tokens)
        self._judge(engine, attempt, error, now_s)
        if error is None and attempt.status == 200 and self.asked.generates:
            self._learn(engine, attempt, now_s)
        end = f"{engine.name} {error.what}" if error else f"HTTP {attempt.status}"
        self.record.left(end, self.num_tokens_out, self._last_s, now_s)

    def _judge(
        self, engine: Engine, attempt: Attempt, error: UpstreamError | None, now_s: float
    ) -> None:
        status = attempt.status
        if self.gone_away:
            engine.breaker.undecided()
        elif error is None and status == 500:
            self._suspects.append(engine)
            engine.breaker.undecided()
            engine.counts.failures += 1
        elif error is not None or (status in RETRIED and status != 429):
            engine.breaker.failed(now_s)
            engine.counts.failures += 1
            if error is not None:
                log.warning("engine %s %s", engine.name, error.what)
        else:
            engine.breaker.succeeded()
            for suspect in self._suspects if status < 400 else ():
                suspect.breaker.failed(now_s)
        if status in (429, 503):
            engine.counts.refusals += 1
            value = next((v for n, v in attempt.headers if n == b"retry-after"), b"")
            if value.strip().isdigit():
                engine.pause(float(value), now_s)

    def _learn(self, engine: Engine, attempt: Attempt, now_s: float) -> None:
        """From an answer that came whole: speed, and what its engine counted."""
        fleet = self.router.fleet
        counted, cached = attempt.completion_tokens, attempt.cached_tokens
        prompt = attempt.prompt_tokens
        count = counted if counted is not None else self.num_tokens_out
        rows = max(1.0, engine.running + 1.0)
        if attempt.streams:
            if count > 1:
                tpot_s = (self._last_s - self._first_s) / (count - 1)
                engine.cost.further_tokens(count - 1, rows, self._last_s - self._first_s)
                engine.recent_tpot_s.add(tpot_s, now_s)
        else:
            work = self._ahead_tokens + self._work_tokens
            engine.cost.whole(work, count, rows, now_s - attempt.begun_s)
            if self.metrics is not None and count:
                self.metrics.on_tokens(0, count)
            self.num_tokens_out = count
        fleet.generated(count)
        if prompt is not None:
            fleet.bytes_per_token.observe(self.asked.model, self.asked.prompt_bytes, prompt)
        if cached is not None and prompt:
            fleet.audit.observe(engine.name, self._hit_tokens, cached, prompt)
            self.record.placements[-1].cached_tokens = cached
        if attempt.response_id is not None:
            fleet.remember_response(attempt.response_id, engine)
        engine.counts.prompt_tokens += prompt if prompt is not None else self.num_tokens
        engine.counts.cached_tokens += cached or 0
        engine.counts.generation_tokens += count
        model = self.router.models.of(self.asked.model, is_real=True)
        model.prompt_tokens += prompt if prompt is not None else self.num_tokens
        model.generation_tokens += count

    # --- ends ----------------------------------------------------------------------------------

    def _refuse(self, error: PenstockError) -> None:
        """An error of ours: the answer, or the end of one that has begun and is not complete."""
        self.router.metrics.on_refused(error.code)
        if self.begun:
            if self.client.answers(self.request):
                self.client.abort()
        elif not self.gone_away:
            respond_error(self.client, error, self.request.id)

    def _break_off(self, attempt: Attempt, error: UpstreamError) -> None:
        """The answer had begun. Of a stream, the client is told in its own shape; of anything
        else, by a body that is shorter than it should be."""
        if not attempt.streams:
            self.client.abort()
            return
        failure = EngineUnavailable(
            f"engine {attempt.engine.name} {error.what} before the answer was complete"
        )
        event = b"data: " + msgspec.json.encode(error_body(failure)) + b"\n\n"
        attempt.end_with(event + b"data: [DONE]\n\n")

    def _close(self, end: str) -> None:
        self.router.closed(self)
        if self.metrics is not None:
            if end == "stop":
                self.metrics.on_finish(0, "stop")
            self.metrics.close(end)
        if self.asked.generates:
            is_real = end == "stop" or self.router.fleet.lists(self.asked.model)
            model = self.router.models.of(self.asked.model, is_real)
            model.requests += 1
            model.failures += end == "error"
            self.record.ended(end, self.num_tokens_out, self._last_s)
            self.router.explainer.keep(self.record)
        if self.config.log_requests:
            self._log(end)

    def _log(self, end: str) -> None:
        log.info(
            "%s %s %s %s %.3f s [%s]",
            self.request.method,
            self.request.path.encode("unicode_escape").decode()[:200],
            ">".join(engine.name for engine in self._tried) or "-",
            end,
            self.clock() - self.record.accepted_s,
            self.request.id,
        )


def respond(client: Client, status: int, body: bytes, content_type: bytes, request_id: str) -> None:
    """A whole answer of the router's own."""
    headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
    ]
    client.write(client.head(status, headers) + body)
    client.finish()


def respond_error(client: Client, error: PenstockError, request_id: str) -> None:
    body = msgspec.json.encode(error_body(error))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
    ]
    if error.retry_after_s is not None or error.http_status == 429:
        seconds = max(1, math.ceil(error.retry_after_s or 1.0))
        headers.append((b"retry-after", b"%d" % seconds))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    client.write(client.head(error.http_status, headers) + body)
    client.finish()
