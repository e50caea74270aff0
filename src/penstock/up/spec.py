"""cluster.yaml: what `penstock up` is to run, checked before anything is started."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from penstock.protocol.errors import ConfigError

#: A flag's value as the command line would have it; a list repeats it, null leaves it out.
Value = str | int | float | bool | list[str | int | float] | None
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
#: Said by `up` itself, for every process differently.
_OURS = {
    "routers": ("model", "port", "registry", "registry-address", "name", "config", "uds"),
    "workers": ("model", "address", "name", "registry", "incarnation", "parent-pid", "config"),
}

Count = Annotated[int, Meta(ge=0, le=1000)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class Group(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    count: Count = 1
    #: What Ray sets aside on the node: {CPU: 4, GPU: 1}, or resources of your own.
    resources: dict[str, Annotated[float, Meta(ge=0)]] = {}
    #: Flags of the command, without dashes.
    args: dict[str, Value] = {}


class Routers(Group, frozen=True):
    #: Router i listens on port + i.
    port: Port = 8000
    registry_port: Port = 8040


class ClusterSpec(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    name: str = "penstock"
    model: str
    routers: Routers = Routers()
    workers: Group = Group()
    #: etcd://host:2379; null: the first router offers one.
    registry: str | None = None
    #: Needed as soon as there is more than one node.
    cluster_secret_file: str | None = None
    env: dict[str, str] = {}

    def scaled(self, counts: dict[str, int]) -> ClusterSpec:
        replace = msgspec.structs.replace
        groups = {name: replace(getattr(self, name), count=n) for name, n in counts.items()}
        return checked(replace(self, **groups))

    def secret(self) -> str | None:
        if self.cluster_secret_file is None:
            return None
        path = Path(self.cluster_secret_file)
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"cluster_secret_file {path} cannot be read: {exc}") from exc
        if not text:
            raise ConfigError(f"cluster_secret_file {path} is empty: openssl rand -hex 32 > {path}")
        return text


def read_spec(path: Path) -> ClusterSpec:
    """Raises `ConfigError`s that name the file and the field."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(exc).split())}") from exc
    try:
        return checked(msgspec.convert(found, ClusterSpec))
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc.message}") from exc


def checked(spec: ClusterSpec) -> ClusterSpec:
    """What the types alone do not say."""
    if not _NAME.fullmatch(spec.name):
        raise ConfigError(f"name {spec.name!r}: small letters, digits and dashes, 40 at most")
    if not spec.model:
        raise ConfigError("model is empty")
    if spec.registry is not None and not spec.registry.startswith("etcd://"):
        raise ConfigError(
            f"registry {spec.registry!r}: give etcd://host:2379, or leave it out and the first "
            "router offers one"
        )
    if spec.routers.count < 1 and spec.registry is None:
        raise ConfigError("routers.count is 0, and without a registry the first router offers it")
    for group, ours in _OURS.items():
        for flag in getattr(spec, group).args:
            if flag.replace("_", "-").lstrip("-") in ours:
                raise ConfigError(f"{group}.args.{flag}: `up` says that to each process itself")
    return spec


def words(args: dict[str, Value]) -> list[str]:
    """Flags as a command line has them."""
    found: list[str] = []
    for name, value in args.items():
        flag = "--" + name.lstrip("-").replace("_", "-")
        match value:
            case None:
                continue
            case True:
                found.append(flag)
            case False:
                found.append(flag.replace("--", "--no-", 1))
            case list():
                found += [flag, *(str(item) for item in value)] if value else []
            case _:
                found.append(f"{flag}={value}")
    return found


class Process(Struct, kw_only=True, frozen=True):
    """One process as it is to run. Equal digests: nothing needs to be done."""

    name: str
    group: str
    arguments: tuple[str, ...]
    env: dict[str, str] = {}
    resources: dict[str, float] = {}

    def digest(self) -> str:
        found: Any = msgspec.json.encode(self, order="sorted")
        return hashlib.sha256(found).hexdigest()[:16]


def router(spec: ClusterSpec, number: int, registry: str | None, host: str) -> Process:
    """`registry` None: it offers one, at `host`."""
    group = spec.routers
    where = [f"--registry-address=tcp://{host}:{group.registry_port}"]
    env: dict[str, str] = {}
    if registry is not None:
        where, env = _told_of(registry)
    flags = [f"--port={group.port + number}", *where, "--no-banner", "--stop-with-parent"]
    return _process(spec, "router", number, group, [spec.model, *flags, *words(group.args)], env)


def worker(spec: ClusterSpec, number: int, registry: str) -> Process:
    where, env = _told_of(registry)
    args = [spec.model, *where, f"--name={spec.name}-worker-{number}", *words(spec.workers.args)]
    return _process(spec, "worker", number, spec.workers, args, env)


def _told_of(registry: str) -> tuple[list[str], dict[str, str]]:
    """As a flag; where there is a password in it, by the environment, which others cannot read."""
    if "@" in registry:
        return [], {"PENSTOCK_REGISTRY": registry}
    return [f"--registry={registry}"], {}


def _process(
    spec: ClusterSpec,
    command: str,
    number: int,
    group: Group,
    arguments: list[str],
    more_env: dict[str, str],
) -> Process:
    env = spec.env | more_env
    secret = spec.secret()
    if secret is not None:
        env["PENSTOCK_CLUSTER_SECRET"] = secret
    return Process(
        name=f"{command}-{number}",
        group=f"{command}s",
        arguments=(command, *arguments),
        env=env,
        resources=dict(group.resources),
    )


def registry_of(spec: ClusterSpec, host: str) -> str:
    """Where processes find each other, once it is known where the first router is."""
    if spec.registry is not None:
        bare = spec.registry.removeprefix("etcd://")
        return spec.registry if "/" in bare else f"{spec.registry}/{spec.name}"
    return f"penstock://{host}:{spec.routers.registry_port}"
