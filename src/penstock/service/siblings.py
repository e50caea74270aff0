"""What any API worker answers for all of them.

A request reaches one worker by chance. For /metrics it asks its siblings over their private sockets
and puts the answers together, each sample with an `api_worker` label: what clients did is the sum
over workers, what an instance says of itself is the same from each. A request that it cannot
explain may have been a sibling's.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

#: Says that the asker is a sibling, and wants this worker's own word.
_OWN = b"x-penstock-own-word"
_KEY = b"authorization"
_Header = tuple[bytes, bytes]
#: A sibling that is starting, ending or stopped is left out.
_PATIENCE_S = 1.0
_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{)?")
_EXPLAIN = re.compile(r"/admin/requests/[^/]+/explain")


def socket_of(folder: str, worker: int) -> str:
    return f"{folder}/api-{worker}.sock"


def ready_file(folder: str, worker: int) -> Path:
    """Made by a worker once it is ready; its parent looks for it."""
    return Path(folder) / f"api-{worker}.ready"


class Siblings:
    """ASGI middleware around a worker's application."""

    def __init__(self, app: ASGIApp, folder: str, worker: int) -> None:
        self._app = app
        self._folder = Path(folder)
        self._worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" and scope["method"] == "GET" else ""
        metrics = path == "/metrics"
        asked = metrics or _EXPLAIN.fullmatch(path) is not None
        if not asked or any(name == _OWN for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        own = _Answer()
        await self._app(scope, receive, own)
        if metrics and own.status == 200:
            texts = {n: answer.text for n, answer in (await self._ask_all(scope)).items()}
            own.replace(merge(texts | {self._worker: own.body.decode()}).encode())
        elif own.status == 404:
            for answer in (await self._ask_all(scope)).values():
                own.status = 200
                own.replace(answer.content)
        await own.send_to(send)

    async def _ask_all(self, scope: Scope) -> dict[int, httpx.Response]:
        """The siblings that answered with 200, and their answers."""
        numbers = sorted(int(p.stem.removeprefix("api-")) for p in self._folder.glob("api-*.sock"))
        others = [n for n in numbers if n != self._worker]
        headers = [(k, v) for k, v in scope["headers"] if k == _KEY] + [(_OWN, b"1")]
        found = await asyncio.gather(*(self._ask(n, scope["path"], headers) for n in others))
        return {n: answer for n, answer in zip(others, found) if answer is not None}

    async def _ask(self, worker: int, path: str, headers: list[_Header]) -> httpx.Response | None:
        way = httpx.AsyncHTTPTransport(uds=socket_of(str(self._folder), worker))
        try:
            async with httpx.AsyncClient(transport=way, timeout=_PATIENCE_S) as client:
                answer = await client.get(f"http://localhost{path}", headers=headers)
        except httpx.HTTPError:
            return None
        return answer if answer.status_code == 200 else None


class _Answer:
    """Takes in what an application sends."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[_Header] = []
        self.body = b""

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message["headers"])
        else:
            self.body += message.get("body", b"")

    def replace(self, body: bytes) -> None:
        self.body = body
        self.headers = [(k, v) for k, v in self.headers if k != b"content-length"]
        self.headers.append((b"content-length", str(len(body)).encode()))

    async def send_to(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status, "headers": self.headers}
        await send(start)
        await send({"type": "http.response.body", "body": self.body})


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
