"""What clients see when a part of a cluster fails: real processes, real signals, split requests.

    python -m benchmarks.faults [--only served|routers|hosts] [--streams 24] [--json FILE]

Requests arrive one by one; every other one has a long prompt, so that there is always one that is
being computed and one that is being decoded. In the middle of that the fault happens. For each: how
many requests were lost or came out otherwise than in the undisturbed run of one instance; how long
it took from the fault (the moment the signal is out) until the interrupted ones were placed anew,
and from there to their next token, beside what was predicted for that.

Three clusters: `served` (one service, whose engines are its children), `routers` (two routers and
three workers that find each other through etcd), and `hosts` (two workers in network namespaces of
their own, with a cable between them that is cut).
"""

from __future__ import annotations

import benchmarks.dev_packages  # noqa: F401  says what is missing

# isort: split
import argparse
import asyncio
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, Signals
from typing import Any

import httpx
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.cluster import (
    Answer,
    ask,
    body,
    cluster_report,
    instances,
    send_signal,
    wait_for,
    with_role,
)
from tests.helpers.etcd import Etcd, running_etcd
from tests.helpers.hosts import NoHosts, Pair, pair_of_hosts
from tests.helpers.processes import Command, processes
from tests.helpers.server import free_port, running

ENGINE_FLAGS = (
    "--dtype", "float32", "--kv-cache-memory-bytes", "96M", "--num-threads", "1",
)  # fmt: skip
SERVED = ("--served-model-name", "m")
LONG_TOKENS, SHORT_TOKENS = 1500, 60
SECRET = "0123456789abcdef0123456789abcdef"
#: How long what is stopped stays stopped, and etcd away.
STOPPED_S, AWAY_S = 10.0, 5.0


@dataclass
class Scene:
    """One cluster. Requests go to `urls` in turn; the first one is asked about the cluster."""

    urls: list[str]
    roles: list[str]
    etcd: Etcd | None = None
    routers: list[Command] = field(default_factory=list)
    pair: Pair | None = None

    def ready(self) -> None:
        def all_there() -> bool:
            return all(self._roles(url) == self.roles for url in self.urls)

        wait_for(all_there, 90.0, f"the roles {self.roles}")

    def _roles(self, url: str) -> list[str]:
        try:
            return sorted(i["role"] for i in instances(url).values() if i["state"] == "active")
        except httpx.TransportError:
            return []


@dataclass
class Struck:
    """The fault has happened. `repair` is called beside the load, as long as it takes."""

    at_s: float
    repair: Callable[[], None] = lambda: None
    #: Requests whose connection the fault itself ends, by their place.
    own: Callable[[int], bool] = lambda number: False


@dataclass(frozen=True)
class Fault:
    name: str
    #: Finds out whom it hits, and returns what then does it at once.
    prepare: Callable[[Scene], Callable[[], Struck]]
    #: Why placements are made that count as interruptions.
    because: tuple[str, ...] = ("moved", "migrated")
    #: From one arrival to the next.
    every_s: float = 0.06
    #: Whether somebody must come to lead again.
    deposes: bool = False


