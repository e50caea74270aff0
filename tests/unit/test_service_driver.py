"""Streams between the service's core and the API."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.service.driver import Stream
from penstock.service.generation import TokenDelta


class Driver:
    def __init__(self) -> None:
        self.cancelled: list[int | None] = []

    def cancel(self, _request_id: str, choice: int | None) -> None:
        self.cancelled.append(choice)


def stream_of(num_choices: int) -> tuple[Stream, Driver]:
    driver: Any = Driver()
    return Stream(driver, "r", num_choices), driver


async def test_deltas_gather_until_they_are_read() -> None:
    stream, _ = stream_of(1)
    reading = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    assert not stream.push(TokenDelta(0, [1]))
    assert not stream.push(TokenDelta(0, [2]))
    assert [d.ids for d in await reading] == [[1], [2]]
    assert stream.push(TokenDelta(0, [3], "stop"))
    assert [d.finish for d in await stream.next()] == ["stop"]
    assert await stream.next() == []


async def test_cancel_is_idempotent_and_wakes_the_reader() -> None:
    stream, driver = stream_of(3)
    reading = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    stream.push(TokenDelta(1, [5], "stop"))
    stream.cancel(1)  # has ended by itself: nothing to do
    stream.cancel(0)
    stream.cancel(0)
    assert not stream.ended
    stream.cancel()
    stream.cancel()
    assert driver.cancelled == [0, None]
    assert await reading == []
    assert await stream.next() == []


@pytest.mark.parametrize("choice", [0, 1])
async def test_a_cancelled_choice_yields_no_further_delta(choice: int) -> None:
    stream, _ = stream_of(2)
    stream.push(TokenDelta(0, [1]))
    stream.push(TokenDelta(1, [2]))
    stream.cancel(choice)
    assert [d.choice for d in await stream.next()] == [1 - choice]
