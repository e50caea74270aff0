"""Clusters of real processes: several engines, several routers, registries, secrets, and kills."""

from __future__ import annotations

import os
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.helpers.etcd import Etcd, running_etcd
from tests.helpers.processes import Command, Processes
from tests.helpers.server import free_port

#: Small pools, since many engines are started; float32, so that texts are equal to the last digit.
FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "32M")
SERVED = ("--served-model-name", "m")
SECRET = "0123456789abcdef0123456789abcdef"
NUM_TOKENS = 150


def client(server: Command) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60.0)


class Streams(threading.Thread):
    """Some streams at once through the openai client; their texts, and what went wrong."""

    def __init__(self, server: Command, num: int = 6) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.texts = [""] * num
        self.problems: list[str] = []
        self.begun = threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        threads = [threading.Thread(target=self._one, args=(i,)) for i in range(len(self.texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, number: int) -> None:
        begun = False
        try:
            prompt = [(7 * number + i) % 300 + 5 for i in range(20 + number)]
            stream = client(self._server).completions.create(
                model="m", prompt=prompt, max_tokens=NUM_TOKENS, seed=number, stream=True,
                temperature=float(number % 2), extra_body={"ignore_eos": True},
            )  # fmt: skip
            for chunk in stream:
                self.texts[number] += chunk.choices[0].text
                if not begun:
                    begun = True
                    self.begun.release()
        except (openai.OpenAIError, httpx.HTTPError) as exc:
            self.problems.append(f"{type(exc).__name__}: {exc}")
        finally:
            if not begun:
                self.begun.release()

    def all_begun(self) -> None:
        for _ in self.texts:
            assert self.begun.acquire(timeout=60)

    def finished(self) -> list[str]:
        self.join(100)
        assert not self.is_alive(), "streams hang"
        assert self.problems == []
        return self.texts


def killed_while_streaming(started: Processes, server: Command, pid: int) -> None:
    """Texts must equal those of an undisturbed run."""
    undisturbed = Streams(server).finished()
    assert all(undisturbed)
    disturbed = Streams(server)
    disturbed.all_begun()
    os.kill(pid, signal.SIGKILL)
    assert disturbed.finished() == undisturbed


def test_several_instances_behind_one_service_and_one_is_killed(
    started: Processes, model: str
) -> None:
    server = started.server("serve", model, *SERVED, *FLAGS, "--instances", "2")
    started.until(lambda: server.active() == {"engine-0", "engine-1"})
    cluster = server.get("/admin/cluster")
    assert len({i["pid"] for i in cluster["instances"]}) == 2
    assert cluster["leader"] == cluster["service"] in cluster["routers"]
    killed_while_streaming(started, server, server.child("engine-1").pid)
    started.until(lambda: server.active() == {"engine-0", "engine-1"})
    assert server.process.poll() is None


@pytest.fixture(params=["embedded", "etcd"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL for workers, and the router's flags."""
    if request.param == "etcd":
        (tmp_path / "etcd").mkdir()
        with running_etcd(tmp_path / "etcd") as etcd:
            yield etcd.url, ["--registry", etcd.url]
    else:
        port = free_port()
        yield f"penstock://127.0.0.1:{port}", ["--registry-address", f"tcp://127.0.0.1:{port}"]


def test_workers_and_a_router_find_each_other_and_one_worker_is_killed(
    started: Processes, model: str, registry: tuple[str, list[str]]
) -> None:
    url, flags = registry
    router = started.server("router", model, *SERVED, *flags)
    workers = [
        started.start("worker", model, *FLAGS, "--registry", url, "--name", name)
        for name in ("w0", "w1")
    ]
    started.until(lambda: router.active() == {"w0", "w1"})
    killed_while_streaming(started, router, workers[0].process.pid)
    started.until(lambda: router.active() == {"w1"})
    started.until(lambda: len(router.get("/health")["instances"]) == 1)
    # Its successor comes under the same name, with another address.
    started.start("worker", model, *FLAGS, "--registry", url, "--name", "w0")
    started.until(lambda: router.active() == {"w0", "w1"})


def test_prefill_here_and_decode_there_says_what_one_instance_says(
    started: Processes, model: str
) -> None:
    whole = started.server("serve", model, *SERVED, *FLAGS)
    split = started.server(
        "serve", model, *SERVED, *FLAGS, "--instances", "2", "--pd", "static=1:1"
    )
    started.until(lambda: len(whole.active()) == 1 and len(split.active()) == 2)

    def roles() -> list[str]:
        return sorted(i["role"] for i in split.get("/admin/cluster")["instances"])

    started.until(lambda: roles() == ["decode", "prefill"])
    assert Streams(split).finished() == Streams(whole).finished()
    assert split.get("/admin/cluster")["totals"]["handovers"] > 0


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    (tmp_path / "etcd").mkdir()
    with running_etcd(tmp_path / "etcd") as etcd:
        yield etcd


def test_two_routers_one_leads_and_the_other_takes_over(
    started: Processes, model: str, etcd: Etcd
) -> None:
    routers = [started.server("router", model, *SERVED, "--registry", etcd.url) for _ in range(2)]
    started.start("worker", model, *FLAGS, "--registry", etcd.url, "--name", "w0")
    for router in routers:
        started.until(lambda router=router: router.active() == {"w0"})  # type: ignore[misc]
        started.until(
            lambda router=router: len(router.get("/admin/cluster")["routers"]) == 2  # type: ignore[misc]
        )
    leader = routers[0].get("/admin/cluster")["leader"]
    first, other = sorted(routers, key=lambda r: r.get("/admin/cluster")["service"] != leader)

    def other_leads() -> bool:
        seen = other.get("/admin/cluster")
        return bool(seen["leader"] == seen["service"])

    streams = Streams(other)
    streams.all_begun()
    first.process.send_signal(signal.SIGSTOP)
    started.until(other_leads)
    assert all(streams.finished()), "other routers notice nothing"
    # A leader that slept through its lease stands down when it wakes.
    first.process.send_signal(signal.SIGCONT)
    started.until(lambda: "this service follows" in first.log)
    assert other_leads()
    other.kill()
    started.until(lambda: first.log.count("this service leads") == 2)
    terms = [int(line.split()[-1]) for line in first.log.splitlines() if "leads, in term" in line]
    assert terms[0] < terms[1] - 1, "the other one's term lies between"
    assert all(Streams(first).finished())


def test_etcd_is_gone_for_longer_than_every_lease_and_nobody_notices(
    started: Processes, model: str, etcd: Etcd
) -> None:
    router = started.server("router", model, *SERVED, "--registry", etcd.url)
    for name in ("w0", "w1"):
        started.start("worker", model, *FLAGS, "--registry", etcd.url, "--name", name)
    started.until(lambda: router.active() == {"w0", "w1"})
    before = Streams(router).finished()
    etcd.kill()
    started.until(lambda: "this service follows" in router.log)  # its lease may have ended
    assert router.active() == {"w0", "w1"}
    assert Streams(router).finished() == before
    etcd.start()
    started.start("worker", model, *FLAGS, "--registry", etcd.url, "--name", "w2")
    started.until(lambda: router.active() == {"w0", "w1", "w2"})
    assert Streams(router).finished() == before


def test_api_workers_share_the_port_and_one_is_killed(started: Processes, model: str) -> None:
    server = started.server("serve", model, *SERVED, *FLAGS, "--api-workers", "2")

    def services() -> set[str]:
        """Each look is a connection of its own, which the kernel gives to any worker."""
        looks = [server.get("/admin/cluster") for _ in range(16)]
        return {look["service"] for look in looks if look["ready"]}

    def ready() -> bool:
        try:
            return len(services()) == 2
        except httpx.TransportError:
            return False

    started.until(ready)
    before = Streams(server).finished()
    text = httpx.get(f"{server.url}/metrics").text
    assert 'api_worker="0"' in text and 'api_worker="1"' in text
    # Whichever worker served it, each can explain it: these connections are anybody's.
    answered = [
        client(server).completions.create(model="m", prompt=[5, 6, 7], max_tokens=2).id
        for _ in range(4)
    ]
    for request_id in answered:
        explained = httpx.get(f"{server.url}/admin/requests/{request_id}/explain")
        assert explained.status_code == 200, explained.text
        assert explained.json()["id"] == request_id
    assert httpx.get(f"{server.url}/admin/requests/nobodys/explain").status_code == 404
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    server.child("--api-worker=0").kill()
    started.until(lambda: "API worker api-0 ended" in server.log)
    assert Streams(server).finished() == before
    started.until(ready)
    # The only engine: what it ran waits for its successor, wherever its stream ends.
    killed_while_streaming(started, server, server.child("engine-0").pid)
    started.until(ready)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(40) == 0


def test_hosts_share_a_secret_and_strangers_are_told(
    started: Processes, model: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    port = free_port()
    url = f"penstock://127.0.0.1:{port}"
    router = started.server(
        "router", model, *SERVED, "--registry-address", f"tcp://0.0.0.0:{port}",
        "--cluster-secret-file", str(file),
    )  # fmt: skip
    right = ("--cluster-secret-file", str(file))
    started.start("worker", model, *FLAGS, "--registry", url, "--name", "friend", *right)
    wrong = started.start(
        "worker", model, *FLAGS, "--registry", url, "--name", "stranger",
        env={"PENSTOCK_CLUSTER_SECRET": SECRET[::-1]},
    )  # fmt: skip
    none = started.start("worker", model, *FLAGS, "--registry", url, "--name", "nobody")
    started.until(lambda: router.active() == {"friend"})
    started.until(lambda: "has another cluster secret" in wrong.log)
    started.until(lambda: "do not both have a cluster secret" in none.log)
    assert all(Streams(router, 2).finished())
    assert router.active() == {"friend"}


def test_beyond_this_host_a_secret_is_asked_for(started: Processes, model: str) -> None:
    for arguments in (
        ("worker", model, "--address", "tcp://0.0.0.0:0"),
        ("router", model, "--registry-address", "tcp://0.0.0.0:8040", "--port", "0"),
        ("router", model, "--engine-address", "tcp://192.0.2.1:5555", "--port", "0"),
    ):
        command = started.start(*arguments)
        assert command.process.wait(60) == 2, command.log
        assert "--cluster-secret-file" in command.log


def test_https(started: Processes, model: str, certificate: tuple[Path, Path]) -> None:
    public, key = certificate
    server = started.server(
        "serve", model, *SERVED, *FLAGS, "--ssl-keyfile", str(key), "--ssl-certfile",
        str(public),
    )  # fmt: skip
    url = server.url.replace("http:", "https:")
    trusted = ssl.create_default_context(cafile=public)

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/health", verify=trusted).status_code == 200
        except httpx.TransportError:
            return False

    started.until(ready)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
