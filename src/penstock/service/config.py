"""Settings of one service process. Plain data; made from flags by `penstock.cli`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from penstock.protocol.errors import ConfigError
from penstock.service.cluster.fit import ANYTHING, Wanted

MIB = 1 << 20
SHARE_WEIGHTS = ("auto", "off")
#: Policies under which a request stays where its prompt is computed.
_NEVER_SPLIT = ("kv-aware",)


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When the engine's process dies: start it again, at once first, then with growing pauses.

    After `max_failures` starts in a row that never became ready the service gives up with an error;
    one that was ready resets the count.
    """

    enabled: bool = True
    first_delay_s: float = 0.0
    max_delay_s: float = 10.0
    max_failures: int = 5


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Several engines behind one service, several services over the same engines."""

    #: Engine processes that this command starts.
    instances: int = 1
    #: Whether they have one copy of the weights in memory, which outlives each of them.
    share_weights: str = "auto"
    #: Whether a process that has its imports behind it waits to replace the next one that ends.
    spare_engine: bool = False
    #: Where instances are found (see `penstock.registry.open`); None: only those named or started.
    registry: str | None = None
    #: `registry` is our own, which this process offers at this address.
    offers_registry: bool = False
    registry_address: str = "tcp://127.0.0.1:8040"
    #: auto, off, or static=P:D.
    pd: str = "auto"
    #: None: slo-aware, or kv-aware where prefill and decode stay together.
    policy: str | None = None
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    #: None: with more than one instance.
    kv_index: bool | None = None
    #: Processes that share the port.
    api_workers: int = 1
    #: In such a process: the port is bound anew beside the others' (SO_REUSEPORT), or this
    #: descriptor of a socket is what it listens on; its number, and the folder it shares with them.
    reuse_port: bool = False
    inherited_socket: int | None = None
    api_worker: int | None = None
    api_worker_folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("instances", "api_workers"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} must be at least 1, got {getattr(self, name)}")
        if (split := self.static_split) is not None and min(split) < 1:
            raise ConfigError(f"--pd {self.pd}: at least one instance of each kind is needed")
        if self.pd == "off" and self.policy == "split":
            raise ConfigError("--pd off never splits a request, --policy split always: choose one")
        if split is not None and self.policy in _NEVER_SPLIT:
            raise ConfigError(
                f"--policy {self.policy} never splits a request between instances, as --pd "
                f"{self.pd} wants it: take another one, or leave --policy out"
            )

    @property
    def shares_weights(self) -> bool:
        return self.share_weights != "off"

    @property
    def engines_return(self) -> bool:
        """The engines are those of our parent, which starts again those that die."""
        return self.api_worker_folder is not None and (self.registry or "").startswith(
            f"penstock+ipc://{self.api_worker_folder}/"
        )

    @property
    def static_split(self) -> tuple[int, int] | None:
        if not self.pd.startswith("static="):
            return None
        prefill, _, decode = self.pd.removeprefix("static=").partition(":")
        return int(prefill), int(decode)


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """HTTPS, with vLLM's names; without a key and a certificate it is HTTP."""

    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None

    def __post_init__(self) -> None:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("--ssl-keyfile and --ssl-certfile belong together: give both")
        if self.ssl_ca_certs is not None and self.ssl_keyfile is None:
            raise ConfigError("--ssl-ca-certs needs --ssl-keyfile and --ssl-certfile")
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"--{name.replace('_', '-')} {path}: there is no such file")

    @property
    def scheme(self) -> str:
        return "https" if self.ssl_keyfile is not None else "http"


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """What `penstock.service.app.serve` needs. The engine's settings are opaque here.

    `worker_args` follow `python -m penstock.cli.main worker --address A --name N` on the command
    line of an engine's process. With `engine_addresses` no process is started: the service attaches
    to the instances that listen there.
    """

    model: str
    #: The first is what responses say; requests may use any of them.
    served_model_names: tuple[str, ...]
    worker_args: tuple[str, ...] = ()
    #: What the command itself was given, for API workers, which are given the same.
    arguments: tuple[str, ...] = ()
    engine_addresses: tuple[str, ...] = ()
    #: Service and engine in one process, over the memory transport (for debugging).
    in_process: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    #: Unix socket instead of host and port.
    uds: str | None = None
    #: Empty: no key asked for.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    #: For /admin; empty: on loopback only, without a key.
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    cluster: ClusterConfig = ClusterConfig()
    tls: TlsConfig = TlsConfig()
    #: What instances that were started elsewhere must be; others are refused.
    wanted: Wanted = ANYTHING
    revision: str | None = None
    #: A file or the template itself; None: the checkpoint's.
    chat_template: str | None = None
    #: Whether a request may bring a template of its own: a program, if in a sandbox.
    trust_request_chat_template: bool = False
    #: Where OpenTelemetry traces go; None: there are none.
    otlp_traces_endpoint: str | None = None
    #: Looks for calls only where a request offers tools; "none": never.
    tool_call_parser: str | None = "hermes"
    reasoning_parser: str | None = None
    #: For requests that give no seed; None: each gets a random one.
    seed: int | None = None
    #: Requests accepted and not yet running. More are refused with 429.
    max_queue: int = 1024
    max_body_bytes: int = 32 * MIB
    #: From SIGTERM to the end, requests in flight included.
    drain_timeout_s: float = 30.0
    #: No heartbeat for half of this: an instance gets no new work; for all of it: it is given up.
    #: Heartbeats come every half second, from a thread that compute does not block.
    heartbeat_timeout_s: float = 2.5
    restart: RestartPolicy = RestartPolicy()
    #: What engines know it by; empty: host and process id (two of one name push each other out).
    name: str = ""
    log_level: str = "info"
    #: One line a request; never what it says.
    log_requests: bool = False
    #: Print the URL and what to try once ready.
    banner: bool = True
    #: Where a trace of what ran when is written, beside the engine's; None: nowhere.
    trace: str | None = None
    #: Where what goes into the service's core is recorded (`penstock replay`), up to so much.
    record: str | None = None
    record_max_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ConfigError("a service needs at least one model name")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not a port: give one from 1 to 65535")
        for name in ("max_queue", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
