"""`penstock serve MODEL`: the service and its engine in one go."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.checkpoint import resolve
from penstock.cli import logs, ports, process
from penstock.cli.before_start import check_disk, check_memory
from penstock.cli.cluster_flags import (
    ADMIN_VARIABLE,
    add_cluster_flags,
    add_registry,
    cluster_config,
    tls_config,
    use_cluster_secret,
    use_registry_variable,
)
from penstock.cli.config_file import parse_with_file
from penstock.cli.flags import (
    add_engine_flags,
    add_log_level,
    add_model,
    engine_arguments,
    engine_config,
    model_of,
)
from penstock.cli.parser import Parser, count, seconds
from penstock.cli.wanted import wanted_of
from penstock.engine.config import EngineConfig, WorkerConfig
from penstock.engine.platforms.cpu import placement
from penstock.protocol.errors import ConfigError
from penstock.protocol.transport.base import check_address
from penstock.service.cluster.fit import ANYTHING, Wanted
from penstock.service.config import ClusterConfig, RestartPolicy, ServeConfig
from penstock.trace import new_file

_DESCRIPTION = "Serve MODEL over HTTP with OpenAI's API: the service and its engine in one go."
_ROUTER_DESCRIPTION = """Serve MODEL over HTTP with engines that run elsewhere: `penstock worker`s
that find this router through --registry (one of its own if none is given), or servers of any kind
that speak OpenAI's API (--engines URL,URL)."""
_EPILOG = """Flags carry vLLM's names where they mean the same; others are answered with what
does the same here. Sizes: 4k is 4000, 4K is 4096."""
#: Where keys are looked for; the first is ours, the second what vLLM calls it.
KEY_VARIABLES = ("PENSTOCK_API_KEY", "VLLM_API_KEY")

_IN_PROCESS_ADDRESS = "memory://engine-0"


def make_parser(command: str = "serve", description: str = _DESCRIPTION) -> Parser:
    parser = Parser(command, description, _EPILOG)
    add_model(parser)
    _add_server_flags(parser)
    add_registry(parser)
    add_cluster_flags(parser)
    add_log_level(parser)
    add_engine_flags(parser)
    return parser


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    _add_door(add)
    _add_service(add)


def _add_door(add: Callable[..., object]) -> None:
    """Where clients come in, and what they may ask."""
    add("--config", metavar="FILE", help="these flags in YAML, TOML or JSON; the command line wins")
    add("--host", help="address to listen on (127.0.0.1; 0.0.0.0 for all)")
    add("--port", type=int, help="8000")
    add("--uds", metavar="PATH", help="a Unix socket instead of host and port")
    add(
        "--served-model-name",
        dest="served_model_names",
        nargs="+",
        metavar="NAME",
        help="what requests call the model; the first is what responses say",
    )
    add(
        "--api-key",
        dest="api_keys",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="require one of these keys; other users may see a command line, so better "
        f"--api-key-file or ${KEY_VARIABLES[0]}",
    )
    add("--api-key-file", metavar="FILE", help="one key a line; # begins a comment")
    add("--chat-template", metavar="FILE|TEMPLATE", help="instead of the checkpoint's")
    add(
        "--trust-request-chat-template",
        action="store_true",
        help="let requests bring templates of their own",
    )
    add("--tool-call-parser", metavar="NAME", help="hermes by default; none to turn it off")
    add(
        "--reasoning-parser",
        metavar="NAME",
        help="qwen3 or deepseek_r1: splits thinking from the answer",
    )
    add("--enable-auto-tool-choice", action="store_true", help="always on; accepted")
    add("--max-queue", type=count, metavar="N", help="waiting requests before 429 (1024)")
    add("--max-body-bytes", type=count, metavar="BYTES", help="largest request (32M)")


