"""A registry inside a router, for clusters that have no etcd: its server and its client.

Frames go over the same transport as everything else between processes, so the cluster's secret
guards them too. What the server knows is lost when its process ends; who is registered then comes
again within a third of its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from penstock.protocol.transport.base import Endpoint
from penstock.protocol.transport.open import connect, listen
from penstock.registry.base import Deleted, Event, Listing, Put, RegistryGone
from penstock.registry.leases import Leases
from penstock.repeats import OneASecond

log = logging.getLogger(__name__)
_DROPPED = "dropped a call of %s: %s"
log.addFilter(OneASecond(_DROPPED))

NAME = "registry"
#: A call that is not answered is repeated, and given up in the end.
_REPEAT_S = 0.25
_CALL_S = 2.0
#: How often a watch asks whether it has missed anything.
_BEAT_S = 1.0
_LOOK_S = 0.1
_FRAMES_A_TURN = 256


class _Call(msgspec.Struct, frozen=True, array_like=True):
    number: int
    verb: str
    arguments: list[Any]


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    """Of a call (`number` is the call's), or of a watch (`number` counts its changes)."""

    number: int
    result: Any
    watch: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode_call = msgspec.msgpack.Decoder(_Call).decode
_decode_answer = msgspec.msgpack.Decoder(_Answer).decode


class _Watch:
    __slots__ = ("heard_s", "number", "prefix")

    def __init__(self, prefix: str, now: float) -> None:
        self.prefix = prefix
        self.number = 0
        self.heard_s = now


#: A watcher that has not asked for this long is gone.
_FORGET_S = 10.0


class RegistryServer:
    """Serves at `address` while the running loop runs. Raises `ConfigError`."""

    def __init__(
        self,
        address: str,
        *,
        open_endpoint: Callable[[str, str], Endpoint] = listen,
        first_lease: int | None = None,
    ) -> None:
        """`first_lease`: above all leases of earlier lives of the same registry."""
        self._endpoint = open_endpoint(address, NAME)
        self.address = self._endpoint.address
        self._leases = Leases(time.time_ns() if first_lease is None else first_lease)
        self._watches: dict[tuple[str, int], _Watch] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._endpoint.fileno(), self._readable)
        self._timer = self._loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        self._leases.expire(now)
        self._publish()
        self._watches = {k: w for k, w in self._watches.items() if now - w.heard_s < _FORGET_S}
        self._timer = self._loop.call_later(_LOOK_S, self._look)

    def _readable(self) -> None:
        for peer, frame in self._endpoint.drain(_FRAMES_A_TURN):
            try:
                call = _decode_call(frame)
                result = self._act(peer, call)
            except (msgspec.DecodeError, TypeError, ValueError) as exc:
                log.warning(_DROPPED, peer, exc)
                continue
            self._publish()  # in order: changes before the answer that tells of them
            self._endpoint.send(peer, _encode(_Answer(call.number, result)))

    def _act(self, peer: str, call: _Call) -> Any:
        now, leases = self._loop.time(), self._leases
        match call.verb, call.arguments:
            case "grant", [ttl_s]:
                return leases.grant(float(ttl_s), now)
            case "keep_alive", [lease]:
                return leases.keep_alive(lease, now)
            case "revoke", [lease]:
                return leases.revoke(lease)
            case "put", [str(key), bytes(value), lease]:
                return leases.put(key, value, lease, now)
            case "get", [key]:
                return leases.get(key, now)
            case "delete", [key]:
                return leases.delete(key)
            case "acquire", [str(key), bytes(value), lease, int(at_least)]:
                return leases.acquire(key, value, lease, at_least, now)
            case "watch", [int(watch), str(prefix)]:
                found = leases.listing(prefix, now)
                self._publish()
                self._watches[peer, watch] = _Watch(prefix, now)
                return found
            case "beat", [int(watch)]:
                known = self._watches.get((peer, watch))
                if known is None:
                    return None
                known.heard_s = now
                return known.number
            case "unwatch", [int(watch)]:
                self._watches.pop((peer, watch), None)
                return None
        raise ValueError(f"no verb {call.verb!r} with {len(call.arguments)} arguments")

    def _publish(self) -> None:
        for change in self._leases.changes:
            value = change.value if isinstance(change, Put) else None
            for (peer, watch), known in self._watches.items():
                if change.key.startswith(known.prefix):
                    known.number += 1
                    answer = _Answer(known.number, [change.key, value], watch)
                    self._endpoint.send(peer, _encode(answer))
        self._leases.changes.clear()

    def close(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._endpoint.fileno())
        self._endpoint.close()


