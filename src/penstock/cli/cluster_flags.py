"""Flags about several processes: the registry, the secret, instances, policies, keys and TLS."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.cli.parser import Parser, count
from penstock.protocol import secret
from penstock.protocol.errors import ConfigError
from penstock.service.config import SHARE_WEIGHTS, ClusterConfig, TlsConfig

ADMIN_VARIABLE = "PENSTOCK_ADMIN_KEY"
#: A registry's URL may hold a password, and a command line is for everybody to read.
REGISTRY_VARIABLE = "PENSTOCK_REGISTRY"
_SECRET_FILE = "--cluster-secret-file"


def add_registry(parser: Parser) -> None:
    """What workers and routers share."""
    add = parser.add_argument_group("cluster").add_argument
    add(
        "--registry",
        metavar="URL",
        help="where processes find each other: etcd://host:2379, or penstock://host:8040 of a "
        f"router; /NAME behind it for one of several clusters; or ${REGISTRY_VARIABLE}",
    )
    add(
        _SECRET_FILE,
        metavar="FILE",
        help="what all processes of a cluster on several hosts share "
        f"(openssl rand -hex 32 > FILE; or ${secret.VARIABLE})",
    )


def use_registry_variable(
    options: argparse.Namespace, environment: Mapping[str, str] = os.environ
) -> None:
    """Of a router or worker that is given no --registry."""
    if not hasattr(options, "registry") and environment.get(REGISTRY_VARIABLE):
        options.registry = environment[REGISTRY_VARIABLE]


def add_cluster_flags(parser: Parser) -> None:
    """What `serve` and `router` have beside `add_registry`."""
    group = parser.add_argument_group("instances and scheduling")
    add, boolean = group.add_argument, argparse.BooleanOptionalAction
    add("--instances", type=count, metavar="N", help="engine processes on this machine (1)")
    add(
        "--share-weights",
        choices=SHARE_WEIGHTS,
        help="engines on this machine, and those that replace them, have one copy of the weights "
        "in memory, where they can be shared (auto)",
    )
    add(
        "--spare-engine",
        action=boolean,
        help="keep a process ready to replace an engine that dies, for some 200 MB of memory (off)",
    )
    add(
        "--pd",
        type=_pd,
        metavar="auto|off|static=P:D",
        help="prefill and decode on different instances: where the work asks for it, never, or P "
        "instances for one and D for the other (auto)",
    )
    add(
        "--policy",
        metavar="NAME",
        help="round-robin, least-load, kv-aware, slo-aware, or split: always prefill and decode "
        "apart (slo-aware; kv-aware with --pd off, split with --pd static)",
    )
    add(
        "--slo",
        type=_slo,
        metavar="ttft=1s,tpot=50ms",
        help="times wanted of every online request: what cannot be in time is refused early",
    )
    add("--slo-ttft", type=duration, metavar="TIME", help="the same, one by one: 1s, 800ms")
    add("--slo-tpot", type=duration, metavar="TIME", help="and this one: 50ms")
    add("--kv-index", action=boolean, help="know who holds which KV (on with several instances)")
    add(
        "--api-workers",
        "--api-server-count",
        "-asc",
        type=count,
        metavar="N",
        help="processes that share the port and the instances (1)",
    )
    add(
        "--registry-address",
        metavar="ADDRESS",
        help="where a router without --registry offers one (tcp://127.0.0.1:8040)",
    )
    add(
        "--admin-key-file", metavar="FILE", help=f"keys of /admin, one a line; or ${ADMIN_VARIABLE}"
    )
    add("--ssl-keyfile", metavar="FILE", help="serve HTTPS with this private key")
    add("--ssl-certfile", metavar="FILE", help="and this certificate")
    add("--ssl-ca-certs", metavar="FILE", help="ask clients for certificates of these authorities")
    # Between a parent and the API workers it starts.
    add("--reuse-port", action="store_true", help=argparse.SUPPRESS)
    add("--inherited-socket", type=int, help=argparse.SUPPRESS)
    add("--api-worker", type=int, help=argparse.SUPPRESS)
    add("--api-worker-folder", help=argparse.SUPPRESS)


def _pd(text: str) -> str:
    if text in ("auto", "off") or re.fullmatch(r"static=\d+:\d+", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of auto, off, static=P:D (static=2:2)")


def duration(text: str) -> float:
    """Seconds; 50ms, 1s, 1.5s, or a plain number of seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 50ms or 1.5s")
    return float(found[1]) / (1000.0 if found[2] == "ms" else 1.0)


def _slo(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("ttft", "tpot"):
            raise argparse.ArgumentTypeError(f"{part!r}: write ttft=1s,tpot=50ms")
        found[f"{name}_slo_s"] = duration(value)
    return found


def cluster_config(said: Mapping[str, Any]) -> ClusterConfig:
    """Raises `ConfigError` for what contradicts itself."""
    slo = dict(said.get("slo", {}))
    for name in ("ttft", "tpot"):
        if (value := said.get(f"slo_{name}")) is not None:
            slo[f"{name}_slo_s"] = value
    names = (
        "instances", "share_weights", "spare_engine", "registry", "registry_address", "pd",
        "policy", "kv_index", "api_workers", "reuse_port", "inherited_socket", "api_worker",
        "api_worker_folder",
    )  # fmt: skip
    return ClusterConfig(**slo, **{name: said[name] for name in names if name in said})


def tls_config(said: Mapping[str, Any]) -> TlsConfig:
    names = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")
    return TlsConfig(**{name: said[name] for name in names if name in said})


def use_cluster_secret(options: argparse.Namespace) -> None:
    """From the file or the environment, where our children find it too. Raises `ConfigError`."""
    file = getattr(options, "cluster_secret_file", None)
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{_SECRET_FILE} {file} cannot be read: {exc}") from exc
        if not text:
            raise ConfigError(f"{_SECRET_FILE} {file} is empty: openssl rand -hex 32 > {file}")
        os.environ[secret.VARIABLE] = text
    found = os.environ.get(secret.VARIABLE)
    secret.use(secret.ClusterSecret(found.encode()) if found else None)