def _add_service(add: Callable[..., object]) -> None:
    """How the process runs, and what it says of itself."""
    boolean = argparse.BooleanOptionalAction
    add(
        "--drain-timeout",
        dest="drain_timeout_s",
        type=seconds,
        metavar="SECONDS",
        help="from SIGTERM to the end (30)",
    )
    add("--in-process", action=boolean, help="engine and service in one process, for debugging")
    add(
        "--engine-address",
        dest="engine_addresses",
        nargs="+",
        action="extend",
        metavar="ADDRESS",
        help="attach to `penstock worker`s that listen there instead of starting one",
    )
    add("--restart", action=boolean, help="start an engine again that died (on)")
    add(
        "--enable-log-requests",
        dest="log_requests",
        action=boolean,
        help="one line a request, without its content (off)",
    )
    add(
        "--disable-log-requests",
        dest="log_requests",
        action="store_false",
        help=argparse.SUPPRESS,
    )
    add("--record", metavar="FILE", help="record the service's inputs for `penstock replay`")
    add("--record-max-bytes", type=count, metavar="BYTES", help="at most this much (1GiB)")
    add("--otlp-traces-endpoint", metavar="URL", help="send OpenTelemetry traces there")
    add("--banner", action=boolean, help="print what to try, once ready (on)")
    add("--stop-with-parent", action="store_true", help=argparse.SUPPRESS)


def config_of(
    parser: Parser, arguments: list[str], environment: Mapping[str, str] = os.environ
) -> tuple[ServeConfig, EngineConfig]:
    """What a parser with the flags of `make_parser` reads. Raises `ConfigError`."""
    options = parse_with_file(parser, arguments)
    named = hasattr(options, "engine_addresses") and not hasattr(options, "api_worker")
    if parser.prog.endswith(" router") and not named:
        use_registry_variable(options, environment)
    model = model_of(parser, options)
    engine = engine_config(model, options)
    plain = (
        "host", "port", "uds", "seed", "revision", "chat_template", "trust_request_chat_template",
        "otlp_traces_endpoint",
        "tool_call_parser", "reasoning_parser", "max_queue", "max_body_bytes", "drain_timeout_s",
        "in_process", "log_level", "log_requests", "banner", "record", "record_max_bytes",
    )  # fmt: skip
    said = vars(options)
    use_cluster_secret(options)
    cluster = cluster_config(said)
    if said.get("in_process") and (said.get("engine_addresses") or cluster.registry):
        raise ConfigError("--in-process starts an engine, --engine-address attaches to one: choose")
    if said.get("in_process") and max(cluster.instances, cluster.api_workers) > 1:
        raise ConfigError("--in-process is one process: leave out --instances and --api-workers")
    if parser.prog.endswith(" serve") and cluster.registry and not said.get("api_worker_folder"):
        raise ConfigError(
            "`serve` starts its own engines: `penstock router MODEL --registry URL` uses those of "
            "a registry, `penstock worker MODEL --registry URL` is one"
        )
    if parser.prog.endswith(" serve"):
        _check_split(cluster, len(said.get("engine_addresses", ())) or cluster.instances)
    config = ServeConfig(
        model=model,
        wanted=_wanted(parser, said, cluster),
        served_model_names=tuple(said.get("served_model_names", (model,))),
        engine_addresses=tuple(said.get("engine_addresses", ())),
        api_keys=api_keys_of(options, environment),
        admin_keys=admin_keys_of(options, environment),
        cluster=cluster,
        tls=tls_config(said),
        restart=RestartPolicy(enabled=said.get("restart", True)),
        worker_args=worker_arguments(engine, said.get("log_level", "info")),
        **{name: said[name] for name in plain if name in said},
    )
    return config, engine


def _check_split(cluster: ClusterConfig, instances: int) -> None:
    """Here it is known how many instances there will be. Raises `ConfigError`."""
    if cluster.static_split is not None and sum(cluster.static_split) > instances:
        raise ConfigError(
            f"--pd {cluster.pd} needs {sum(cluster.static_split)} instances, and there "
            f"{'is' if instances == 1 else 'are'} {instances}: see --instances"
        )


def _wanted(parser: Parser, said: Mapping[str, Any], cluster: ClusterConfig) -> Wanted:
    if cluster.api_worker is not None:
        # Its parent has been asked, and may well start engines with these flags.
        return ANYTHING if cluster.engines_return else Wanted.among(said)
    if parser.prog.endswith(" router") or said.get("engine_addresses"):
        return wanted_of(parser, said)
    return ANYTHING


def worker_arguments(engine: EngineConfig, log_level: str) -> tuple[str, ...]:
    return (*engine_arguments(engine), f"--log-level={log_level}")


def run(arguments: list[str]) -> int:
    return _run(make_parser(), arguments)


def run_router(arguments: list[str]) -> int:
    """`penstock router MODEL`: nothing is started here but the service, and a registry where none
    is given."""
    parser = make_parser("router", _ROUTER_DESCRIPTION)
    return _run(parser, arguments, router=True)


