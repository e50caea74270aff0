"""API workers explain each other's requests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from tests.helpers.asgi_call import AsgiCall

from penstock.service.siblings import Siblings


class Knows:
    """An application that knows one request, and wants a key."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.asked: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope["path"])
        allowed = dict(scope["headers"]).get(b"authorization") == b"Bearer k"
        known = self.request_id in scope["path"]
        status = 401 if not allowed else 200 if known else 404
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": self.request_id.encode()})


@pytest.fixture
def sibling(tmp_path: Path) -> Iterator[Knows]:
    app = Knows("theirs")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "api-1.sock"))
    inner = Siblings(app, str(tmp_path), 1)
    settings = uvicorn.Config(inner, log_level="error", lifespan="off")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield app
    server.should_exit = True
    thread.join(10)


async def ask(folder: Path, path: str, key: str = "k") -> tuple[int, bytes]:
    shared = Siblings(Knows("ours"), str(folder), 0)
    call = await AsgiCall(
        shared, "GET", path, headers={"authorization": f"Bearer {key}"}
    ).finished()
    return call.status, call.body


async def test_who_served_it_is_found(tmp_path: Path, sibling: Knows) -> None:
    assert await ask(tmp_path, "/admin/requests/ours/explain") == (200, b"ours")
    assert sibling.asked == []
    assert await ask(tmp_path, "/admin/requests/theirs/explain") == (200, b"theirs")
    assert (await ask(tmp_path, "/admin/requests/nobodys/explain"))[0] == 404
    assert sibling.asked == ["/admin/requests/theirs/explain", "/admin/requests/nobodys/explain"]


async def test_a_wrong_key_gets_no_further(tmp_path: Path, sibling: Knows) -> None:
    assert (await ask(tmp_path, "/admin/requests/theirs/explain", key="x"))[0] == 401
    assert sibling.asked == []


async def test_other_paths_are_left_alone(tmp_path: Path, sibling: Knows) -> None:
    assert (await ask(tmp_path, "/v1/theirs"))[0] == 404
    assert sibling.asked == []


async def test_a_sibling_that_is_gone_is_no_failure(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "api-1.sock"))  # nobody listens
        assert (await ask(tmp_path, "/admin/requests/theirs/explain"))[0] == 404
