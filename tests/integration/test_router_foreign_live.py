"""`penstock router --engines` as processes: several workers, one killed; HTTPS on both sides."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import httpx
import psutil
import pytest

from tests.helpers.mock_openai import MockEngine
from tests.helpers.processes import PATIENCE_S, Command, Processes
from tests.helpers.server import free_port

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def router(started: Processes, *flags: str, engines: list[MockEngine]) -> Command:
    port = free_port()
    urls = ",".join(engine.url for engine in engines)
    found = started.start("router", "--engines", urls, "--port", str(port), "--no-banner", *flags)
    found.url = f"http://127.0.0.1:{port}"
    return found


async def until_ready(command: Command, verify: ssl.SSLContext | bool = True) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            assert command.process.poll() is None, command.log
            try:
                async with httpx.AsyncClient(verify=verify) as client:
                    if (await client.get(f"{command.url}/health")).status_code == 200:
                        return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)


async def get(url: str) -> httpx.Response:
    """By a connection of its own, which the kernel gives to any worker."""
    async with httpx.AsyncClient(timeout=30.0) as client:
        return await client.get(url)


async def chat(url: str, verify: ssl.SSLContext | bool = True) -> httpx.Response:
    async with httpx.AsyncClient(timeout=30.0, verify=verify) as client:
        return await client.post(f"{url}/v1/chat/completions", json=CHAT)


async def test_workers_share_a_port_and_one_is_replaced(started: Processes) -> None:
    async with MockEngine("a") as a, MockEngine("b") as b:
        command = router(started, "--api-workers", "2", engines=[a, b])

        async def names() -> set[str]:
            try:
                looks = [await get(f"{command.url}/admin/cluster") for _ in range(12)]
            except httpx.TransportError:
                return set()
            return {look.json()["service"] for look in looks if look.json()["ready"]}

        async def both() -> None:
            async with asyncio.timeout(PATIENCE_S):
                while len(await names()) < 2:
                    assert command.process.poll() is None, command.log
                    await asyncio.sleep(0.1)

        await both()
        for _ in range(16):
            assert (await chat(command.url)).status_code == 200
        seen: set[str] = set()
        async with asyncio.timeout(PATIENCE_S):
            while len(seen) < 2:  # each says whose series they are
                text = (await get(f"{command.url}/metrics")).text
                found = {n for n in ("0", "1") if f'api_worker="{n}"' in text}
                assert len(found) == 1
                seen |= found
        workers = [
            child
            for child in psutil.Process(command.process.pid).children()
            if any("spawn_main" in word for word in child.cmdline())
        ]
        assert len(workers) == 2
        workers[0].kill()
        async with asyncio.timeout(PATIENCE_S):
            while "ended with code -9" not in command.log:
                await asyncio.sleep(0.05)
        await both()
        for _ in range(16):
            assert (await chat(command.url)).status_code == 200
        command.process.terminate()
        assert await asyncio.to_thread(command.process.wait, PATIENCE_S) == 0
        assert not any(worker.is_running() for worker in workers)


async def test_https_on_both_sides(started: Processes, certificate: tuple[Path, Path]) -> None:
    file, key = map(str, certificate)
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    theirs.load_cert_chain(file, key)
    trusted = ssl.create_default_context(cafile=file)
    ours = ("--ssl-certfile", file, "--ssl-keyfile", key)
    async with MockEngine("safe", tls=theirs) as engine:
        command = router(started, *ours, "--engine-ca-certs", file, engines=[engine])
        plain, command.url = command.url, command.url.replace("http:", "https:")
        await until_ready(command, trusted)
        answer = await chat(command.url, trusted)
        assert answer.json()["choices"][0]["message"]["content"] == "safe"
        with pytest.raises(httpx.TransportError):
            await chat(command.url)  # the system does not know that certificate
        with pytest.raises(httpx.TransportError):
            await chat(plain)
        # Nor does a router that was not told of it: its engine stays away.
        doubting = router(started, engines=[engine])
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    health = (await get(f"{doubting.url}/admin/cluster")).json()
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
                    continue
                if "certificate" in json_of(health):
                    break
                await asyncio.sleep(0.1)
        assert (await chat(doubting.url)).status_code == 503


def json_of(found: object) -> str:
    return str(found).lower()