class EmbeddedStore:
    """A client of `RegistryServer`. Belongs to one loop, which it meets at the first call."""

    def __init__(
        self,
        address: str,
        *,
        open_endpoint: Callable[[str, str, str], Endpoint] = connect,
        name: str = "",
    ) -> None:
        """`name`: what nobody else in the cluster goes by; by default one is made up."""
        self._address = address
        self._connect = open_endpoint
        # Containers on two hosts may agree in both; whoever has a name cuts off who had it.
        self._name = name or f"{os.uname().nodename}-{os.getpid()}-{os.urandom(6).hex()}"
        self._calls = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._queues: dict[int, asyncio.Queue[_Answer]] = {}
        self._endpoint: Endpoint | None = None

    def _open(self) -> Endpoint:
        if self._endpoint is None:
            self._endpoint = self._connect(self._address, self._name, NAME)
            loop = asyncio.get_running_loop()
            loop.add_reader(self._endpoint.fileno(), self._readable)
        return self._endpoint

    def _readable(self) -> None:
        assert self._endpoint is not None
        for _, frame in self._endpoint.drain(_FRAMES_A_TURN):
            answer = _decode_answer(frame)
            if answer.watch:
                queue = self._queues.get(answer.watch)
                if queue is not None:
                    queue.put_nowait(answer)
                continue
            waiter = self._waiting.pop(answer.number, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(answer.result)

    async def _call(self, verb: str, *arguments: Any) -> Any:
        endpoint = self._open()
        number = next(self._calls)
        frame = _encode(_Call(number, verb, list(arguments)))
        waiter = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            for _ in range(int(_CALL_S / _REPEAT_S)):
                endpoint.send(NAME, frame)
                done, _ = await asyncio.wait([waiter], timeout=_REPEAT_S)
                if done:
                    return waiter.result()
        finally:
            self._waiting.pop(number, None)
        # A connection whose handshake was refused is not tried again by ZeroMQ itself.
        reason = endpoint.trouble() or f"the registry at {self._address} does not answer"
        if endpoint is self._endpoint:  # else another call has found that out already
            self._drop()
        raise RegistryGone(reason)

    def _drop(self) -> None:
        if self._endpoint is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                asyncio.get_running_loop().remove_reader(self._endpoint.fileno())
            self._endpoint.close()
            self._endpoint = None

    async def grant(self, ttl_s: float) -> int:
        return int(await self._call("grant", ttl_s))

    async def keep_alive(self, lease: int) -> bool:
        return bool(await self._call("keep_alive", lease))

    async def revoke(self, lease: int) -> None:
        await self._call("revoke", lease)

    async def put(self, key: str, value: bytes, lease: int | None = None) -> bool:
        return bool(await self._call("put", key, value, lease))

    async def get(self, key: str) -> bytes | None:
        found = await self._call("get", key)
        assert found is None or isinstance(found, bytes)
        return found

    async def delete(self, key: str) -> None:
        await self._call("delete", key)

    async def acquire(self, key: str, value: bytes, lease: int, at_least: int) -> int | None:
        found = await self._call("acquire", key, value, lease, at_least)
        return None if found is None else int(found)

    async def watch(self, prefix: str) -> AsyncGenerator[Event, None]:
        watch = next(self._calls)
        queue: asyncio.Queue[_Answer] = asyncio.Queue()
        self._queues[watch] = queue
        seen = 0
        try:
            yield Listing(await self._call("watch", watch, prefix))
            while True:
                try:
                    async with asyncio.timeout(_BEAT_S):
                        answer = await queue.get()
                except TimeoutError:
                    # The answer comes after all changes that it counts, perhaps before others.
                    sent = await self._call("beat", watch)
                    if sent is None or sent > seen + queue.qsize():
                        raise RegistryGone("changes were lost on the way") from None
                    continue
                seen += 1
                if answer.number != seen:
                    raise RegistryGone("changes were lost on the way")
                key, value = answer.result
                yield Deleted(key) if value is None else Put(key, value)
        finally:
            del self._queues[watch]
            if self._endpoint is not None:
                self._endpoint.send(NAME, _encode(_Call(next(self._calls), "unwatch", [watch])))

    async def close(self) -> None:
        self._drop()
