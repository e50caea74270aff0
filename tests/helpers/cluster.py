"""Clusters of real processes under load: for tests of what happens when one of them fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from tests.helpers.server import Server

MODEL = "m"


def body(number: int, *, prompt_tokens: int = 0, **more: Any) -> dict[str, Any]:
    """The `number`th request: half of them greedy, half drawn, and both must come out the same
    again wherever and however often they are resumed."""
    prompt_tokens = prompt_tokens or 40 + number * 37 % 260
    return {
        "model": MODEL,
        "prompt": [(7 * number + 3 * i) % 300 + 5 for i in range(prompt_tokens)],
        "max_tokens": 200,
        "ignore_eos": True,
        "temperature": float(number % 2),
        "seed": number,
        "stream": True,
    } | more


@dataclass
class Answer:
    """What one client saw. `ends` has every finish reason and error code; one is right."""

    text: str = ""
    num_chunks: int = 0
    ends: list[str] = field(default_factory=list)
    #: Seconds from sending to each piece of text.
    times_s: list[float] = field(default_factory=list)
    reset: bool = False
    request_id: str = ""
    #: By time.monotonic().
    started_s: float = 0.0

    @property
    def outcome(self) -> tuple[str, list[str], bool]:
        return self.text, self.ends, self.reset

    def pause_s(self) -> float:
        """The longest wait between two pieces of text."""
        return max((b - a for a, b in zip(self.times_s, self.times_s[1:])), default=0.0)


async def ask(
    client: httpx.AsyncClient, url: str, data: dict[str, Any], answer: Answer | None = None
) -> Answer:
    """One streamed completion; `answer` can be looked at while it grows."""
    answer = answer or Answer()
    answer.started_s = started_s = time.monotonic()
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=data) as response:
            if response.status_code != 200:
                error = json.loads(await response.aread())["error"]
                answer.ends.append(error["code"])
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    answer.ends.append(chunk["error"]["code"])
                    continue
                answer.request_id = chunk["id"]
                for choice in chunk["choices"]:
                    answer.text += choice["text"]
                    answer.num_chunks += 1
                    answer.times_s.append(time.monotonic() - started_s)
                    if choice["finish_reason"]:
                        answer.ends.append(choice["finish_reason"])
    except httpx.TransportError:
        answer.reset = True
    return answer


async def load(
    url: str | list[str],
    bodies: list[dict[str, Any]],
    started: asyncio.Event | None = None,
    *,
    growing: list[Answer] | None = None,
) -> list[Answer]:
    """All at once, over one or several routers in turn. `started` is set when a quarter of the
    streams have said something."""
    urls = [url] if isinstance(url, str) else url
    answers = growing if growing is not None else []
    answers += [Answer() for _ in bodies]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60.0, limits=limits) as client:
        tasks = [
            asyncio.create_task(ask(client, urls[i % len(urls)], data, answers[i]))
            for i, data in enumerate(bodies)
        ]
        if started is not None:
            while not all(t.done() for t in tasks):
                if sum(a.num_chunks > 3 for a in answers) >= max(1, len(tasks) // 4):
                    started.set()
                    break
                await asyncio.sleep(0.01)
            started.set()
        await asyncio.gather(*tasks)
    return answers


def cluster_report(url: str) -> dict[str, Any]:
    """GET /admin/cluster."""
    found: dict[str, Any] = httpx.get(f"{url}/admin/cluster", timeout=5.0).json()
    return found


def instances(url: str) -> dict[str, dict[str, Any]]:
    return {i["name"]: i for i in cluster_report(url)["instances"]}


def wait_for(condition: Any, timeout_s: float = 90.0, what: str = "") -> Any:
    """What `condition` returns once it is true."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"never came: {what}"
        time.sleep(0.05)


def with_role(url: str, role: str) -> dict[str, Any]:
    """The busiest instance that has this role."""
    found = [i for i in instances(url).values() if i["role"] == role and i["state"] == "active"]
    assert found, f"nobody is {role}: {instances(url)}"
    return max(found, key=lambda i: (i["running"], i["queue"]))


def send_signal(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)


def settle(server: Server, timeout_s: float = 60.0) -> None:
    """Nothing runs any more, by the service's count and by the engines' own."""

    def idle() -> bool:
        return not any(i["running"] or i["queue"] for i in instances(server.url).values())

    wait_for(idle, timeout_s, "an idle cluster")
