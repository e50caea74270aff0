"""Which instances a service uses, when the registry says one thing and heartbeats another."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from penstock.protocol.codec import PROTOCOL_VERSION
from penstock.protocol.errors import ConfigError
from penstock.registry.base import INSTANCES, InstanceEntry
from penstock.registry.open import open_registry
from penstock.registry.registry import Registry
from penstock.service.cluster import membership
from penstock.service.cluster.fit import Wanted
from penstock.service.cluster.membership import Membership

_numbers = itertools.count()


class Driver:
    """What the service's driver would do, written down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.alive: set[str] = set()

    def connect(self, name: str, address: str) -> None:
        if address.startswith("tcp://192."):
            raise ConfigError("there is no secret")
        self.calls.append(("connect", name, address))
        self.alive.add(name)

    def replace(self, name: str, address: str) -> None:
        self.calls.append(("replace", name, address))
        self.alive.add(name)

    def refuse(self, name: str, reason: str) -> None:
        self.calls.append(("refuse", name, reason))
        self.alive.discard(name)

    def remove(self, name: str) -> None:
        self.calls.append(("remove", name))

    def still_lives(self, name: str) -> bool:
        return name in self.alive


class World:
    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.driver = Driver()
        self.membership = Membership(registry, self.driver)

    async def put(self, name: str, **different: object) -> None:
        entry = InstanceEntry(
            name=name, incarnation=1, pid=1, address=f"tcp://127.0.0.1:{ord(name[0])}", host="h",
            hostname="h", model="m", model_digest="d", layout_digest="l",
            protocol_version=PROTOCOL_VERSION, version="0",
        )  # fmt: skip
        entry = msgspec.structs.replace(entry, **different)  # type: ignore[arg-type]
        await self.registry.put(INSTANCES + name, msgspec.json.encode(entry))

    async def delete(self, name: str) -> None:
        await self.registry._store.delete(self.registry._root + INSTANCES + name)

    async def until(self, what: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not what():
                await asyncio.sleep(0.005)

    async def calls(self, *expected: tuple[str, ...]) -> None:
        await self.until(lambda: len(self.driver.calls) >= len(expected))
        assert self.driver.calls == list(expected)
        self.driver.calls.clear()


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(membership, "_LOOK_S", 0.02)
    made = World(open_registry(f"memory://membership-{next(_numbers)}"))
    yield made
    await made.membership.close()


async def test_who_comes_is_connected_and_who_falls_silent_after_leaving_is_removed(
    world: World,
) -> None:
    await world.put("a")
    await world.calls(("connect", "a", "tcp://127.0.0.1:97"))
    await world.delete("a")
    await asyncio.sleep(0.1)
    assert world.driver.calls == [], "it still speaks: an entry that ends ends nobody"
    world.driver.alive.discard("a")
    await world.calls(("remove", "a"))


async def test_who_registers_again_in_time_was_never_away(world: World) -> None:
    await world.put("a")
    await world.calls(("connect", "a", "tcp://127.0.0.1:97"))
    await world.delete("a")
    await world.put("a")
    world.driver.alive.discard("a")
    await asyncio.sleep(0.1)
    assert world.driver.calls == []


async def test_a_new_incarnation_replaces_the_old_one_at_once(world: World) -> None:
    await world.put("a")
    await world.put("a", incarnation=2, address="tcp://127.0.0.1:2")
    await world.calls(("connect", "a", "tcp://127.0.0.1:97"), ("replace", "a", "tcp://127.0.0.1:2"))
    await world.put("a", incarnation=1)  # a late word of the old one
    await asyncio.sleep(0.1)
    assert world.driver.calls == []


async def test_a_clock_that_was_put_back_keeps_nobody_out_for_good(world: World) -> None:
    await world.put("a", incarnation=9)
    await world.calls(("connect", "a", "tcp://127.0.0.1:97"))
    await world.put("a", incarnation=5, address="tcp://127.0.0.1:5")
    world.driver.alive.discard("a")  # number 9 is dead
    await world.calls(("remove", "a"), ("connect", "a", "tcp://127.0.0.1:5"))


@pytest.mark.parametrize(
    ("different", "word"),
    [
        ({"model_digest": "other"}, "another model"),
        ({"layout_digest": "other"}, "another layout"),
        ({"protocol_version": PROTOCOL_VERSION + 1}, "protocol version"),
        ({"address": "tcp://192.0.2.1:1"}, "no secret"),
    ],
)
async def test_who_does_not_fit_is_refused_with_the_reason(
    world: World, different: dict[str, object], word: str
) -> None:
    await world.put("a")
    await world.calls(("connect", "a", "tcp://127.0.0.1:97"))
    await world.put("b", **different)
    await world.until(lambda: world.driver.calls)
    ((verb, name, reason),) = world.driver.calls
    assert (verb, name) == ("refuse", "b") and word in reason
    world.driver.calls.clear()
    # One that fits takes its name: it is used.
    await world.put("b", incarnation=2)
    await world.calls(("replace", "b", "tcp://127.0.0.1:98"))


async def test_a_model_may_be_exchanged_once_nobody_serves_the_old_one(world: World) -> None:
    await world.put("a")
    await world.put("b", model_digest="other")
    await world.until(lambda: len(world.driver.calls) == 2)
    world.driver.calls.clear()
    await world.delete("a")
    world.driver.alive.discard("a")
    await world.calls(("remove", "a"), ("replace", "b", "tcp://127.0.0.1:98"))


async def test_what_the_service_was_told_decides_and_not_who_came_first(world: World) -> None:
    await world.membership.close()
    world.membership = Membership(world.registry, world.driver, wanted=Wanted(dtype="float32"))
    await world.put("a", dtype="bfloat16", model_digest="of bfloat16")
    await world.put("b", dtype="float32")
    await world.until(lambda: len(world.driver.calls) == 2)
    refused, taken = world.driver.calls
    assert refused[:2] == ("refuse", "a") and taken == ("connect", "b", "tcp://127.0.0.1:98")
    assert "--dtype bfloat16" in refused[2] and "--dtype float32" in refused[2]


async def test_garbage_in_the_registry_harms_nobody(world: World) -> None:
    await world.registry.put(f"{INSTANCES}x", b"{not json")
    await world.put("a")
    await world.calls(("connect", "a", "tcp://127.0.0.1:97"))


async def test_those_that_somebody_starts_again_are_waited_for(world: World) -> None:
    await world.membership.close()
    world.membership = Membership(world.registry, world.driver, they_return=True)
    await world.put("a")
    await world.calls(("connect", "a", "tcp://127.0.0.1:97"))
    await world.delete("a")
    world.driver.alive.discard("a")
    await asyncio.sleep(0.1)
    assert world.driver.calls == []
    await world.put("a", incarnation=2)
    await world.calls(("replace", "a", "tcp://127.0.0.1:97"))
