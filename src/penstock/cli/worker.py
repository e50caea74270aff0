"""`penstock worker`: one engine instance as a process."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path

from penstock.checkpoint import resolve
from penstock.cli import logs
from penstock.cli.cluster_flags import add_registry, use_cluster_secret, use_registry_variable
from penstock.cli.config_file import parse_with_file
from penstock.cli.flags import add_engine_flags, add_log_level, add_model, engine_config, model_of
from penstock.cli.parser import Parser, count
from penstock.engine.config import WorkerConfig
from penstock.protocol.errors import ConfigError, PenstockError
from penstock.protocol.transport.base import check_address
from penstock.registry.here import address_towards
from penstock.registry.open import open_registry

_DESCRIPTION = """Run one engine instance. `penstock serve` starts its own; start more by hand, on
this host or others, and they find their service through --registry (or it finds them, with
serve --engine-address)."""

#: At a barrier, before a thread sleeps: about a tenth of a millisecond.
_SPINS = 10_000


def worker_config(arguments: list[str]) -> WorkerConfig:
    parser = Parser("worker", _DESCRIPTION)
    add_model(parser)
    parser.add_argument(
        "--address",
        help="where to listen: ipc:///path or tcp://host:port; with --registry a free port on the "
        "interface towards it by default",
    )
    parser.add_argument("--name", help="what services call it; host and process id by default")
    parser.add_argument(
        "--incarnation",
        type=count,
        help="grows with each start of a name (the clock, in nanoseconds)",
    )
    parser.add_argument("--parent-pid", type=count, help="end when this process is gone")
    # From whoever starts several: a memfd in which they share weights.
    parser.add_argument("--weights-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="these flags in YAML, TOML or JSON")
    add_registry(parser)
    add_log_level(parser)
    add_engine_flags(parser)
    options = parse_with_file(parser, arguments)
    use_cluster_secret(options)
    if not hasattr(options, "address"):
        use_registry_variable(options)
    registry = getattr(options, "registry", None)
    if not hasattr(options, "address"):
        if registry is None:
            raise ConfigError("where do services find it? Give --registry URL or --address")
        options.address = f"tcp://{_address_towards(registry)}:0"
    if not hasattr(options, "name") and registry is not None:
        options.name = f"{socket.gethostname()}-{os.getpid()}"
    check_address(options.address)
    own = ("address", "name", "incarnation", "parent_pid", "registry", "weights_fd", "log_level")
    return WorkerConfig(
        engine=engine_config(model_of(parser, options), options),
        **{name: getattr(options, name) for name in own if hasattr(options, name)},
    )


def _address_towards(registry: str) -> str:
    open_registry(registry)  # its mistakes first
    try:
        return address_towards(registry)
    except OSError as exc:
        raise ConfigError(f"--registry {registry} cannot be reached: {exc.strerror}") from exc


def _head_dim(model: str) -> int | None:
    """What config.json says at a glance; what is wrong with it is said when the model is loaded."""
    if model != "toy" and not Path(model).exists():
        return None
    try:
        config = resolve(model).config
    except PenstockError:
        return None
    found = config.get("head_dim")
    if found is None:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
            return None
        found = hidden // heads
    return found if isinstance(found, int) and found > 0 and found % 16 == 0 else None


def _wait_briefly() -> None:
    """Threads that compute together wait for each other at every barrier, by spinning for
    milliseconds if nothing is said: on a busy machine that is the time of whoever they wait for.
    libgomp reads this when torch brings it. Whoever has said how threads are to wait is heeded."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)


def _when_told() -> list[str] | None:
    """The arguments that a spare gets in the end, all imports done; None if nobody wants it."""
    import penstock.engine.instance  # noqa: F401

    line = sys.stdin.readline()
    return json.loads(line) if line else None


def run(arguments: list[str]) -> int:
    _wait_briefly()
    if arguments == ["--standby"]:
        told = _when_told()
        if told is None:
            return 0
        arguments = told[1:]  # what comes after "worker"
    config = worker_config(arguments)
    logs.set_up(config.log_level, name=config.name)
    if config.engine.device != "cuda":
        from penstock.engine.platforms.cpu.kernels import build_ahead

        build_ahead(_head_dim(config.engine.model))
    from penstock.engine.instance import run_worker  # brings torch, which takes a while

    return run_worker(config)