@dataclass(frozen=True)
class Row:
    fault: str
    requests: int
    #: Without those whose own router was killed.
    lost: int
    differing: int
    #: Connections that ended with the router they were made to.
    reset: int
    interrupted: int
    #: From the fault to the new placement; from there to the next token; and as predicted.
    placed_p50_s: float
    placed_max_s: float
    next_token_p50_s: float
    next_token_max_s: float
    predicted_p50_s: float
    predicted_max_s: float
    #: Of the cluster: from the fault until a router leads, where that is asked.
    led_again_s: float | None = None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description=__doc__)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--only", choices=list(CLUSTERS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    bodies = [request(i) for i in range(options.streams)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(
            folder, "qwen3", num_hidden_layers=4, hidden_size=128, max_position_embeddings=2048
        )
        with running(folder, *SERVED, *ENGINE_FLAGS) as server:
            calm = asyncio.run(_disturbed(Scene([server.url], []), None, bodies))[0]
        assert all(a.ends == ["length"] for a in calm), "the undisturbed run failed"
        for name, (cluster, faults) in CLUSTERS.items():
            if options.only not in (None, name):
                continue
            with cluster(folder) as scene:
                if scene is not None:
                    rows += [measure(scene, fault, bodies, calm) for fault in faults]
    print_table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def request(number: int) -> dict[str, Any]:
    """Prompts of their own from the first block on: nothing is found in a cache but by design."""
    if number % 2:
        data = body(number, prompt_tokens=LONG_TOKENS + number, max_tokens=100)
    else:
        data = body(number, prompt_tokens=SHORT_TOKENS + number, max_tokens=500)
    data["temperature"] = float(number // 2 % 2)
    data["prompt"][0] = 5 + number
    return data


# --- one row -----------------------------------------------------------------------------------


def measure(scene: Scene, fault: Fault, bodies: list[dict[str, Any]], calm: list[Answer]) -> Row:
    print(f"{fault.name} ...", file=sys.stderr, flush=True)
    scene.ready()
    # What an earlier row has left in the caches would help this one.
    fresh = [data | {"cache_salt": fault.name} for data in bodies]
    answers, struck = asyncio.run(_disturbed(scene, fault, fresh))
    assert struck is not None
    led_again_s = _led_again_s(scene, struck) if fault.deposes else None
    own = [i for i in range(len(answers)) if struck.own(i) and answers[i].reset]
    others = [i for i in range(len(answers)) if i not in own]
    again = [found for i in others if (found := _interruption(scene, i, answers[i], struck, fault))]
    return Row(
        fault.name,
        len(answers),
        sum(answers[i].reset or answers[i].ends != ["length"] for i in others),
        sum(answers[i].outcome != calm[i].outcome for i in others),
        len(own),
        len(again),
        *_middle_and_top([since_s for since_s, _ in again]),
        *_middle_and_top([p["actual_ttft_s"] or 0.0 for _, p in again]),
        *_middle_and_top([p["predicted_ttft_s"] or 0.0 for _, p in again]),
        led_again_s,
    )


async def _disturbed(
    scene: Scene, fault: Fault | None, bodies: list[dict[str, Any]]
) -> tuple[list[Answer], Struck | None]:
    """The fault comes once half of the requests have arrived, as soon as a long prompt of them is
    being computed."""
    answers = [Answer() for _ in bodies]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60.0, limits=limits) as client:

        async def one(number: int) -> None:
            await asyncio.sleep(number * (fault.every_s if fault else 0.05))
            url = scene.urls[number % len(scene.urls)]
            await ask(client, url, bodies[number], answers[number])

        tasks = [asyncio.create_task(one(i)) for i in range(len(bodies))]
        struck = None
        if fault is not None:
            while sum(a.started_s > 0 for a in answers) < len(answers) / 2:
                await asyncio.sleep(0.002)
            strike = await asyncio.to_thread(fault.prepare, scene)
            while not _in_the_middle(answers):
                await asyncio.sleep(0.002)
            struck = await asyncio.to_thread(strike)
            repairing = asyncio.create_task(asyncio.to_thread(struck.repair))
        await asyncio.gather(*tasks)
        if fault is not None:
            await repairing
    return answers, struck


def _in_the_middle(answers: list[Answer]) -> bool:
    """Somebody waits for the first token of a long prompt; or all have arrived."""
    now = time.monotonic()
    waiting = [a for a in answers[1::2] if a.started_s and not a.num_chunks]
    fresh = any(0.005 < now - a.started_s < 0.05 for a in waiting)
    return fresh or all(a.started_s for a in answers)


