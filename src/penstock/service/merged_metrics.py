"""/metrics of API workers: whichever answers, it shows all of them.

A scrape reaches one worker by chance. It asks its siblings over their private sockets and puts the
answers together, each sample with an `api_worker` label: what clients did is the sum over workers,
what an instance says of itself is the same from each.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

#: Says that the asker wants this worker's own.
_OWN = b"x-penstock-own-metrics"
#: A sibling that is starting, ending or stopped is left out.
_PATIENCE_S = 1.0
_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{)?")


def socket_of(folder: str, worker: int) -> str:
    return f"{folder}/api-{worker}.sock"


def ready_file(folder: str, worker: int) -> Path:
    """Made by a worker once it is ready; its parent looks for it."""
    return Path(folder) / f"api-{worker}.ready"


class MergedMetrics:
    """ASGI middleware around a worker's application."""

    def __init__(self, app: ASGIApp, folder: str, worker: int) -> None:
        self._app = app
        self._folder = Path(folder)
        self._worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = scope["type"] == "http" and scope["path"] == "/metrics"
        if not wanted or any(name == _OWN for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        answer = _Answer()
        await self._app(scope, receive, answer)
        texts = {self._worker: answer.body.decode()}
        if answer.start["status"] == 200:
            texts |= await self._siblings()
            answer.body = merge(texts).encode()
        headers = [(k, v) for k, v in answer.start["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(answer.body)).encode()))
        await send({**answer.start, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def _siblings(self) -> dict[int, str]:
        numbers = sorted(int(p.stem.removeprefix("api-")) for p in self._folder.glob("api-*.sock"))
        others = [n for n in numbers if n != self._worker]
        found = await asyncio.gather(*(self._ask(n) for n in others))
        return {number: text for number, text in zip(others, found) if text is not None}

    async def _ask(self, worker: int) -> str | None:
        way = httpx.AsyncHTTPTransport(uds=socket_of(str(self._folder), worker))
        try:
            async with httpx.AsyncClient(transport=way, timeout=_PATIENCE_S) as client:
                answer = await client.get("http://worker/metrics", headers={_OWN.decode(): "1"})
        except httpx.HTTPError:
            return None
        return answer.text if answer.status_code == 200 else None


class _Answer:
    """Takes in what an application sends."""

    def __init__(self) -> None:
        self.start: dict[str, Any] = {}
        self.body = b""

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.start = dict(message)
        else:
            self.body += message.get("body", b"")


def merge(texts: dict[int, str]) -> str:
    """One exposition of several, by worker: families stay together, as the format wants it."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for worker in sorted(texts):
        family = ""
        for line in texts[worker].splitlines():
            if line.startswith("# "):
                _, kind, family, *_ = line.split(" ", 3)
                head = heads.setdefault(family, [])
                if kind in ("HELP", "TYPE", "UNIT") and line not in head:
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, worker))
    lines = [line for family in heads for line in heads[family] + samples.get(family, [])]
    return "\n".join(lines) + "\n"


def _labelled(line: str, worker: int) -> str:
    def label(found: re.Match[str]) -> str:
        return f'{found[1]}{{api_worker="{worker}"' + ("," if found[2] else "}")

    return _SAMPLE.sub(label, line, count=1)