def _run(parser: Parser, arguments: list[str], *, router: bool = False) -> int:
    config, engine = config_of(parser, arguments)
    if router:
        config = for_router(config)
    if "--stop-with-parent" in arguments:
        process.stop_with_parent()
    cluster = config.cluster
    if not (router or config.engine_addresses):
        check_disk(engine)
        check_memory(engine, cluster.instances)
    worker = None if cluster.api_worker is None else f"api-{cluster.api_worker}"
    logs.set_up(config.log_level, name=config.name or worker or "service")
    if config.uds is None and not cluster.reuse_port:
        ports.require_free(config.host, config.port)

    if engine.trace is not None and cluster.api_worker is None:
        new_file(engine.trace)

    # Fetched once, here, rather than by service and engine side by side.
    checkpoint = resolve(config.model, revision=config.revision)
    engine = divided(replace(engine, model=str(checkpoint.path)), cluster.instances)
    worker_args = worker_arguments(engine, config.log_level)
    config = replace(
        config, worker_args=worker_args, trace=engine.trace, arguments=tuple(arguments)
    )

    from penstock.cli.banner import Banner
    from penstock.service.app import serve

    banner = Banner(config, checkpoint)
    if not config.in_process:
        return serve(config, on_ready=banner.show)

    from penstock.engine.instance import EngineThread

    thread = EngineThread(WorkerConfig(engine=engine, address=_IN_PROCESS_ADDRESS))
    try:
        attached = replace(config, engine_addresses=(_IN_PROCESS_ADDRESS,))
        return serve(attached, on_ready=banner.show)
    finally:
        thread.close()


def for_router(config: ServeConfig) -> ServeConfig:
    """Its instances come through a registry or are named. Raises `ConfigError`."""
    cluster = config.cluster
    if cluster.instances > 1 or config.in_process:
        raise ConfigError("a router starts no engines: use `serve` for --instances, --in-process")
    if config.engine_addresses or cluster.registry is not None:
        return config
    check_address(cluster.registry_address)
    scheme = {"tcp": "penstock", "ipc": "penstock+ipc"}
    kind, _, where = cluster.registry_address.partition("://")
    # Here it is met on loopback, even if it listens everywhere.
    for everywhere in ("0.0.0.0:", "[::]:"):
        if where.startswith(everywhere):
            where = f"127.0.0.1:{where.removeprefix(everywhere)}"
    registry = f"{scheme[kind]}://{where}"
    return replace(config, cluster=replace(cluster, registry=registry, offers_registry=True))


def divided(engine: EngineConfig, num_instances: int) -> EngineConfig:
    """One of so many engines that start on this host together: its part of cores and memory. What
    is set by a flag is each one's own, as it is in vLLM. Raises `ConfigError`."""
    if num_instances == 1 or engine.device == "cuda":
        return engine
    if engine.cpu_bind not in ("auto", "none"):
        raise ConfigError(
            "--cpu-bind names the processors of one engine: leave it out with --instances"
        )
    threads = engine.num_threads
    if threads is None:
        threads = max(1, placement.here(engine.cpu_bind, None).num_threads // num_instances)
    return replace(engine, num_threads=threads, host_share=1.0 / num_instances)


def api_keys_of(options: argparse.Namespace, environment: Mapping[str, str]) -> tuple[str, ...]:
    """From all places at once, in order and without doubles. Raises `ConfigError`."""
    keys = list(getattr(options, "api_keys", []))
    if file := getattr(options, "api_key_file", None):
        keys += _keys_in(Path(file))
    keys += [environment[name] for name in KEY_VARIABLES if environment.get(name)]
    if any(not key.strip() for key in keys):
        raise ConfigError("an API key is empty: leave the flag out to serve without keys")
    if any(not re.fullmatch(r"[\x21-\x7e]+", key) for key in keys):
        raise ConfigError("an API key must be printable ASCII without spaces, to fit a header")
    return tuple(dict.fromkeys(keys))


def admin_keys_of(options: argparse.Namespace, environment: Mapping[str, str]) -> tuple[str, ...]:
    file = getattr(options, "admin_key_file", None)
    keys = _keys_in(Path(file), "--admin-key-file") if file else []
    if environment.get(ADMIN_VARIABLE):
        keys.append(environment[ADMIN_VARIABLE])
    return tuple(dict.fromkeys(keys))


def _keys_in(file: Path, flag: str = "--api-key-file") -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{flag} {file} cannot be read: {exc}") from exc
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"{flag} {file} holds no key: one a line")
    return keys
