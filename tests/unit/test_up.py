"""`penstock up`: what cluster.yaml may say, and the keeper of one process. Ray itself is in
tests/integration/test_up_ray.py."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.main import main
from penstock.protocol.errors import ConfigError
from penstock.up.keeper import Keeper
from penstock.up.spec import ClusterSpec, read_spec, registry_of, router, words, worker

EXAMPLE = Path(__file__).parents[2] / "examples" / "cluster.yaml"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


def test_the_example_is_valid() -> None:
    spec = read_spec(EXAMPLE)
    assert (spec.model, spec.routers.count, spec.workers.count) == ("toy", 1, 2)


def test_processes_are_command_lines_that_our_own_parsers_read() -> None:
    from penstock.cli.serve import make_parser
    from penstock.cli.worker import worker_config

    spec = read_spec(EXAMPLE)
    first = router(spec, 0, None, "127.0.0.1")
    assert first.arguments[0] == "router"
    options = make_parser("router").parse(first.arguments[1:])
    assert (options.port, options.registry_address) == (8000, "tcp://127.0.0.1:8040")
    registry = registry_of(spec, "127.0.0.1")
    second = make_parser("router").parse(router(spec, 1, registry, "").arguments[1:])
    assert (second.port, second.registry) == (8001, "penstock://127.0.0.1:8040")
    one = worker(spec, 3, registry)
    config = worker_config([*one.arguments[1:], "--address=tcp://127.0.0.1:0"])
    assert (config.name, config.registry) == ("demo-worker-3", registry)
    assert config.engine.max_num_seqs == 16


def test_equal_digests_mean_nothing_to_do() -> None:
    spec = ClusterSpec(model="m")
    assert worker(spec, 0, "r").digest() == worker(ClusterSpec(model="m"), 0, "r").digest()
    others = [worker(spec, 1, "r"), worker(spec, 0, "s"), worker(ClusterSpec(model="n"), 0, "r")]
    assert worker(spec, 0, "r").digest() not in {p.digest() for p in others}


def test_etcd_keeps_clusters_apart() -> None:
    assert (
        registry_of(ClusterSpec(model="m", name="a", registry="etcd://h:1"), "") == "etcd://h:1/a"
    )
    named = ClusterSpec(model="m", registry="etcd://h:1/mine")
    assert registry_of(named, "") == "etcd://h:1/mine"


def test_flags() -> None:
    found = words(
        {"max_num_seqs": 4, "a": True, "kv-index": False, "b": None, "c": [1, "x"], "d": []}
    )
    assert found == ["--max-num-seqs=4", "--a", "--no-kv-index", "--c", "1", "x"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expected `object`, got `null`"),
        ("- a", "Expected `object`, got `array`"),
        ("name: x", "missing required field `model`"),
        ("model: ''", "model is empty"),
        ("model: toy\nworker: {}", "unknown field `worker`"),
        ("model: toy\nworkers: {count: -1}", "$.workers.count"),
        ("model: toy\nworkers: {count: two}", "$.workers.count"),
        ("model: toy\nworkers: {count: 100000}", "$.workers.count"),
        ("model: toy\nrouters: {port: 99999}", "$.routers.port"),
        ("model: toy\nrouters: {count: 0}", "routers.count is 0"),
        ("model: toy\nname: Ünsafe/../name", "name"),
        ("model: toy\nregistry: http://x", "etcd://host:2379"),
        ("model: toy\nworkers: {args: {name: x}}", "workers.args.name"),
        ("model: toy\nrouters: {args: {registry_address: x}}", "routers.args.registry_address"),
        ("model: toy\nworkers: {resources: {CPU: -1}}", "$.workers.resources"),
        ("model: toy\nworkers: {args: {a: {b: c}}}", "$.workers.args"),
        ("model: toy\nenv: {A: 1}", "$.env"),
        ("a: [", "is no YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_spec(path)
    assert said in caught.value.message and str(path) in caught.value.message


def test_secrets_are_read_and_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    spec = ClusterSpec(model="m", cluster_secret_file=str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        spec.secret()
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        spec.secret()
    file.write_text("abc\n")
    process = worker(spec, 0, "r")
    assert process.env["PENSTOCK_CLUSTER_SECRET"] == "abc"
    assert not any("abc" in word for word in process.arguments)  # other users see command lines


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["up"], 2, "which cluster?"),
        (["up", "/nowhere.yaml"], 2, "cannot be read"),
        (["up", str(EXAMPLE), "--scale", "engines=2"], 2, "workers=4"),
        (["up", str(EXAMPLE), "--scale", "workers=-2"], 2, "workers=4"),
        (["up", str(EXAMPLE), "--scale", "routers=0"], 2, "routers.count is 0"),
        (["up", str(EXAMPLE), "--down", "--scale", "workers=1"], 2, "--down"),
    ],
)
def test_the_command(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert said in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["up", str(EXAMPLE)]) == 2
    assert "pip install 'penstock[ray]'" in capsys.readouterr().err


# --- the keeper ----------------------------------------------------------------------------------


def wait_for(what: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def keeper_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Keeper:
    """Of a stand-in for the command: `python -m penstock.cli.main` finds this one first."""
    package = tmp_path / "penstock" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(script)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    env = {"PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr("penstock.up.keeper._FIRST_PAUSE_S", 0.05)
    return Keeper("r", ["router"], env, "d")


def test_what_dies_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = keeper_of(tmp_path, monkeypatch, "import time; time.sleep(1000)")
    try:
        first = keeper.status()
        assert first["running"] and first["restarts"] == 0 and first["digest"] == "d"
        os.kill(first["pid"], signal.SIGKILL)
        wait_for(lambda: keeper.status()["restarts"] == 1 and keeper.status()["running"])
        assert keeper.status()["pid"] != first["pid"]
        assert keeper.status()["last_exit"] == -signal.SIGKILL
    finally:
        keeper.stop()
    assert not keeper.status()["running"]


def test_what_cannot_start_is_tried_in_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = keeper_of(tmp_path, monkeypatch, "raise SystemExit(3)")
    wait_for(lambda: keeper.status()["restarts"] >= 2)
    assert keeper.status()["last_exit"] == 3
    keeper.stop()
    restarts = keeper.status()["restarts"]
    time.sleep(0.3)
    assert keeper.status()["restarts"] == restarts


def test_what_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(1000)\n"
    )
    keeper = keeper_of(tmp_path, monkeypatch, script)
    wait_for((tmp_path / "up").exists)
    keeper.stop(timeout_s=0.2)
    assert not keeper.status()["running"]


def test_passwords_of_a_registry_are_on_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.cli.serve import config_of, make_parser
    from penstock.cli.worker import worker_config

    url = "etcd://me:geheim@127.0.0.1:2379/demo"
    spec = ClusterSpec(model="toy")
    one, first = worker(spec, 0, url), router(spec, 0, url, "")
    assert "geheim" not in " ".join([*one.arguments, *first.arguments])
    for name, value in one.env.items():
        monkeypatch.setenv(name, value)
    assert worker_config(list(one.arguments[1:])).registry == url
    flags = [word for word in first.arguments[1:] if word != "--stop-with-parent"]
    config, _ = config_of(make_parser("router"), flags, first.env)
    assert config.cluster.registry == url


def test_a_machine_without_processes_for_a_moment_ends_no_keeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = keeper_of(tmp_path, monkeypatch, "import time; time.sleep(1000)")
    real, failures = subprocess.Popen, iter([OSError(errno.EAGAIN, "no processes")] * 2)

    def popen(*args: Any, **more: Any) -> Any:
        for failure in failures:
            raise failure
        return real(*args, **more)

    try:
        monkeypatch.setattr("penstock.up.keeper.subprocess.Popen", popen)
        os.kill(keeper.status()["pid"], signal.SIGKILL)
        wait_for(lambda: keeper.status()["running"] and keeper.status()["restarts"] == 3)
    finally:
        keeper.stop()
