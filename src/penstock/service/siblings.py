"""What any API worker answers for all of them.

A request reaches one worker by chance. For /metrics it asks its siblings over their private sockets
and puts the answers together, each sample with an `api_worker` label: what clients did is the sum
over workers, what an instance says of itself is the same from each. /admin/cluster and
/admin/requests add up; a request that a worker cannot explain may have been a sibling's; a role is
given by the one that leads. Drain and start need nobody: see `cluster/roster.py`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.service.api.admin import MAX_LIVE, LiveResponse
from penstock.service.cluster.roles import NotLeading
from penstock.service.report import ClusterReport, together

#: Says that the asker is a sibling, and wants this worker's own word.
_OWN = b"x-penstock-own-word"
_KEY = b"authorization"
_Header = tuple[bytes, bytes]
_Join = Callable[["_Asked", "_Answer"], Awaitable[None]]
#: A sibling that is starting, ending or stopped is left out.
_PATIENCE_S = 1.0
_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{)?")


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
        self._shared: list[tuple[str, re.Pattern[str], _Join]] = [
            ("GET", re.compile("/metrics"), self._metrics),
            ("GET", re.compile("/admin/cluster"), self._cluster),
            ("GET", re.compile("/admin/requests"), self._requests),
            ("GET", re.compile("/admin/requests/[^/]+/explain"), self._explanation),
            ("POST", re.compile("/admin/instances/[^/]+/role"), self._by_the_leader),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        join = self._join_of(scope)
        if join is None or any(name == _OWN for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        asked, own = _Asked(scope, receive), _Answer()
        await self._app(scope, asked.receive, own)
        await join(asked, own)
        await own.send_to(send)

    def _join_of(self, scope: Scope) -> _Join | None:
        if scope["type"] == "http":
            for method, path, join in self._shared:
                if method == scope["method"] and path.fullmatch(scope["path"]):
                    return join
        return None

    # --- one answer of several -----------------------------------------------------------------

    async def _metrics(self, asked: _Asked, own: _Answer) -> None:
        if own.status == 200:
            texts = {n: answer.text for n, answer in (await self._ask_all(asked)).items()}
            own.replace(merge(texts | {self._worker: own.body.decode()}).encode())

    async def _cluster(self, asked: _Asked, own: _Answer) -> None:
        if own.status == 200:
            read = msgspec.json.Decoder(ClusterReport).decode
            others = [read(answer.content) for answer in (await self._ask_all(asked)).values()]
            own.replace(msgspec.json.encode(together(read(own.body), others)))

    async def _requests(self, asked: _Asked, own: _Answer) -> None:
        if own.status == 200:
            read = msgspec.json.Decoder(LiveResponse).decode
            answers = (await self._ask_all(asked)).values()
            parts = [read(own.body), *(read(answer.content) for answer in answers)]
            oldest = sorted((r for p in parts for r in p.requests), key=lambda r: -r.age_s)
            found = LiveResponse(total=sum(p.total for p in parts), requests=oldest[:MAX_LIVE])
            own.replace(msgspec.json.encode(found))

    async def _explanation(self, asked: _Asked, own: _Answer) -> None:
        if own.status == 404:
            for answer in (await self._ask_all(asked)).values():
                own.status = 200
                own.replace(answer.content)

    async def _by_the_leader(self, asked: _Asked, own: _Answer) -> None:
        if _follows(own.status, own.body):
            for answer in (await self._ask_all(asked, any_status=True)).values():
                if not _follows(answer.status_code, answer.content):
                    own.status = answer.status_code
                    own.replace(answer.content)

    # --- asking --------------------------------------------------------------------------------

    async def _ask_all(self, asked: _Asked, any_status: bool = False) -> dict[int, httpx.Response]:
        """The siblings that answered (with 200), and their answers."""
        numbers = sorted(int(p.stem.removeprefix("api-")) for p in self._folder.glob("api-*.sock"))
        others = [n for n in numbers if n != self._worker]
        found = await asyncio.gather(*(self._ask(n, asked) for n in others))
        return {
            n: answer
            for n, answer in zip(others, found)
            if answer is not None and (any_status or answer.status_code == 200)
        }

    async def _ask(self, worker: int, asked: _Asked) -> httpx.Response | None:
        way = httpx.AsyncHTTPTransport(uds=socket_of(str(self._folder), worker))
        url = f"http://localhost{quote(asked.path)}"
        try:
            async with httpx.AsyncClient(transport=way, timeout=_PATIENCE_S) as client:
                return await client.request(
                    asked.method, url, headers=asked.headers, content=asked.body
                )
        except httpx.HTTPError:
            return None


def _follows(status: int, body: bytes) -> bool:
    """Whether this is the answer of a worker that does not lead."""
    return status == NotLeading.http_status and f'"{NotLeading.code}"'.encode() in body


class _Asked:
    """A request, and what of its body the application has read."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method, self.path = scope["method"], scope["path"]
        self.headers = [(k, v) for k, v in scope["headers"] if k == _KEY] + [(_OWN, b"1")]
        self.body = b""
        self._receive = receive

    async def receive(self) -> Any:
        message = await self._receive()
        self.body += message.get("body", b"")
        return message


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
