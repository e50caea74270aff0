"""etcd as the registry (extra `penstock[etcd]`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from penstock.protocol.errors import ConfigError
from penstock.registry.base import Deleted, Event, Listing, Put, RegistryGone

log = logging.getLogger(__name__)

_R = TypeVar("_R")
_CALL_S = 1.5
#: A stream may break without a word (a cut, a member that is paused): look at this interval.
_RELIST_S = 5.0
#: gRPC by itself waits up to two minutes before it tries to connect again.
_OPTIONS = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1000,
    "grpc.enable_http_proxy": 0,
    # aetcd hides the channel, and channels to one address would share a broken connection.
    "grpc.use_local_subchannel_pool": 1,
}


class _LeaseEnded(Exception):
    """What etcd says of a lease that has ended: an answer, and no failure to answer."""


class EtcdStore:
    """`members` are host:port; the next one is taken when one does not answer.

    One connection serves all calls and watches, and whoever finds it broken closes it under the
    others. gRPC tells them so by a CancelledError that nobody here has asked for, and aetcd
    swallows some that were asked for. So whatever aetcd does runs in a task of its own, and is
    waited for from outside, for a limited time.
    """

    def __init__(
        self, members: Sequence[str], user: str | None = None, password: str | None = None
    ) -> None:
        try:
            import aetcd
            import grpc.aio
        except ImportError as exc:
            raise ConfigError(
                "etcd as the registry needs a client for it: pip install 'penstock[etcd]'"
            ) from exc
        self._aetcd = aetcd
        self._failures = (aetcd.exceptions.ClientError, grpc.aio.BaseError, TimeoutError, OSError)
        self._members = list(members)
        self._credentials = (user, password)
        self._opened: Any = None
        #: What goes on beside the calls: giving up connections and watches.
        self._aside: set[asyncio.Future[None]] = set()

    def _client(self) -> Any:
        if self._opened is None:
            host, _, port = self._members[0].rpartition(":")
            user, password = self._credentials
            self._opened = self._aetcd.Client(
                host.strip("[]"), int(port), user, password, timeout=_CALL_S, options=_OPTIONS
            )
        return self._opened

    async def _call(self, act: Callable[[Any], Awaitable[_R]]) -> _R:
        """Raises `RegistryGone` within two seconds, `_LeaseEnded`, or what the caller is cancelled
        with, at once."""
        client = self._client()
        call = asyncio.ensure_future(act(client))
        call.add_done_callback(_look_at)
        try:
            await asyncio.wait([call], timeout=_CALL_S + 0.5)
        finally:
            done = call.done()
            call.cancel()
        if not done or call.cancelled():
            why: object = "the connection was closed" if done else "no answer in time"
            self._give_up(client)
            raise RegistryGone(f"etcd does not answer: {why}")
        exc = call.exception()
        if exc is None:
            return call.result()
        if "lease not found" in str(exc):
            raise _LeaseEnded from exc
        # (A client that is closed meanwhile fails in any way, with an AttributeError for one.)
        if client is self._opened and not isinstance(exc, self._failures):
            raise exc
        self._give_up(client)
        raise RegistryGone(f"etcd does not answer: {exc or type(exc).__name__}") from exc

    def _give_up(self, client: Any) -> None:
        """Nobody waits for it: closing what is broken may take its time."""
        if client is self._opened:  # else somebody else has found that out already
            self._opened = None
            self._members.append(self._members.pop(0))
            self._beside(_close(client))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    async def grant(self, ttl_s: float) -> int:
        # Whole seconds, and no less than its own election timeout's worth.
        lease = await self._call(lambda etcd: etcd.lease(max(1, round(ttl_s))))
        return int(lease.id)

    async def keep_alive(self, lease: int) -> bool:
        answer = await self._call(lambda etcd: etcd.refresh_lease(lease))
        return answer is not None and answer.TTL > 0

    async def revoke(self, lease: int) -> None:
        try:
            await self._call(lambda etcd: etcd.revoke_lease(lease))
        except _LeaseEnded:
            log.debug("lease %d had ended already", lease)

    async def put(self, key: str, value: bytes, lease: int | None = None) -> bool:
        try:
            await self._call(lambda etcd: etcd.put(key.encode(), value, lease=lease or 0))
        except _LeaseEnded:
            return False
        return True

    async def get(self, key: str) -> bytes | None:
        found = await self._call(lambda etcd: etcd.get(key.encode()))
        return None if found is None else bytes(found.value)

    async def delete(self, key: str) -> None:
        await self._call(lambda etcd: etcd.delete(key.encode()))

    async def acquire(self, key: str, value: bytes, lease: int, at_least: int) -> int | None:
        """The term stands beside the key, without a lease: it outlives every leader."""
        name, counter = key.encode(), f"{key}.term".encode()
        held = await self._call(lambda etcd: etcd.get(name))
        term = await self._call(lambda etcd: etcd.get(counter))
        last = int(term.value) if term is not None else 0
        if held is not None:
            return last if held.lease == lease else None
        new = max(last + 1, at_least)

        def transact(etcd: Any) -> Any:
            of, put = etcd.transactions, etcd.transactions.put
            return etcd.transaction(
                compare=[
                    of.version(name) == 0,
                    of.mod(counter) == (term.mod_revision if term is not None else 0),
                ],
                success=[put(name, value, lease=lease), put(counter, str(new).encode())],
                failure=[],
            )

        try:
            succeeded, _ = await self._call(transact)
        except _LeaseEnded:
            return None
        return new if succeeded else None

    async def _list(self, prefix: str) -> tuple[dict[str, bytes], int]:
        found = await self._call(lambda etcd: etcd.get_prefix(prefix.encode()))
        entries = {item.key.decode(): bytes(item.value) for item in found}
        return entries, int(found.header.revision)

    async def watch(self, prefix: str) -> AsyncGenerator[Event, None]:
        entries, revision = await self._list(prefix)
        yield Listing(entries)

        async def begin(etcd: Any) -> tuple[Any, Any]:
            return etcd, await etcd.watch_prefix(prefix.encode(), start_revision=revision + 1)

        client, stream = await self._call(begin)
        changes = aiter(stream)
        coming = _next(changes)
        try:
            while True:
                done, _ = await asyncio.wait([coming], timeout=_RELIST_S)
                if client is not self._opened:
                    raise RegistryGone("the watch ended: its connection was given up")
                if not done:
                    entries, _ = await self._list(prefix)
                    yield Listing(entries)
                    continue
                try:
                    change = coming.result()
                except (*self._failures, StopAsyncIteration) as exc:
                    raise RegistryGone(f"the watch ended: {exc}") from exc
                coming = _next(changes)
                key = change.kv.key.decode()
                put = change.kind == self._aetcd.rtypes.EventKind.PUT
                yield Put(key, bytes(change.kv.value)) if put else Deleted(key)
        finally:
            coming.cancel()
            if client is self._opened:
                self._beside(_end(stream))

    async def close(self) -> None:
        if self._opened is not None:
            self._give_up(self._opened)
        if self._aside:
            await asyncio.wait(self._aside, timeout=_CALL_S)


def _next(changes: AsyncIterator[Any]) -> asyncio.Future[Any]:
    coming: asyncio.Future[Any] = asyncio.ensure_future(anext(changes))
    coming.add_done_callback(_look_at)
    return coming


def _look_at(done: asyncio.Future[Any]) -> None:
    """Of what was abandoned, asyncio would say that nobody has looked at its exception."""
    if not done.cancelled():
        done.exception()


async def _end(stream: Any) -> None:
    """etcd need not send a watch that nobody reads any more."""
    try:
        async with asyncio.timeout(_CALL_S):
            await stream.cancel()
    except Exception as exc:  # of a connection that breaks meanwhile
        log.debug("ending a watch of etcd: %s", exc)


async def _close(client: Any) -> None:
    try:
        async with asyncio.timeout(_CALL_S):
            await client.close()
    except Exception as exc:  # of a connection that is broken anyway
        log.debug("closing a connection to etcd: %s", exc)