def _interruption(
    scene: Scene, number: int, answer: Answer, struck: Struck, fault: Fault
) -> tuple[float, dict[str, Any]] | None:
    """The first placement that the fault has made necessary, and when, counted from the fault."""
    if not answer.request_id or struck.own(number):
        return None  # (who could explain it is gone)
    url = scene.urls[number % len(scene.urls)]
    found = httpx.get(f"{url}/admin/requests/{answer.request_id}/explain").json()
    for placement in found["prompts"][0]["choices"][0]["placements"]:
        since_s = answer.started_s + placement["at_s"] - struck.at_s
        if since_s > 0 and placement["because"].startswith(fault.because):
            return since_s, placement
    return None


def _led_again_s(scene: Scene, struck: Struck) -> float:
    """Until somebody who lives leads the cluster, as he says himself; looked at after the load."""
    living = [r.url for r in scene.routers if r.process.poll() is None]

    def led() -> bool:
        reports = [cluster_report(url) for url in living]
        return any(r["leader"] == r["service"] for r in reports)

    wait_for(led, 30.0, "a leader")
    return time.monotonic() - struck.at_s


def _middle_and_top(values: list[float]) -> tuple[float, float]:
    return (statistics.median(values), max(values)) if values else (0.0, 0.0)


# --- faults ------------------------------------------------------------------------------------


def _nothing(scene: Scene) -> Callable[[], Struck]:
    return lambda: Struck(time.monotonic())


def _signal(role: str, number: Signals) -> Callable[[Scene], Callable[[], Struck]]:
    def prepare(scene: Scene) -> Callable[[], Struck]:
        pid = with_role(scene.urls[0], role)["pid"]

        def wake() -> None:
            time.sleep(STOPPED_S)
            with contextlib.suppress(ProcessLookupError):  # it was killed and replaced meanwhile
                send_signal(pid, SIGCONT)

        def strike() -> Struck:
            send_signal(pid, number)
            at_s = time.monotonic()
            return Struck(at_s, wake) if number == SIGSTOP else Struck(at_s)

        return strike

    return prepare


def _order(to: str, what: str, **data: str) -> Callable[[Scene], Callable[[], Struck]]:
    def prepare(scene: Scene) -> Callable[[], Struck]:
        name = with_role(scene.urls[0], to)["name"]

        def strike() -> Struck:
            url = f"{scene.urls[0]}/admin/instances/{name}/{what}"
            at_s = time.monotonic()
            httpx.post(url, json=data or None).raise_for_status()
            return Struck(at_s)

        return strike

    return prepare


def _kill_the_leader(scene: Scene) -> Callable[[], Struck]:
    reports = [cluster_report(router.url) for router in scene.routers]
    place = [r["leader"] == r["service"] for r in reports].index(True)
    process = scene.routers[place].process

    def strike() -> Struck:
        process.send_signal(SIGKILL)
        at_s = time.monotonic()
        process.wait()
        return Struck(at_s, own=lambda number: number % len(scene.urls) == place)

    return strike


def _etcd_away(scene: Scene) -> Callable[[], Struck]:
    etcd = scene.etcd
    assert etcd is not None

    def back() -> None:
        time.sleep(AWAY_S)
        etcd.start()

    def strike() -> Struck:
        etcd.kill()
        return Struck(time.monotonic(), back)

    return strike


def _cut(scene: Scene) -> Callable[[], Struck]:
    pair = scene.pair
    assert pair is not None

    def strike() -> Struck:
        pair.cut()
        return Struck(time.monotonic())

    return strike


# --- clusters ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _served(model: str) -> Iterator[Scene | None]:
    flags = (*SERVED, *ENGINE_FLAGS, "--instances", "3", "--pd", "static=1:2")
    with running(model, *flags) as server:
        yield Scene([server.url], ["decode", "decode", "prefill"])


