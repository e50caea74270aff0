"""Real processes, recorded: what the service decided is decided again, also where an engine was
killed, under another hash seed, and by each of several API workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.helpers.processes import Command, Processes
from tests.helpers.server import environment

FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "32M", "--served-model-name", "m")


def penstock(*arguments: str, **variables: str) -> Any:
    """What the command says with --json."""
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", *arguments, "--json"],
        env=environment(**variables), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def bench(server: Command, words: str) -> Any:
    lengths = "input=90,input_cv=0.5,output=30,output_cv=0,max_input=400"
    trace = f"generate:{words},{lengths},turns=3,think=1s"
    return penstock("bench", "--url", server.url, "--trace", trace)


def stop(server: Command) -> None:
    server.process.terminate()
    server.process.wait(30)


def test_a_killed_engine_is_replayed_and_thought_away(
    started: Processes, model: str, tmp_path: Path
) -> None:
    record = tmp_path / "incident"
    server = started.server("serve", model, *FLAGS, "--instances", "2", "--record", str(record))
    started.until(lambda: server.active() == {"engine-0", "engine-1"})
    assert bench(server, "rate=8,requests=16")["errors"] == []
    trace = "generate:rate=40,requests=80,input=150,max_input=300,output=200,output_cv=0,seed=3"
    load = subprocess.Popen(
        [
            sys.executable, "-m", "penstock.cli.main", "bench",
            "--url", server.url, "--trace", trace, "--json",
        ],
        env=environment(), stdout=subprocess.PIPE,
    )  # fmt: skip
    started.until(lambda: _busiest(server)[1] > 3)
    victim, _ = _busiest(server)
    os.kill(server.child(victim).pid, signal.SIGKILL)
    out, _ = load.communicate(timeout=100)
    assert json.loads(out)["errors"] == []
    started.until(lambda: server.active() == {"engine-0", "engine-1"})
    stop(server)

    told = [penstock("replay", str(record), PYTHONHASHSEED=seed) for seed in ("0", "77")]
    assert told[0] == told[1]
    assert told[0]["identical"] and told[0]["problem"] is None
    said = [line["text"] for line in told[0]["timeline"]]
    assert f"{victim} is reported lost" in said
    assert sum("arrives" in text for text in said) == 96
    without = penstock("replay", str(record), "--change", f"without={victim}-crash")
    assert without["recorded"]["answered"] == without["changed"]["answered"] == 96
    assert without["recorded"]["resumed"] >= 1 and without["changed"]["resumed"] == 0


def _busiest(server: Command) -> tuple[str, int]:
    instances = server.get("/admin/cluster")["instances"]
    return max(((i["name"], int(i["running"])) for i in instances), key=lambda found: found[1])


def test_each_api_worker_writes_its_own_and_a_killed_service_leaves_one(
    started: Processes, model: str, tmp_path: Path
) -> None:
    record = tmp_path / "incident"
    flags = ("--instances", "2", "--api-workers", "2", "--record", str(record))
    server = started.server("serve", model, *FLAGS, *flags)
    started.until(lambda: server.active() == {"engine-0", "engine-1"})
    bench(server, "rate=20,requests=30")
    # What was heard by then is in the file once it has been written to twice more.
    own, ended_s = tmp_path / "incident.api-0", time.time()
    started.until(lambda: own.stat().st_mtime > ended_s + 0.5)
    server.child("--api-worker=0").kill()
    successors = tmp_path / "incident.api-0.1"
    started.until(lambda: successors.exists() and successors.stat().st_size)
    stop(server)
    arrived = 0
    for name in ("incident.api-0", "incident.api-1", "incident.api-0.1"):
        told = penstock("replay", str(tmp_path / name))
        assert told["identical"], told["difference"]
        arrived += sum("arrives" in line["text"] for line in told["timeline"])
    assert arrived == 30
