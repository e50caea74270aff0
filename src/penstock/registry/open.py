"""The registry that a URL asks for."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from penstock.protocol.errors import ConfigError
from penstock.protocol.transport.base import check_address
from penstock.registry.base import Store
from penstock.registry.registry import Registry

ETCD_PORT = 2379
EMBEDDED_PORT = 8040
_EXAMPLES = "etcd://host:2379, penstock://host:8040"


def open_registry(url: str) -> Registry:
    """`etcd://[user:password@]host:2379[,host2:2379]`, `penstock://host:port`,
    `penstock+ipc:///path` or `memory://name`, each with `/cluster` behind it where one registry
    serves several clusters. Connects when it is first used. Raises `ConfigError`."""
    scheme, separator, rest = url.partition("://")
    if not separator or not rest:
        raise ConfigError(f"{url!r} is no registry: write {_EXAMPLES}")
    if scheme == "penstock+ipc":
        return Registry(_embedded(f"ipc://{rest}"), url)
    where, _, cluster = rest.partition("/")
    return Registry(_store(scheme, where, url), _without_password(url), cluster or "default")


def _store(scheme: str, where: str, url: str) -> Store:
    match scheme:
        case "memory":
            from penstock.registry.memory import MemoryStore

            return MemoryStore(where)
        case "penstock":
            return _embedded(f"tcp://{with_port(where, EMBEDDED_PORT, url)}")
        case "etcd":
            from penstock.registry.etcd import EtcdStore

            credentials, _, hosts = where.rpartition("@")
            user, _, password = credentials.partition(":")
            members = [with_port(host, ETCD_PORT, url) for host in hosts.split(",")]
            return EtcdStore(members, unquote(user) or None, unquote(password) or None)
    raise ConfigError(f"{url}: {scheme!r} is no kind of registry: write {_EXAMPLES}")


def _embedded(address: str) -> Store:
    from penstock.registry.embedded import EmbeddedStore

    check_address(address)
    return EmbeddedStore(address)


def with_port(where: str, default: int, url: str) -> str:
    """host:port of `where`, an IPv6 host in brackets. Raises `ConfigError`."""
    try:
        split = urlsplit(f"//{where}")
        port = split.port
    except ValueError as exc:
        raise ConfigError(f"{url}: {where!r} is no host:port") from exc
    if not split.hostname:
        raise ConfigError(f"{url}: which host? Write {_EXAMPLES}")
    host = f"[{split.hostname}]" if ":" in split.hostname else split.hostname
    return f"{host}:{default if port is None else port}"


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.partition('://')[0]}://{tail}" if at else url