@contextlib.contextmanager
def _routers(model: str) -> Iterator[Scene | None]:
    if shutil.which("etcd") is None:
        print("no etcd here (apt-get install etcd-server): no rows of routers", file=sys.stderr)
        yield None
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        running_etcd(Path(folder)) as etcd,
        processes(Path(folder)) as started,
    ):
        flags = (*SERVED, "--registry", etcd.url, "--pd", "static=1:2")
        routers = [started.server("router", model, *flags) for _ in range(2)]
        for name in ("w0", "w1", "w2"):
            started.start("worker", model, *ENGINE_FLAGS, "--registry", etcd.url, "--name", name)
        roles = ["decode", "decode", "prefill"]
        yield Scene([r.url for r in routers], roles, etcd=etcd, routers=routers)


@contextlib.contextmanager
def _hosts(model: str) -> Iterator[Scene | None]:
    with contextlib.ExitStack() as stack:
        try:
            pair = stack.enter_context(pair_of_hosts())
        except NoHosts as exc:
            print(f"{exc}: no rows of hosts", file=sys.stderr)
            yield None
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = stack.enter_context(processes(folder))
        (folder / "secret").write_text(SECRET)
        secret = ("--cluster-secret-file", str(folder / "secret"))
        port = free_port()
        router = started.server(
            "router", model, *SERVED, *secret, "--pd", "static=1:1",
            "--registry-address", f"tcp://0.0.0.0:{port}",
        )  # fmt: skip
        for name, host in (("a", pair.a), ("b", pair.b)):
            started.start(
                "worker", model, *ENGINE_FLAGS, *secret, "--name", name,
                "--registry", f"penstock://{host.here}:{port}", namespace=host.namespace,
            )  # fmt: skip
        yield Scene([router.url], ["decode", "prefill"], pair=pair)


CLUSTERS: dict[str, tuple[Callable[[str], Any], tuple[Fault, ...]]] = {
    "served": (
        _served,
        (
            Fault("nothing", _nothing),
            Fault("kill -9 of prefill", _signal("prefill", SIGKILL)),
            Fault("kill -9 of a decode", _signal("decode", SIGKILL)),
            Fault("SIGSTOP of prefill", _signal("prefill", SIGSTOP)),
            Fault("SIGSTOP of a decode", _signal("decode", SIGSTOP)),
            Fault("decode becomes prefill", _order("decode", "role", role="decode_to_prefill")),
            Fault("drain of a decode", _order("decode", "drain")),
        ),
    ),
    "routers": (
        _routers,
        (
            Fault("etcd killed, back in 5 s", _etcd_away, every_s=0.4, deposes=True),
            Fault("worker (decode) stopped for 10 s", _signal("decode", SIGSTOP), every_s=0.6),
            Fault("worker (prefill) stopped for 10 s", _signal("prefill", SIGSTOP), every_s=0.6),
            Fault("kill -9 of the leading router", _kill_the_leader, deposes=True),
        ),
    ),
    "hosts": (
        _hosts,
        (
            Fault("nothing, over TCP", _nothing, because=("handover",)),
            Fault("cut between prefill and decode", _cut, because=("handover",)),
        ),
    ),
}


def print_table(rows: list[Row]) -> None:
    print(
        "| fault | requests | lost | differing | reset | interrupted "
        "| placed anew after, p50 / max | next token after that, p50 / max "
        "| predicted, p50 / max | led again |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        times = ["-"] * 3
        if r.interrupted:
            times = [
                f"{r.placed_p50_s:.2f} / {r.placed_max_s:.2f} s",
                f"{1e3 * r.next_token_p50_s:.0f} / {1e3 * r.next_token_max_s:.0f} ms",
                f"{1e3 * r.predicted_p50_s:.0f} / {1e3 * r.predicted_max_s:.0f} ms",
            ]
        led = "-" if r.led_again_s is None else f"{r.led_again_s:.1f} s"
        print(
            f"| {r.fault} | {r.requests} | {r.lost} | {r.differing} | {r.reset} | {r.interrupted} "
            f"| {times[0]} | {times[1]} | {times[2]} | {led} |"
        )


if __name__ == "__main__":
    main()
