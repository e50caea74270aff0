"""The driver of the service's core: asyncio, endpoints to instances, and streams to the API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from penstock.protocol.codec import decode, encode
from penstock.protocol.effects import Effect, Reply, Send, SetTimer
from penstock.protocol.errors import EngineUnavailable, PenstockError, ProtocolError
from penstock.protocol.instance import InstanceCard
from penstock.protocol.kv import Refused
from penstock.protocol.transport.base import Endpoint
from penstock.protocol.transport.open import connect
from penstock.repeats import OneASecond
from penstock.service.cluster.roster import NobodyHere, Roster
from penstock.service.core import ServiceCore
from penstock.service.generation import GenerationSpec, ServiceStatus, TokenDelta
from penstock.service.operations import CoreOperations
from penstock.trace import NO_TRACE, Trace

log = logging.getLogger(__name__)
_DROPPED = "dropped a frame from %s: %s"
log.addFilter(OneASecond(_DROPPED))

#: Frames taken in before other tasks of the loop get their turn.
_FRAMES_A_TURN = 64
#: How often a connection to a lost instance is made anew.
_RENEW_EVERY_S = 1.0


class Stream:
    """A `TokenStream`. What it buffers is bounded by the request's own max_tokens: an engine never
    waits for a client that reads slowly, and a slow client costs its own answer's size at most."""

    __slots__ = ("_deltas", "_driver", "_open", "_request_id", "_waiter")

    def __init__(self, driver: ServiceDriver, request_id: str, num_choices: int) -> None:
        self._driver = driver
        self._request_id = request_id
        self._open = set(range(num_choices))
        self._deltas: list[TokenDelta] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, delta: TokenDelta) -> bool:
        """Called by the driver. True when this was the last delta of the last choice."""
        self._deltas.append(delta)
        if delta.finish is not None:
            self._open.discard(delta.choice)
        self._wake()
        return not self._open

    async def next(self) -> list[TokenDelta]:
        while not self._deltas:
            if not self._open:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken, self._deltas = self._deltas, []
        return taken

    def cancel(self, choice: int | None = None) -> None:
        if not self._open if choice is None else choice not in self._open:
            return
        self._open = set() if choice is None else self._open - {choice}
        self._driver.cancel(self._request_id, choice)
        self._deltas = [d for d in self._deltas if choice is not None and d.choice != choice]
        self._wake()

    @property
    def ended(self) -> bool:
        return not self._open

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ServiceDriver:
    """Implements `Generator`. Belongs to one running event loop."""

    def __init__(
        self,
        core: ServiceCore,
        *,
        on_active: Callable[[str], None] = lambda _: None,
        on_lost: Callable[[str], None] = lambda _: None,
        on_broken: Callable[[BaseException], None] = lambda _: None,
        trace: Trace = NO_TRACE,
        roster: Roster | None = None,
    ) -> None:
        """Told by name: instances that take work, and instances that are lost (silence included).

        `on_broken`: the core itself has raised. Its state cannot be trusted; the process should
        end, since a service that half works lets requests hang.
        """
        self.core = core
        self._trace = trace
        self._on_active = on_active
        self._on_lost = on_lost
        self._on_broken = on_broken
        self._loop = asyncio.get_running_loop()
        self._endpoints: dict[str, Endpoint] = {}
        self._connected_s: dict[str, float] = {}
        self._streams: dict[str, Stream] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._active: set[str] = set()
        self._closing = False
        #: What /health says where there is no instance at all.
        self.nobody = "none started"
        #: What /admin says of this service beyond what the core knows.
        self.facts: dict[str, object] = {}
        self.operations = CoreOperations(
            core, self._carry_out, self._loop.time, roster or NobodyHere(), self._reconnect
        )

    # --- instances -----------------------------------------------------------------------------

    def connect(self, name: str, address: str) -> None:
        self._open(name, address)
        self._carry_out(self.core.add_instance(name, self._loop.time()))

    def replace(self, name: str, address: str) -> None:
        """A new process goes by this name: what ran on the old one goes on elsewhere, or here."""
        self._close_endpoint(name)
        self._open(name, address)
        self.core.doubt(name, "")
        self.instance_lost(name, coming_back=True)

    def _reconnect(self, name: str) -> None:
        endpoint = self._endpoints.get(name)
        if endpoint is not None:
            self._close_endpoint(name)
            self._open(name, endpoint.address)

    def refuse(self, name: str, reason: str) -> None:
        """It is there and not used; /health and /admin say why."""
        if name not in self.core.instances:
            self._carry_out(self.core.add_instance(name, self._loop.time()))
        self._close_endpoint(name)
        self._active.discard(name)
        self._carry_out(self.core.on_instance_refused(name, reason, self._loop.time()))

    def remove(self, name: str) -> None:
        self._active.discard(name)
        self._carry_out(self.core.remove_instance(name, self._loop.time()))
        self._close_endpoint(name)

    def still_lives(self, name: str) -> bool:
        return self.core.instances[name].state in ("active", "suspect")

    def lead(self, term: int | None, *, elected: bool = False) -> None:
        """From now on this service leads, in that term; or not any more."""
        log.info("this service %s", "follows" if term is None else f"leads, in term {term}")
        self._carry_out(self.core.lead(term, self._loop.time(), elected=elected))

    def _close_endpoint(self, name: str) -> None:
        endpoint = self._endpoints.pop(name, None)
        if endpoint is not None:
            self._loop.remove_reader(endpoint.fileno())
            endpoint.close(flush_s=0.5)

    def _open(self, name: str, address: str) -> None:
        endpoint = connect(address, self.core.config.name, name)
        self._endpoints[name] = endpoint
        self._connected_s[name] = self._loop.time()
        self._loop.add_reader(endpoint.fileno(), self._guarded, self._readable, endpoint)

    def _guarded(self, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception as exc:
            log.exception("the service's core is broken")
            self._on_broken(exc)

    def _renew_connections(self) -> None:
        """Who connects under our name cuts us off, and ZeroMQ does not tell: the old connection
        stands and carries nothing. Neither does it try again after a handshake between a side with
        a cluster secret and one without."""
        now = self._loop.time()
        for name, endpoint in list(self._endpoints.items()):
            instance, trouble = self.core.instances[name], endpoint.trouble()
            if trouble and trouble != instance.refusal:
                log.warning("%s: %s", name, trouble)
                self.core.doubt(name, trouble)
            broken = instance.state in ("lost", "refused") or (
                trouble and instance.state == "connecting"
            )
            if broken and now - self._connected_s[name] > _RENEW_EVERY_S:
                self._close_endpoint(name)
                self._open(name, endpoint.address)

    def is_active(self, name: str) -> bool:
        return name in self._active

    def instance_lost(self, name: str, coming_back: bool) -> None:
        self.core.expect(name, coming_back)
        self._active.discard(name)
        self._carry_out(self.core.on_instance_lost(name, self._loop.time()))

    def _readable(self, endpoint: Endpoint) -> None:
        for peer, frame in endpoint.drain(_FRAMES_A_TURN):
            try:
                message = decode(frame)
            except ProtocolError as exc:
                log.warning(_DROPPED, peer, exc)
                self.core.doubt(peer, exc.message)
                continue
            if isinstance(message, Refused):
                # A plan that a change of role has overtaken is no news: it is made again.
                level = logging.DEBUG if message.code == "stale_epoch" else logging.WARNING
                log.log(level, "%s refused %s: %s", peer, message.what, message.reason)
            with self._trace.span(type(message).__name__):
                self._carry_out(self.core.on_message(peer, message, self._loop.time()))
        self._watch_states()

    def _watch_states(self) -> None:
        for name, instance in self.core.instances.items():
            if instance.state == "active" and name not in self._active:
                self._active.add(name)
                self._on_active(name)
            elif instance.state == "drained" and name in self._active:
                self._active.discard(name)
                log.info("%s is drained", name)
                self._on_lost(name)
            elif instance.state in ("lost", "refused") and name in self._active:
                self._active.discard(name)
                if instance.leaving_since_s is not None:
                    log.info("%s has ended, as it was told to", name)
                    self._on_lost(name)
                    continue
                word = "lost" if instance.state == "lost" else f"refused ({instance.refusal})"
                log.warning("%s is %s; its requests go on elsewhere or wait for it", name, word)
                self._on_lost(name)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply(request_id=request_id, event=event):
                    stream = self._streams.get(request_id)
                    if stream is not None and stream.push(event):
                        del self._streams[request_id]
                case Send(peer=peer, message=message):
                    endpoint = self._endpoints.get(peer)
                    if endpoint is None or not endpoint.send(peer, encode(message)):
                        log.debug("%s did not take a %s", peer, type(message).__name__)
                case SetTimer(at_s=at_s):
                    if self._timer is not None:
                        self._timer.cancel()
                    self._timer = self._loop.call_at(at_s, self._guarded, self._on_timer)

    def _on_timer(self) -> None:
        self._renew_connections()
        self.operations.follow_roster()
        led = self.core.roles.term is not None
        self._carry_out(self.core.on_timer(self._loop.time()))
        if led and self.core.roles.has_yielded:
            self.facts["leader"] = None
            log.warning(
                "another service gives these instances roles, and its word is newer: this one "
                "leaves it to that. Give both the same --registry, and they elect a leader"
            )
        self._watch_states()

    # --- Generator -----------------------------------------------------------------------------

    @property
    def card(self) -> InstanceCard | None:
        for instance in self.core.instances.values():
            if instance.card is not None:
                return instance.card
        return None

    def submit(self, spec: GenerationSpec) -> Stream:
        if self._closing:
            raise EngineUnavailable("the server is shutting down: try another one, or later")
        if self.card is None:
            raise EngineUnavailable(
                "the engine is still starting: wait for /health to say ready", retry_after_s=1.0
            )
        with self._trace.span("submit"):
            effects = self.core.submit(spec, self._loop.time())
        stream = self._streams[spec.request_id] = Stream(self, spec.request_id, spec.n)
        self._carry_out(effects)
        return stream

    def cancel(self, request_id: str, choice: int | None) -> None:
        """For streams: the engine frees the choice within a step."""
        self._carry_out(self.core.cancel(request_id, choice, self._loop.time()))
        stream = self._streams.get(request_id)
        if stream is not None and stream.ended:
            del self._streams[request_id]

    def status(self) -> ServiceStatus:
        now = self._loop.time()
        instances: list[dict[str, object]] = [
            {
                "name": i.name,
                "state": i.state,
                "pid": card.pid if card else None,
                "incarnation": i.incarnation,
                "role": i.role,
                "epoch": i.epoch,
                "draining": not i.takes_work and i.state == "active",
                "refusal": i.refusal,
                "address": self._endpoints[i.name].address if i.name in self._endpoints else None,
                "silent_s": now - i.heard_s,
                "queue": len(i.entries) - i.running,
                "queued_tokens": i.queued_tokens,
                "running": i.running,
                "running_tokens": i.running_tokens,
                "card": card,
                "load": i.load,
                "ttft_s": i.outcomes.recent_ttft_s.summary(now),
                "tpot_s": i.outcomes.recent_tpot_s.summary(now),
                "ttft_ratio": i.outcomes.ttft_ratio,
                "role_changes": i.role_changes,
                "outcomes": i.outcomes,
            }
            for i in self.core.instances.values()
            for card in [None if i.state == "drained" else i.card]
        ]
        ready = self.core.ready and not self._closing
        reason = ""
        if self._closing:
            reason = "the server is shutting down"
        elif not ready:
            states = ", ".join(f"{i.name}: {i.state}" for i in self.core.instances.values())
            reason = f"no engine has produced a token yet ({states or self.nobody})"
        refusals = [i.refusal for i in self.core.instances.values() if i.refusal]
        placement = self.core.placement
        return ServiceStatus(
            live=True,
            ready=ready,
            reason="; ".join(filter(None, (reason, *refusals))),
            queue_depth=placement.num_queued,
            instances=instances,
            num_resumed=placement.num_resumed,
            facts=self.facts
            | {
                "service": self.core.config.name,
                "handovers": placement.num_handovers,
                "migrated": placement.num_migrated,
                "recoveries": placement.recoveries.by_way,
                "role_changes": sum(i.role_changes for i in self.core.instances.values()),
            },
        )

    # --- the end -------------------------------------------------------------------------------

    def refuse_new(self) -> None:
        self._closing = True

    @property
    def closing(self) -> bool:
        return self._closing

    def end_all(self, error: PenstockError) -> None:
        """Whatever still lives ends with `error`."""
        self._carry_out(self.core.close_all(error))

    def close(self, error: PenstockError) -> None:
        """`end_all`, and let go of the instances."""
        self.end_all(error)
        if self._timer is not None:
            self._timer.cancel()
        for name in list(self._endpoints):
            self._close_endpoint(name)  # in the background it still sends what detaches us
        self._trace.close()
