"""`penstock router --engines URL,URL`: our service in front of servers that are not ours."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping

from penstock import PROJECT, __version__
from penstock.cli import logs, ports, process
from penstock.cli.cluster_flags import ADMIN_VARIABLE, duration, tls_config
from penstock.cli.config_file import parse_with_file
from penstock.cli.flags import add_log_level
from penstock.cli.parser import Parser, count, seconds
from penstock.cli.serve import KEY_VARIABLES, admin_keys_of, api_keys_of
from penstock.protocol.errors import ConfigError
from penstock.service.foreign.config import RouterConfig
from penstock.service.policies.routing import policy_named

_DESCRIPTION = """Route to servers that speak OpenAI's API, whoever made them: by predicted time,
with retries, metrics and explanations. What they answer goes through as it comes."""
_EPILOG = f"""  {PROJECT} router --engines http://10.0.0.1:8000,http://10.0.0.2:8000

docs/router.md says how engines are chosen, and what happens when one fails."""
ENGINE_KEY_VARIABLE = "PENSTOCK_ENGINE_API_KEY"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("engines").add_argument
    boolean = argparse.BooleanOptionalAction
    add("--engines", nargs="+", action="extend", metavar="URL", help="URLs, by comma or space")
    add(
        "--engine-api-key",
        metavar="KEY",
        help="sent to the engines instead of what clients send; better by "
        f"${ENGINE_KEY_VARIABLE}, since other users may see a command line",
    )
    add(
        "--engine-ca-certs", metavar="FILE", help="authorities of engines with https (the system's)"
    )
    add(
        "--policy", metavar="NAME", help="round-robin, least-load, kv-aware or slo-aware (kv-aware)"
    )
    add("--slo-ttft", dest="ttft_slo_s", type=duration, metavar="TIME", help="wanted: 1s, 800ms")
    add("--slo-tpot", dest="tpot_slo_s", type=duration, metavar="TIME", help="wanted: 50ms")
    add(
        "--engine-cache-tokens",
        type=count,
        metavar="N",
        help="what an engine's prefix cache is taken to hold (500k)",
    )
    add("--max-retries", type=int, metavar="N", help="further engines that are tried (2)")
    _add_times(parser)
    add = parser.add_argument_group("server").add_argument
    add("--config", metavar="FILE", help="these flags in YAML, TOML or JSON; the command line wins")
    add("--host", help="address to listen on (127.0.0.1; 0.0.0.0 for all)")
    add("--port", type=int, help="8000")
    add("--uds", metavar="PATH", help="a Unix socket instead of host and port")
    add(
        "--api-workers",
        "--api-server-count",
        dest="workers",
        type=count,
        metavar="N",
        help="processes that share the port (1)",
    )
    add(
        "--api-key",
        dest="api_keys",
        nargs="+",
        action="extend",
        metavar="KEY",
        help=f"require one of these of clients; better --api-key-file or ${KEY_VARIABLES[0]}",
    )
    add("--api-key-file", metavar="FILE", help="one key a line; # begins a comment")
    add("--admin-key-file", metavar="FILE", help=f"keys of /admin; or ${ADMIN_VARIABLE}")
    add("--ssl-keyfile", metavar="FILE", help="serve HTTPS with this private key")
    add("--ssl-certfile", metavar="FILE", help="and this certificate")
    add("--ssl-ca-certs", metavar="FILE", help="ask clients for certificates of these authorities")
    add("--max-queue", type=count, metavar="N", help="requests without an answer before 429 (4096)")
    add("--max-body-bytes", type=count, metavar="BYTES", help="largest request (32M)")
    add("--enable-log-requests", dest="log_requests", action=boolean, help="one line a request")
    add("--banner", action=boolean, help="print what to try, once ready (on)")
    add("--stop-with-parent", action="store_true", help=argparse.SUPPRESS)


def _add_times(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how long").add_argument
    for flag, name, text in (
        ("--connect-timeout", "connect_timeout_s", "for a connection to an engine (2)"),
        ("--first-byte-timeout", "first_byte_timeout_s", "for the first byte of an answer (600)"),
        ("--stall-timeout", "stall_timeout_s", "between two bytes of one (120)"),
        ("--health-interval", "health_every_s", "between two health checks (1)"),
        ("--health-timeout", "health_timeout_s", "for the answer to one (2)"),
        ("--drain-timeout", "drain_timeout_s", "from SIGTERM to the end (30)"),
    ):
        add(flag, dest=name, type=seconds, metavar="SECONDS", help=text)


def config_of(
    arguments: list[str], environment: Mapping[str, str] = os.environ
) -> tuple[RouterConfig, argparse.Namespace]:
    """Raises `ConfigError`."""
    parser = Parser("router", _DESCRIPTION, _EPILOG)
    add_flags(parser)
    add_log_level(parser)
    options = parse_with_file(parser, arguments)
    said = vars(options)
    plain = (
        "host", "port", "uds", "workers", "policy", "ttft_slo_s", "tpot_slo_s", "max_retries",
        "engine_cache_tokens", "engine_ca_certs", "max_queue", "max_body_bytes", "log_requests",
        "log_level", "connect_timeout_s", "first_byte_timeout_s", "stall_timeout_s",
        "health_every_s", "health_timeout_s", "drain_timeout_s",
    )  # fmt: skip
    urls = [url for word in said.get("engines", ()) for url in word.split(",") if url]
    config = RouterConfig(
        engines=tuple(urls),
        api_keys=api_keys_of(options, environment),
        admin_keys=admin_keys_of(options, environment),
        engine_api_key=said.get("engine_api_key") or environment.get(ENGINE_KEY_VARIABLE) or None,
        tls=tls_config(said),
        name=f"{socket.gethostname()}-{os.getpid()}",
        **{name: said[name] for name in plain if name in said},
    )
    policy_named(config.policy)
    if config.max_retries < 0:
        raise ConfigError("--max-retries cannot be negative: 0 turns retries off")
    if config.uds is not None and config.workers > 1:
        raise ConfigError("--api-workers needs a port: several processes cannot share --uds")
    return config, options


def run(arguments: list[str]) -> int:
    config, options = config_of(arguments)
    if getattr(options, "stop_with_parent", False):
        process.stop_with_parent()
    logs.set_up(config.log_level, name="router")
    if config.uds is None:
        ports.require_free(config.host, config.port)

    from penstock.service.foreign.server import run as route

    def ready(url: str) -> None:
        if getattr(options, "banner", True):
            print(_banner(config, url), flush=True)

    return route(config, ready, work)


def work(config: RouterConfig, parent: int) -> None:
    """One of `--api-workers`."""
    logs.set_up(config.log_level, name=config.name)
    process.stop_with_parent()
    if os.getppid() != parent:
        return

    from penstock.service.foreign.server import run_one

    run_one(config)


def _banner(config: RouterConfig, url: str) -> str:
    engines = "\n".join(f"  {engine}" for engine in config.engines)
    return (
        f"\n{PROJECT.capitalize()} {__version__} routes at {url} by {config.policy} to\n{engines}\n"
        f"\nTheir models:\n  curl -s {url}/v1/models\n"
        f"How they are:\n  curl -s {url}/admin/cluster    or    {PROJECT} top --url {url}\n"
    )
