"""`penstock up cluster.yaml`: routers and workers on the nodes of a Ray cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from penstock.cli.parser import Parser
from penstock.protocol.errors import ConfigError
from penstock.up.cluster import Placed, RayCluster
from penstock.up.spec import ClusterSpec, read_spec

_EPILOG = """It ends when all is placed; what it has placed goes on, and is started again when it
dies. Run it again after a change to the file: what is as wanted is left alone."""


def make_parser() -> Parser:
    parser = Parser("up", "Run a cluster on the nodes of a Ray cluster.", _EPILOG)
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="what to run: see examples/cluster.yaml")
    add(
        "--scale",
        action="append",
        type=_scale,
        metavar="GROUP=N",
        help="workers=4 or routers=2, whatever the file says",
    )
    add("--down", action="store_true", help="stop it all, in peace")
    add("--status", action="store_true", help="say what runs, and change nothing")
    add(
        "--ray-address",
        metavar="HOST:PORT",
        help="of the Ray cluster; this machine's, or $RAY_ADDRESS",
    )
    return parser


def _scale(text: str) -> tuple[str, int]:
    group, _, number = text.partition("=")
    if group not in ("workers", "routers") or not number.isdigit() or int(number) > 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: write workers=4 or routers=2")
    return group, int(number)


def run(arguments: list[str]) -> int:
    parser = make_parser()
    options = parser.parse(arguments)
    if getattr(options, "file", None) is None:
        parser.error("which cluster? Give its file, such as examples/cluster.yaml")
    if hasattr(options, "down") and (hasattr(options, "scale") or hasattr(options, "status")):
        raise ConfigError("--down stops everything: leave --scale and --status out")
    spec = read_spec(Path(options.file)).scaled(dict(getattr(options, "scale", [])))
    cluster = RayCluster(getattr(options, "ray_address", None))
    try:
        _do(cluster, spec, options)
    finally:
        cluster.close()
    return 0


def _do(cluster: RayCluster, spec: ClusterSpec, options: argparse.Namespace) -> None:
    if hasattr(options, "down"):
        cluster.down(spec, _say)
    elif hasattr(options, "status"):
        for placed in cluster.status(spec):
            print(f"{placed.name}: pid {placed.pid} on {placed.node}, {placed.restarts} restarts")
    else:
        cluster.apply(spec, _say)


def _say(placed: Placed) -> None:
    print(f"{placed.name}: {placed.what}, pid {placed.pid} on {placed.node}", flush=True)
