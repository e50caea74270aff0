"""What processes may rely on, whichever registry they use."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.helpers.etcd import Etcd, running_etcd

from penstock.protocol.errors import ConfigError
from penstock.registry.base import Deleted, Event, Listing, Put, RegistryGone, Store
from penstock.registry.embedded import RegistryServer
from penstock.registry.etcd import EtcdStore
from penstock.registry.open import open_registry
from penstock.registry.registry import Campaign, Registry

PATIENCE_S = 30.0
_numbers = itertools.count()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


class Place:
    """One registry and the processes at it, each of which would have a client of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._open: list[Registry] = []

    def client(self) -> Registry:
        self._open.append(open_registry(self._url))
        return self._open[-1]

    async def close(self) -> None:
        for registry in self._open:
            await registry.close()


@pytest.fixture(params=["memory", "embedded", "etcd"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    server = None
    match request.param:
        case "memory":
            place = Place(f"memory://{next(_numbers)}")
        case "embedded":
            server = RegistryServer("tcp://127.0.0.1:0")
            place = Place(server.address.replace("tcp:", "penstock:"))
        case _:
            etcd: Etcd = request.getfixturevalue("etcd")
            place = Place(f"{etcd.url}/c{next(_numbers)}")
    yield place
    await place.close()
    if server is not None:
        server.close()


class Seen:
    """What a watcher has been told, kept up to date."""

    def __init__(self, registry: Registry, prefix: str) -> None:
        self.known: dict[str, bytes] = {}
        self.events: list[Event] = []
        self._task = asyncio.ensure_future(self._watch(registry, prefix))

    async def _watch(self, registry: Registry, prefix: str) -> None:
        async for event in registry.watch(prefix):
            self.events.append(event)
            match event:
                case Listing(entries=entries):
                    self.known = dict(entries)
                case Put(key=key, value=value):
                    self.known[key] = value
                case Deleted(key=key):
                    self.known.pop(key, None)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not what():
            await asyncio.sleep(0.01)


async def test_put_and_get(place: Place) -> None:
    one, other = place.client(), place.client()
    assert await one.get("a") is None
    await one.put("a", b"1")
    assert await other.get("a") == b"1"
    await other.put("a", b"2")
    assert await one.get("a") == b"2"


async def test_a_watch_begins_with_all_there_is_and_goes_on_in_order(place: Place) -> None:
    one, other = place.client(), place.client()
    await one.put("x/a", b"1")
    await one.put("y/b", b"1")
    seen = Seen(other, "x/")
    await until(lambda: seen.events)
    assert seen.events[0] == Listing({"a": b"1"})
    for number in range(20):
        await one.put("x/c", str(number).encode())
        await one.put("y/c", b"-")
    await until(lambda: seen.known.get("c") == b"19")
    changes = [e for e in seen.events if not isinstance(e, Listing)]
    assert changes == [Put("c", str(number).encode()) for number in range(20)]
    await seen.close()


async def test_an_entry_stays_for_longer_than_its_lease_and_goes_when_taken_away(
    place: Place,
) -> None:
    one, other = place.client(), place.client()
    seen = Seen(other, "instances/")
    held = one.register("instances/a", b"1", ttl_s=2.0)
    await until(lambda: seen.known == {"a": b"1"})
    await asyncio.sleep(3.0)
    assert seen.known == {"a": b"1"}
    assert not any(isinstance(e, Deleted) for e in seen.events)
    await held.close()
    await until(lambda: seen.known == {})
    await seen.close()


async def test_a_lease_that_nobody_renews_takes_its_key_along(place: Place) -> None:
    one, other = place.client(), place.client()
    seen = Seen(other, "instances/")
    held = one.register("instances/a", b"1", ttl_s=2.0)
    await until(lambda: seen.known == {"a": b"1"})
    held._task.cancel()  # the process is gone without a word
    await until(lambda: seen.known == {})
    await seen.close()


async def test_whose_lease_was_ended_registers_again(place: Place) -> None:
    one, other = place.client(), place.client()
    seen = Seen(other, "instances/")
    held = one.register("instances/a", b"1", ttl_s=2.0)
    await until(lambda: seen.known == {"a": b"1"})
    assert held._lease is not None
    await other._store.revoke(held._lease)
    await until(lambda: seen.known == {})
    await until(lambda: seen.known == {"a": b"1"})
    await held.close()
    await seen.close()


async def test_a_later_registration_of_a_name_replaces_the_earlier_one(place: Place) -> None:
    one, other, third = place.client(), place.client(), place.client()
    seen = Seen(third, "instances/")
    first = one.register("instances/a", b"1", ttl_s=2.0)
    await until(lambda: seen.known == {"a": b"1"})
    first._task.cancel()
    second = other.register("instances/a", b"2", ttl_s=2.0)
    await until(lambda: seen.known == {"a": b"2"})
    await asyncio.sleep(3.0)  # the first one's lease has ended, and that is no matter
    assert seen.known == {"a": b"2"}
    await second.close()
    await seen.close()


class Candidate:
    def __init__(self, registry: Registry, name: str) -> None:
        self.terms: list[int | None] = []
        self.campaign: Campaign = registry.campaign(name.encode(), self.terms.append, ttl_s=2.0)

    @property
    def leads(self) -> bool:
        return bool(self.terms) and self.terms[-1] is not None


async def test_one_leads_and_another_takes_over_with_a_greater_term(place: Place) -> None:
    candidates = [Candidate(place.client(), f"r{i}") for i in range(3)]
    await until(lambda: any(c.leads for c in candidates))
    await asyncio.sleep(1.0)
    (first,) = [c for c in candidates if c.leads]
    # Gone without a word: its lease has to end.
    first.campaign._task.cancel()
    rest = [c for c in candidates if c is not first]
    await until(lambda: any(c.leads for c in rest))
    (second,) = [c for c in rest if c.leads]
    assert second.terms[-1] > first.terms[0]  # type: ignore[operator]
    # One that says good-bye is followed at once.
    await second.campaign.close()
    (third,) = [c for c in rest if c is not second]
    await until(lambda: third.leads)
    assert third.terms[-1] > second.terms[0]  # type: ignore[operator]
    await third.campaign.close()


async def test_a_leader_whose_lease_was_ended_stands_down(place: Place) -> None:
    one, other = Candidate(place.client(), "r0"), place.client()
    await until(lambda: one.leads)
    assert one.campaign._lease is not None
    await other._store.revoke(one.campaign._lease)
    await until(lambda: None in one.terms)
    await until(lambda: one.leads)
    assert one.terms[-1] > one.terms[0]  # type: ignore[operator]
    await one.campaign.close()


async def test_a_term_is_given_again_to_who_asks_under_its_lease(place: Place) -> None:
    """An answer may be lost on the way, and the question be repeated."""
    store = place.client()._store
    lease, other = await store.grant(5.0), await store.grant(5.0)
    assert await store.acquire("/penstock/t/leader", b"a", lease, 1000) == 1000
    assert await store.acquire("/penstock/t/leader", b"a", lease, 1000) == 1000
    assert await store.acquire("/penstock/t/leader", b"b", other, 1000) is None
    await store.revoke(lease)
    assert await store.acquire("/penstock/t/leader", b"b", other, 1000) == 1001
    await store.revoke(other)


async def test_nothing_is_put_under_a_lease_that_has_ended(place: Place) -> None:
    store = place.client()._store
    lease = await store.grant(5.0)
    await store.revoke(lease)
    assert not await store.put("/penstock/t/a", b"1", lease)
    assert not await store.keep_alive(lease)
    assert await store.acquire("/penstock/t/leader", b"a", lease, 1) is None


async def test_a_connection_closed_under_a_call_cancels_nobody(tmp_path: Path) -> None:
    """Who finds first that etcd is silent closes the connection that others still wait on."""
    with running_etcd(tmp_path) as etcd:
        store = open_registry(etcd.url)._store
        lease = await store.grant(60.0)
        with etcd.silent():
            first = asyncio.ensure_future(store.get("a"))
            await asyncio.sleep(0.5)
            others = [store.keep_alive(lease), store.put("a", b"1"), store.grant(60.0)]
            async with asyncio.timeout(PATIENCE_S):
                ends = await asyncio.gather(first, *others, return_exceptions=True)
        assert [type(end) for end in ends] == [RegistryGone] * 4
        await _until_it_answers(store)
        await store.close()


async def test_a_lease_that_has_ended_is_no_reason_to_close_a_connection(etcd: Etcd) -> None:
    store = open_registry(etcd.url)._store
    assert isinstance(store, EtcdStore)
    lease = await store.grant(60.0)
    before = store._opened
    await store.revoke(lease)
    await store.revoke(lease)
    assert not await store.put("a", b"1", lease)
    assert await store.acquire("/penstock/u/leader", b"a", lease, 1) is None
    assert store._opened is before
    await store.close()


async def test_what_hangs_at_etcd_hangs_nobody_here(etcd: Etcd) -> None:
    """Calls that never end, and neither when they are cancelled, as aetcd's may not."""
    store = open_registry(etcd.url)._store
    assert isinstance(store, EtcdStore)
    release = asyncio.Event()

    async def stubborn(client: object) -> None:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(RegistryGone, match="no answer in time"):
            await store._call(stubborn)
        waiting = asyncio.ensure_future(store._call(stubborn))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await store.close()
    release.set()


async def _until_it_answers(store: Store) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(RegistryGone):
                await store.get("a")
                return


async def test_silence_of_etcd_loses_nobody_however_often_it_comes(tmp_path: Path) -> None:
    """Everything of one process goes over one connection; each outage breaks it in the middle of
    other calls."""
    with running_etcd(tmp_path) as etcd:
        one, other = open_registry(etcd.url), open_registry(etcd.url)
        seen = Seen(other, "instances/")
        names = [f"i{n}" for n in range(5)]
        held = [one.register(f"instances/{name}", b"1", ttl_s=2.0) for name in names]
        leader = Candidate(one, "r0")
        for _ in range(3):
            await until(lambda: leader.leads and sorted(seen.known) == names)
            with etcd.silent():
                await until(lambda: not leader.leads)
        await until(lambda: leader.leads and sorted(seen.known) == names)
        terms = [t for t in leader.terms if t is not None]
        assert terms == sorted(set(terms)) and len(terms) >= 4
        await asyncio.gather(*(h.close() for h in held), leader.campaign.close())
        await seen.close()
        await one.close()
        await other.close()


async def _survives(
    url: str, stop: Callable[[], Awaitable[None]], start: Callable[[], Awaitable[None]]
) -> None:
    """Who is registered, who watches and who leads, through an outage longer than all leases."""
    one, other = open_registry(url), open_registry(url)
    seen = Seen(other, "instances/")
    held = one.register("instances/a", b"1", ttl_s=2.0)
    leader = Candidate(one, "r0")
    await until(lambda: seen.known == {"a": b"1"} and leader.leads)
    await stop()
    await until(lambda: not leader.leads)
    await asyncio.sleep(2.0)
    assert seen.known == {"a": b"1"}, "a registry that is gone has not said that anybody else is"
    await start()
    await until(lambda: leader.leads)
    late = other.register("instances/b", b"2", ttl_s=2.0)
    await until(lambda: seen.known == {"a": b"1", "b": b"2"})
    terms = [t for t in leader.terms if t is not None]
    assert terms == sorted(set(terms)) and len(terms) > 1
    for closing in (late, held, leader.campaign):
        await closing.close()
    await seen.close()
    await one.close()
    await other.close()


async def test_etcd_is_killed_and_comes_back(tmp_path: Path) -> None:
    with running_etcd(tmp_path) as etcd:
        # In threads: the loop goes on meanwhile, as that of a process elsewhere would.
        await _survives(
            etcd.url, partial(asyncio.to_thread, etcd.kill), partial(asyncio.to_thread, etcd.start)
        )


async def test_the_embedded_registry_is_lost_with_all_it_knew(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/r.sock"
    servers = [RegistryServer(address)]

    async def stop() -> None:
        servers.pop().close()

    async def start() -> None:
        servers.append(RegistryServer(address))

    await _survives(f"penstock+{address}", stop, start)
    servers.pop().close()


async def test_a_registry_that_is_not_there_is_said_within_seconds(tmp_path: Path) -> None:
    store = open_registry(f"penstock+ipc://{tmp_path}/nobody.sock")
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(RegistryGone, match="does not answer"):
            await store.get("a")
    await store.close()


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("localhost:2379", "no registry"),
        ("consul://localhost", "no kind of registry"),
        ("etcd://", "no registry"),
        ("etcd://host:port", "no host:port"),
        ("penstock://192.0.2.1:8040", "cluster-secret"),
    ],
)
def test_mistakes_in_a_url_are_said(url: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        open_registry(url)
