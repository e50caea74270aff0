"""Brings what runs on a Ray cluster to what a `ClusterSpec` says, and keeps it so.

Each process has a detached, named actor that watches it. Ray starts an actor anew, on another node
if need be, when its own is lost; the actor starts its process again. Applying a spec twice changes
nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from penstock import PROJECT
from penstock.protocol.errors import ConfigError, StartupError
from penstock.up.keeper import Keeper
from penstock.up.spec import ClusterSpec, Process, registry_of, router, worker

NAMESPACE = PROJECT
_ANSWER_S = 60.0
_STOP_S = 35.0


@dataclass(frozen=True, slots=True)
class Placed:
    name: str
    what: str  # "kept", "started", "replaced", "stopped"
    node: str
    pid: int
    restarts: int


class RayCluster:
    """Raises `ConfigError` where Ray is missing or there is no cluster."""

    def __init__(self, address: str | None) -> None:
        try:
            import ray
        except ImportError as exc:
            raise ConfigError(f"`up` needs Ray: pip install '{PROJECT}[ray]'") from exc
        self._ray = ray
        address = address or os.environ.get("RAY_ADDRESS")
        _require_listener(address)
        try:
            ray.init(address=address or "auto", namespace=NAMESPACE, log_to_driver=False,
                     logging_level="error")  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as exc:
            raise ConfigError(
                f"no Ray cluster at {address or 'this machine'}: `ray start --head`, or give "
                f"--ray-address HOST:PORT ({' '.join(str(exc).split())[:200]})"
            ) from exc

    def close(self) -> None:
        self._ray.shutdown()

    # --- what is wanted ------------------------------------------------------------------------

    def apply(self, spec: ClusterSpec, say: Callable[[Placed], None] = lambda _: None) -> None:
        """Raises `StartupError` when Ray cannot place a process within a minute."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        secret = spec.secret()
        if len(nodes) > 1 and secret is None:
            raise ConfigError(
                f"the Ray cluster has {len(nodes)} nodes: give cluster_secret_file, so that nobody "
                "else can use the engines (openssl rand -hex 32 > FILE)"
            )
        registry, routers = self._routers(spec, alone=secret is None, say=say)
        workers = [worker(spec, i, registry) for i in range(spec.workers.count)]
        self._stop_others(spec, {p.name for p in (*routers, *workers)}, say)
        self._bring_up(spec, workers, say)

    def _routers(
        self, spec: ClusterSpec, alone: bool, say: Callable[[Placed], None]
    ) -> tuple[str, list[Process]]:
        """The first goes first: where it is, the others and the workers find each other."""
        if spec.registry is not None:
            registry = registry_of(spec, "")
            routers = [router(spec, i, registry, "") for i in range(spec.routers.count)]
            self._bring_up(spec, routers, say)
            return registry, routers
        host = "127.0.0.1" if alone else self._host_of_first(spec)
        first = router(spec, 0, None, host)
        self._bring_up(spec, [first], say, node=None if alone else host)
        registry = registry_of(spec, host)
        others = [router(spec, i, registry, host) for i in range(1, spec.routers.count)]
        self._bring_up(spec, others, say)
        return registry, [first, *others]

    def _host_of_first(self, spec: ClusterSpec) -> str:
        """Where the first router is, or else a node that has room for it (this one, if it has)."""
        wanted = spec.routers.resources
        running = self._find(spec, "router-0")
        if running is not None:
            found = self._ray.get(running.node_ip.remote(), timeout=_ANSWER_S)
            return str(found)
        own = self._ray.util.get_node_ip_address()
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        fitting = [
            str(node["NodeManagerAddress"])
            for node in nodes
            if all(node["Resources"].get(name, 0) >= value for name, value in wanted.items())
        ]
        if not fitting:
            raise StartupError(f"no node of the Ray cluster has {wanted} for a router")
        return own if own in fitting else sorted(fitting)[0]

    def _bring_up(
        self,
        spec: ClusterSpec,
        processes: Iterable[Process],
        say: Callable[[Placed], None],
        node: str | None = None,
    ) -> None:
        started = []
        for process in processes:
            actor, what = self._find(spec, process.name), "started"
            if actor is not None:
                if self._status(actor)["digest"] == process.digest():
                    say(self._placed(actor, "kept"))
                    continue
                self._stop(actor)
                what = "replaced"
            started.append((process, self._start(spec, process, node), what))
        for process, actor, what in started:
            try:
                say(self._placed(actor, what))
            except self._ray.exceptions.GetTimeoutError as exc:
                raise StartupError(
                    f"Ray has not placed {process.name} within {_ANSWER_S:g} s: has any node "
                    f"{process.resources or 'room'}? (ray status)"
                ) from exc

    def _start(self, spec: ClusterSpec, process: Process, node: str | None) -> Any:
        wanted = dict(process.resources)
        options = {
            "num_cpus": wanted.pop("CPU", 0),
            "num_gpus": wanted.pop("GPU", 0),
            "resources": wanted | ({f"node:{node}": 0.001} if node is not None else {}),
        }
        kept = self._ray.remote(_Actor).options(
            name=_actor_name(spec, process.name),
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=4,
            **options,
        )
        return kept.remote(process.name, process.arguments, process.env, process.digest())

    # --- what is there -------------------------------------------------------------------------

    def status(self, spec: ClusterSpec) -> list[Placed]:
        return [self._placed(self._find(spec, name), "kept") for name in self._names(spec)]

    def down(self, spec: ClusterSpec, say: Callable[[Placed], None] = lambda _: None) -> None:
        self._stop_others(spec, set(), say)

    def _stop_others(
        self, spec: ClusterSpec, wanted: set[str], say: Callable[[Placed], None]
    ) -> None:
        """The newest first, and workers before the routers that could still use them."""
        for name in sorted(self._names(spec), reverse=True):
            actor = self._find(spec, name)
            if name not in wanted and actor is not None:
                placed = self._placed(actor, "stopped")
                self._stop(actor)
                say(placed)

    def _names(self, spec: ClusterSpec) -> list[str]:
        prefix = _actor_name(spec, "")
        found = self._ray.util.list_named_actors()
        return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))

    def _find(self, spec: ClusterSpec, name: str) -> Any | None:
        try:
            return self._ray.get_actor(_actor_name(spec, name))
        except ValueError:
            return None

    def _status(self, actor: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._ray.get(actor.status.remote(), timeout=_ANSWER_S)
        return found

    def _placed(self, actor: Any, what: str) -> Placed:
        found = self._status(actor)
        return Placed(found["name"], what, found["hostname"], found["pid"], found["restarts"])

    def _stop(self, actor: Any) -> None:
        """The process first, in peace; then its actor, which Ray is not to start again."""
        try:
            self._ray.get(actor.stop.remote(_STOP_S), timeout=_STOP_S + 10)
        finally:
            self._ray.kill(actor, no_restart=True)


def _require_listener(address: str | None) -> None:
    """Ray itself would go on trying for minutes. Raises `ConfigError`."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as exc:
        raise ConfigError(
            f"no Ray cluster at {address} ({exc.strerror or exc}): `ray start --head` there, or "
            "give another --ray-address"
        ) from exc


class _Actor(Keeper):
    def node_ip(self) -> str:
        import ray

        return str(ray.util.get_node_ip_address())


def _actor_name(spec: ClusterSpec, name: str) -> str:
    return f"{spec.name}/{name}"
