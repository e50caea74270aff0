"""`penstock up` on a real Ray cluster of one node: apply, again, scale, kill, down."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.helpers.server import environment, free_port, penstock

pytest.importorskip("ray", reason="needs the extra ray: pip install 'penstock[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """A Ray head of our own, in a session of processes that ends with the test."""
    port = free_port()
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}",
        "--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats", "--block",
        "--node-ip-address=127.0.0.1", f"--temp-dir=/tmp/ray-{os.getpid()}",
        "--object-store-memory=80000000",
    ]  # fmt: skip
    with (tmp_path / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment()
        )
    try:
        wait_for(lambda: "Ray runtime started" in (tmp_path / "ray.log").read_text())
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)


def wait_for(what: Callable[[], object], timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_the_life_of_a_cluster(head: str, tmp_path: Path) -> None:
    port, registry_port = free_port(), free_port()
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"name: t{os.getpid()}\nmodel: toy\n"
        f"routers: {{port: {port}, registry_port: {registry_port}}}\n"
        "workers: {count: 1, args: {max-num-seqs: 4, num-threads: 1}}\n"
    )

    def up(*flags: str) -> dict[str, str]:
        """Name of each process to what happened to it."""
        done = subprocess.run(
            penstock("up", str(file), f"--ray-address={head}", *flags),
            env=environment(), capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(re.findall(r"^([\w-]+): (\w+)", done.stdout, re.MULTILINE))

    def names() -> list[str]:
        cluster = httpx.get(f"http://127.0.0.1:{port}/admin/cluster").json()
        return [i["name"] for i in cluster["instances"] if i["state"] == "active"]

    def answers() -> bool:
        try:
            body = {"prompt": "Once", "max_tokens": 2}
            found = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=20)
        except httpx.TransportError:
            return False
        return found.status_code == 200

    try:
        assert up() == {"router-0": "started", "worker-0": "started"}
        wait_for(answers)
        assert up() == {"router-0": "kept", "worker-0": "kept"}
        scaled = up("--scale", "workers=2")
        assert scaled == {"router-0": "kept", "worker-0": "kept", "worker-1": "started"}
        wait_for(lambda: len(names()) == 2)
        pid = worker_pid(port)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(names()) == 2 and worker_pid(port) != pid)
        assert answers()
        assert up()["worker-1"] == "stopped"
        wait_for(lambda: len(names()) == 1)
        assert answers()
    finally:
        up("--down")
    assert up("--status") == {}
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health")


def worker_pid(port: int) -> int:
    cluster = httpx.get(f"http://127.0.0.1:{port}/admin/cluster").json()
    return int(next(i["pid"] for i in cluster["instances"] if i["name"].endswith("worker-0")))


def test_no_cluster() -> None:
    done = subprocess.run(
        penstock("up", "examples/cluster.yaml", f"--ray-address=127.0.0.1:{free_port()}"),
        env=environment(RAY_gcs_rpc_server_connect_timeout_s="1"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "no Ray cluster at" in done.stderr
    assert "Traceback" not in done.stderr
