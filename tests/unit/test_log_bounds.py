"""What anybody who reaches a port can have written into a log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from penstock.registry.base import RegistryGone
from penstock.registry.registry import _Trouble
from penstock.repeats import OneASecond


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    found = logging.getLogger("penstock.test.bounds")
    yield found
    found.filters.clear()


def test_one_line_a_second_of_a_kind_and_how_many_more(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    log.addFilter(OneASecond("bad %s", "odd", clock=lambda: now[0]))
    for number in range(1000):
        log.warning("bad %s", number)
        log.warning("fine %s", "word")
    log.warning("odd")
    now[0] = 1.0
    log.warning("bad %s", "again")
    lines = [line for line in caplog.messages if not line.startswith("fine")]
    assert lines == ["bad 0", "odd", "bad again (999 more like it since the last line)"]
    assert len(caplog.messages) == 1003


def test_one_warning_about_a_registry_and_one_word_when_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    watch, registration = _Trouble("etcd://here"), _Trouble("etcd://here")
    for _ in range(3):
        for trouble in (watch, registration):
            trouble.say(RegistryGone("etcd://here does not answer"))
    watch.over()
    watch.say(RegistryGone("etcd://here does not answer"))
    registration.over()
    watch.over()
    watch.over()
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "etcd://here does not answer; going on with what is known"),
        ("INFO", "the registry etcd://here answers again"),
    ]


async def test_what_is_no_penstock_is_not_said_to_have_another_secret() -> None:
    from penstock.protocol.transport.open import connect

    async def garbage(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
        writer.write(greeting + b"\x04\x05hello")  # ZMTP, up to here
        await writer.drain()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    endpoint = connect(f"tcp://127.0.0.1:{port}", "me", "it")
    try:
        async with asyncio.timeout(20):
            while not (trouble := endpoint.trouble()):
                await asyncio.sleep(0.02)
        assert "does not speak this protocol" in trouble and "secret" not in trouble
    finally:
        endpoint.close(flush_s=0)
        server.close()
