"""Two hosts, as far as one machine can be two: a worker in a network namespace of its own, reached
over an Ethernet pair, with the cluster's secret; then the cable is cut."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from penstock.engine.transfer.server import BlockServer, Served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.processes import Processes
from tests.helpers.server import free_port
from tests.integration.test_cluster_processes import FLAGS, SECRET, SERVED, Streams


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class OtherHost:
    namespace: str
    #: Addresses of this side and of the other.
    here: str
    there: str

    @property
    def cable(self) -> str:
        return f"{self.namespace}-a"

    def plug(self, state: str) -> None:
        _ip("link", "set", self.cable, state)


@pytest.fixture
def other_host() -> Iterator[OtherHost]:
    if shutil.which("ip") is None:
        pytest.skip("no `ip` here: apt-get install iproute2")
    number = secrets.randbelow(250) + 1
    host = OtherHost(f"pst{os.getpid() % 10**7}", f"10.231.{number}.1", f"10.231.{number}.2")
    try:
        _ip("netns", "add", host.namespace)
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"no network namespaces here: {exc.stderr.strip()}")
    try:
        other_end = f"{host.namespace}-b"
        _ip("link", "add", host.cable, "type", "veth", "peer", "name", other_end)
        _ip("link", "set", other_end, "netns", host.namespace)
        _ip("addr", "add", f"{host.here}/24", "dev", host.cable)
        host.plug("up")
        inside = ("-n", host.namespace)
        _ip(*inside, "addr", "add", f"{host.there}/24", "dev", other_end)
        _ip(*inside, "link", "set", other_end, "up")
        _ip(*inside, "link", "set", "lo", "up")
        yield host
    finally:
        # The pair goes with the namespace that one of its ends is in.
        _ip("netns", "del", host.namespace)


def test_a_worker_on_another_host_is_found_cut_off_and_found_again(
    started: Processes, other_host: OtherHost, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    make_checkpoint(model, "qwen3", num_hidden_layers=2, hidden_size=64)
    file = tmp_path / "secret"
    file.write_text(SECRET)
    secret = ("--cluster-secret-file", str(file))
    port = free_port()
    router = started.server(
        "router", str(model), *SERVED, *secret,
        "--registry-address", f"tcp://{other_host.here}:{port}",
    )  # fmt: skip
    url = f"penstock://{other_host.here}:{port}"
    for name, namespace in (("near", None), ("far", other_host.namespace)):
        started.start(
            "worker", str(model), *FLAGS, *secret, "--registry", url, "--name", name,
            namespace=namespace,
        )  # fmt: skip
    started.until(lambda: router.active() == {"near", "far"})
    addresses = {i["name"]: i["address"] for i in router.get("/admin/cluster")["instances"]}
    assert addresses["far"].startswith(f"tcp://{other_host.there}:")
    undisturbed = Streams(router).finished()
    disturbed = Streams(router)
    disturbed.all_begun()
    other_host.plug("down")
    assert disturbed.finished() == undisturbed
    started.until(lambda: router.active() == {"near"})
    other_host.plug("up")
    started.until(lambda: router.active() == {"near", "far"})
    assert Streams(router).finished() == undisturbed


_FETCH = """
import ssl, sys
import numpy as np
from penstock.engine.transfer.tcp import Connection, Expected, TransferFailed
from penstock.protocol.kv import BlockHandle
endpoint, secret = sys.argv[1:]
try:
    connection = Connection(endpoint, Expected(7, 100_000), secret.encode())
except TransferFailed as exc:
    sys.exit(str(exc))
into, came = np.zeros(100_000, np.uint8), [False]
connection.fetch([(BlockHandle(0, 5, bytes(16)), into)], came)
print(isinstance(connection._socket, ssl.SSLSocket), came[0], int(into.sum()))
"""


def test_blocks_travel_sealed_to_another_host_and_plain_within_one(other_host: OtherHost) -> None:
    pool = np.random.default_rng(0).integers(0, 256, (1, 100_000)).astype(np.uint8)
    served = Served(pool.__getitem__, np.full(1, 5, np.uint64), 7, 100_000, lambda block: bytes(16))
    server = BlockServer(served, other_host.here, SECRET.encode())

    def fetched(*where: str, secret: str = SECRET) -> subprocess.CompletedProcess[str]:
        command = [*where, sys.executable, "-c", _FETCH, server.endpoint, secret]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    there = ("ip", "netns", "exec", other_host.namespace)
    assert fetched(*there).stdout.split() == ["True", "True", str(pool.sum())]
    assert fetched().stdout.split() == ["False", "True", str(pool.sum())]
    assert "a cluster secret is needed" in fetched(*there, secret="").stderr
    assert fetched(*there, secret="another one than ours").returncode == 1
    server.close()
