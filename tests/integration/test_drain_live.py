"""Operators' orders over HTTP, to real processes: out of service, back again, roles."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers.processes import Command, Processes
from tests.integration.test_cluster_processes import FLAGS, SERVED, Streams


def order(server: Command, name: str, what: str, **body: Any) -> httpx.Response:
    url = f"{server.url}/admin/instances/{name}/{what}"
    return httpx.post(url, json=body, timeout=10.0)


def states(server: Command) -> dict[str, str]:
    try:
        return {i["name"]: i["state"] for i in server.get("/health")["instances"]}
    except httpx.TransportError:
        return {}


BOTH = {"engine-0": "active", "engine-1": "active"}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_engine_is_taken_out_for_good_and_brought_back(
    started: Processes, model: str, num_workers: int
) -> None:
    flags = ("--instances", "2", "--api-workers", str(num_workers))
    server = started.server("serve", model, *SERVED, *FLAGS, *flags)
    started.until(lambda: all(states(server) == BOTH for _ in range(8)))
    undisturbed = Streams(server).finished()
    old = server.child("engine-1").pid

    streams = Streams(server)
    streams.all_begun()
    answer = order(server, "engine-1", "drain")
    assert (answer.status_code, answer.json()["asked"]) == (202, "drain")
    assert streams.finished() == undisturbed
    out = {"engine-0": "active", "engine-1": "drained"}
    # Each look is a connection of its own, which any API worker may get.
    started.until(lambda: all(states(server) == out for _ in range(8)))
    assert server.get("/health")["status"] == "ok"
    assert "engine-1 is drained" in server.log and "does not answer" not in server.log

    for _ in range(4):
        answer = order(server, "engine-0", "drain")
        assert answer.status_code == 409 and "no other instance" in answer.text
        answer = order(server, "engine-0", "start")
        assert answer.status_code == 409 and "engine-0 is active" in answer.text
    assert Streams(server).finished() == undisturbed

    assert order(server, "engine-1", "start").status_code == 202
    started.until(lambda: all(states(server) == BOTH for _ in range(8)))
    assert server.child("engine-1").pid != old
    assert Streams(server).finished() == undisturbed


def test_a_worker_of_a_registry_drains_and_is_started_where_it_ran(
    started: Processes, model: str, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/registry.sock"
    router = started.server("router", model, *SERVED, "--registry-address", address)
    url = address.replace("ipc://", "penstock+ipc://")
    workers = {
        name: started.start("worker", model, *FLAGS, "--registry", url, "--name", name)
        for name in ("w0", "w1")
    }
    started.until(lambda: states(router) == {"w0": "active", "w1": "active"})
    answer = order(router, "w1", "start")
    assert answer.status_code == 400 and "was started elsewhere" in answer.text
    assert order(router, "w1", "drain").status_code == 202
    assert workers["w1"].process.wait(60) == 0
    started.until(lambda: states(router) == {"w0": "active"})


def test_any_api_worker_passes_a_role_to_the_one_that_leads(started: Processes, model: str) -> None:
    flags = ("--instances", "2", "--api-workers", "2", "--pd", "off")
    server = started.server("serve", model, *SERVED, *FLAGS, *flags)
    started.until(lambda: all(states(server) == BOTH for _ in range(8)))
    started.until(lambda: len(server.get("/admin/cluster")["speaks_for"]) == 2)
    assert all(Streams(server).finished())

    def roles() -> list[str]:
        found = {i["name"]: i["role"] for i in server.get("/admin/cluster")["instances"]}
        return [found[name] for name in sorted(found)]  # they register in any order

    for role in ("decode", "any", "decode", "any", "prefill", "any"):
        answer = order(server, "engine-1", "role", role=role)
        assert answer.status_code == 202, answer.text
        started.until(lambda role=role: roles() == ["any", role])  # type: ignore[misc]
    totals = [server.get("/admin/cluster")["totals"] for _ in range(6)]
    assert all(t["finished"] == {"length": 6} for t in totals)


def scale(server: Command, instances: int) -> httpx.Response:
    return httpx.post(f"{server.url}/admin/scale", json={"instances": instances}, timeout=10.0)


def test_scaled_from_three_to_one_and_back_under_load(started: Processes, model: str) -> None:
    """Zero failed requests, equal text; and whoever comes back reads no weights: it maps them."""
    server = started.server("serve", model, *SERVED, *FLAGS, "--instances", "3")
    names = ("engine-0", "engine-1", "engine-2")
    started.until(lambda: states(server) == dict.fromkeys(names, "active"))
    undisturbed = Streams(server, 12).finished()

    streams = Streams(server, 12)
    streams.all_begun()
    answer = scale(server, 1)
    assert answer.status_code == 202, answer.text
    drained = answer.json()["drained"]
    assert len(drained) == 2
    assert streams.finished() == undisturbed
    started.until(lambda: [states(server).get(n) for n in drained] == ["drained"] * 2)
    assert Streams(server, 12).finished() == undisturbed

    streams = Streams(server, 12)
    streams.all_begun()
    assert sorted(scale(server, 3).json()["started"]) == sorted(drained)
    assert streams.finished() == undisturbed
    started.until(lambda: states(server) == dict.fromkeys(names, "active"))
    assert Streams(server, 12).finished() == undisturbed
    assert scale(server, 4).status_code == 400
    assert " ERROR " not in server.log
    if "the weights are not shared" not in server.log:
        assert server.log.count("the weights are shared") == 4, server.log


def test_a_killed_engine_maps_the_weights_again(started: Processes, model: str) -> None:
    server = started.server("serve", model, *SERVED, *FLAGS, "--instances", "2")
    started.until(lambda: states(server) == BOTH)
    undisturbed = Streams(server).finished()
    for name in BOTH:  # the one that has read them among them
        old = server.child(name).pid
        streams = Streams(server)
        streams.all_begun()
        os.kill(old, signal.SIGKILL)
        assert streams.finished() == undisturbed
        started.until(lambda name=name, old=old: server.child(name).pid != old)
        started.until(lambda: states(server) == BOTH)
    assert Streams(server).finished() == undisturbed
    if "the weights are not shared" not in server.log:
        assert server.log.count("the weights are shared") == 3, server.log


def test_a_spare_takes_the_place_of_a_killed_engine(started: Processes, model: str) -> None:
    server = started.server("serve", model, *SERVED, *FLAGS, "--spare-engine")
    one = {"engine-0": "active"}
    started.until(lambda: states(server) == one)
    undisturbed = Streams(server).finished()

    def pid() -> int:
        return int(server.get("/admin/cluster")["instances"][0]["pid"])

    def spares() -> list[int]:
        children = psutil.Process(server.process.pid).children()
        return [c.pid for c in children if "--standby" in c.cmdline() and c.pid != pid()]

    for _ in range(2):
        started.until(lambda: len(spares()) == 1)
        (spare,) = spares()
        streams = Streams(server)
        streams.all_begun()
        os.kill(pid(), signal.SIGKILL)
        assert streams.finished() == undisturbed
        started.until(lambda spare=spare: states(server) == one and pid() == spare)
    (spare,) = spares() or [0]
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    assert not spare or not psutil.pid_exists(spare)
