"""Whichever API worker is asked: totals are of all of them, and the leader gets the orders."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from tests.helpers.asgi_call import AsgiCall
from tests.helpers.cluster_reports import report

from penstock.service.api.admin import LiveResponse
from penstock.service.operations import LiveSequence
from penstock.service.recent import Summary, joined
from penstock.service.report import ClusterReport, together
from penstock.service.siblings import Siblings


class Worker:
    """What one worker says; it leads or follows."""

    def __init__(self, name: str, leads: bool = False) -> None:
        self.name = name
        self.leads = leads
        self.taken: list[tuple[str, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, found = await self._answer(scope, receive)
        start = {"type": "http.response.start", "status": status, "headers": []}
        await send(start)
        await send({"type": "http.response.body", "body": msgspec.json.encode(found)})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        if scope["path"] == "/admin/cluster":
            return 200, report(service=self.name, speaks_for=[self.name])
        if scope["path"] == "/admin/requests":
            return 200, LiveResponse(total=3, requests=[sequence(self.name, len(self.name))])
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if not self.leads:
            return 409, {"error": {"message": "ask another", "code": "not_leading"}}
        self.taken.append((scope["path"], body))
        if b"king" in body:
            return 400, {"error": {"message": "no such role", "code": "invalid_request"}}
        return 202, {"by": self.name}


def sequence(request_id: str, age_s: float) -> LiveSequence:
    return LiveSequence(
        id=request_id, choice=0, instance="a", phase="decoding", age_s=age_s, prompt_tokens=3,
        output_tokens=2, attempt=1, request_class="online",
    )  # fmt: skip


@contextlib.contextmanager
def beside(folder: Path, number: int, app: Worker) -> Iterator[None]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / f"api-{number}.sock"))
    inner = Siblings(app, str(folder), number)
    server = uvicorn.Server(uvicorn.Config(inner, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield
    server.should_exit = True
    thread.join(10)


async def ask(folder: Path, own: Worker, method: str, path: str, body: object = b"") -> AsgiCall:
    return await AsgiCall(Siblings(own, str(folder), 0), method, path, body).finished()


async def test_totals_are_of_all_workers(tmp_path: Path) -> None:
    with beside(tmp_path, 1, Worker("one")), beside(tmp_path, 2, Worker("three")):
        call = await ask(tmp_path, Worker("zero"), "GET", "/admin/cluster")
        live = await ask(tmp_path, Worker("zero"), "GET", "/admin/requests")
    found = msgspec.json.decode(call.body, type=ClusterReport)
    single = report()
    assert found.service == "zero" and found.speaks_for == ["one", "three", "zero"]
    assert found.totals.generation_tokens == 3 * single.totals.generation_tokens
    assert found.totals.finished == {"stop": 2700, "error": 3}
    assert found.totals.tokens_per_s == pytest.approx(3 * single.totals.tokens_per_s)
    assert found.totals.role_changes == single.totals.role_changes
    assert found.ttft_s.count == 3 * single.ttft_s.count and found.ttft_s.p99 == single.ttft_s.p99
    assert [i.name for i in found.instances] == [i.name for i in single.instances]
    assert [i.running for i in found.instances] == [i.running for i in single.instances]
    requests = msgspec.json.decode(live.body, type=LiveResponse)
    assert requests.total == 9 and [r.id for r in requests.requests] == ["three", "zero", "one"]


async def test_a_worker_alone_speaks_for_itself(tmp_path: Path) -> None:
    call = await ask(tmp_path, Worker("zero"), "GET", "/admin/cluster")
    found = msgspec.json.decode(call.body, type=ClusterReport)
    assert found.speaks_for == ["zero"] and found.totals == report().totals


@pytest.mark.parametrize("leader", [0, 1, 2])
async def test_a_role_is_given_by_the_leader_once(tmp_path: Path, leader: int) -> None:
    workers = [Worker(f"w{n}", leads=n == leader) for n in range(3)]
    path, body = "/admin/instances/engine-0/role", {"role": "decode"}
    with beside(tmp_path, 1, workers[1]), beside(tmp_path, 2, workers[2]):
        call = await ask(tmp_path, workers[0], "POST", path, body)
        wrong = await ask(tmp_path, workers[0], "POST", path, {"role": "king"})
    assert call.status == 202 and call.json() == {"by": f"w{leader}"}
    assert wrong.status == 400 and "no such role" in wrong.body.decode()
    (first, second) = workers[leader].taken
    assert first[0] == second[0] == path and json.loads(first[1]) == body
    assert all(w.taken == [] for w in workers if w is not workers[leader])


async def test_where_nobody_leads_that_is_said(tmp_path: Path) -> None:
    with beside(tmp_path, 1, Worker("w1")):
        call = await ask(
            tmp_path, Worker("w0"), "POST", "/admin/instances/engine-0/role", {"role": "any"}
        )
    assert call.status == 409 and call.json()["error"]["code"] == "not_leading"


def test_times_of_several_places() -> None:
    a = Summary(1, 1.0, 1.0, 2.0, 3.0, 1.0)
    b = Summary(3, 5.0, 4.0, 4.0, 4.0, 0.0)
    assert joined([a, Summary(0), b]) == Summary(4, 4.0, 4.0, 4.0, 4.0, 0.25)
    assert joined([Summary(0)]) == Summary(0)
    assert joined([a]) == a
    assert joined([Summary(2, 1.0), Summary(2, 3.0)]) == Summary(4, 2.0)


def test_an_instance_that_a_sibling_does_not_know_stays() -> None:
    own, other = report(2), report(1)
    found = together(own, [other])
    assert [i.name for i in found.instances] == [i.name for i in own.instances]
    first, second = own.instances
    if first.ttft_s is not None:
        assert found.instances[0].ttft_s == joined([first.ttft_s, first.ttft_s])
    assert found.instances[1].ttft_s == second.ttft_s
