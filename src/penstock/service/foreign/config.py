"""Settings of a router over servers that are not ours."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from penstock.protocol.errors import ConfigError
from penstock.service.config import TlsConfig

#: Names with other letters are written in their ASCII form (xn--...).
_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class RouterConfig:
    #: Base URLs: scheme, host and port, with or without a /v1 at the end.
    engines: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    #: Processes that share the port; each keeps its own view of the load.
    workers: int = 1
    #: Which of them this is; None: the only one.
    worker: int | None = None
    #: HTTPS towards clients.
    tls: TlsConfig = field(default_factory=TlsConfig)
    #: Authorities whose certificates engines may have; None: the system's.
    engine_ca_certs: str | None = None
    policy: str = "kv-aware"
    #: Asked of clients, and sent to engines. Without the second, a client's own key goes through,
    #: unless it is one of the first.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    engine_api_key: str | None = field(default=None, repr=False)
    #: Requests whose answer has not begun. More are refused with 429.
    max_queue: int = 4096
    max_body_bytes: int = 32 * MIB
    #: Of all requests together, while they wait for an answer (they may be sent again).
    max_buffered_bytes: int = 512 * MIB
    #: An answer that is not a stream of events is held back so far, so that another engine may be
    #: tried until the end; of a stream, an event that is not complete.
    hold_bytes: int = 1 * MIB
    #: What may wait for a slow client; its engine is not read from meanwhile.
    client_buffer_bytes: int = 256 * KIB
    #: A client that takes nothing for so long is dropped.
    client_stall_s: float = 60.0
    #: Further engines that are tried while nothing has been sent.
    max_retries: int = 2
    connect_timeout_s: float = 2.0
    #: From the request to the first byte of the answer's body, and between two bytes.
    first_byte_timeout_s: float = 600.0
    stall_timeout_s: float = 120.0
    #: From a failed health check on, for answers that have begun.
    lost_stall_s: float = 5.0
    health_every_s: float = 1.0
    health_timeout_s: float = 2.0
    #: Failed checks in a row until an engine is lost.
    health_failures: int = 2
    models_every_s: float = 10.0
    #: Failed requests in a row that open the breaker, and for how long it stays open at first.
    breaker_failures: int = 5
    breaker_open_s: float = 5.0
    breaker_open_at_most_s: float = 60.0
    drain_timeout_s: float = 30.0
    #: What an engine's prefix cache is believed to hold.
    engine_cache_tokens: int = 500_000
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    #: Requests whose explanations are kept after their end.
    explain_kept: int = 1024
    log_requests: bool = False
    log_level: str = "info"
    name: str = ""

    def __post_init__(self) -> None:
        if not self.engines:
            raise ConfigError("--engines needs at least one URL: --engines http://127.0.0.1:8001")
        names = [engine_name(url) for url in self.engines]
        doubles = {name for name in names if names.count(name) > 1}
        if doubles:
            raise ConfigError(f"--engines names {min(doubles)} twice: name each engine once")
        if self.engine_ca_certs is not None and not Path(self.engine_ca_certs).is_file():
            raise ConfigError(f"--engine-ca-certs {self.engine_ca_certs}: there is no such file")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not a port: give one from 1 to 65535")


def engine_name(url: str) -> str:
    """What an engine is called: host and port. Raises `ConfigError` for what is no base URL."""

    def wrong(why: str) -> ConfigError:
        return ConfigError(f"--engines {url!r}: {why}; write them as http://10.0.0.1:8000")

    if "@" in url:  # not told again: what stands before it is a secret
        raise ConfigError("--engines: keys go into --engine-api-key, not before an @ in a URL")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise wrong(f"that is no URL ({exc})") from None
    if "://" not in url:
        raise wrong(f"http:// or https:// is missing (http://{url}?)")
    if parts.scheme not in ("http", "https"):
        raise wrong("engines are asked by http or https")
    host = parts.hostname or ""
    if not (_is_address(host) if ":" in host else _HOST.fullmatch(host) and len(host) <= 253):
        raise wrong(f"{host!r} is no host name or address")
    if port == 0:
        raise wrong("0 is no port")
    if parts.path not in ("", "/", "/v1", "/v1/") or "?" in url or "#" in url:
        raise wrong("only host and port are wanted (and /v1, if you like)")
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port or (443 if parts.scheme == 'https' else 80)}"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
