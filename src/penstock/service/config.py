"""Settings of one service process. Plain data; made from flags by `penstock.cli`."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.protocol.errors import ConfigError

MIB = 1 << 20


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
    engine_addresses: tuple[str, ...] = ()
    #: Service and engine in one process, over the memory transport (for debugging).
    in_process: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    #: Unix socket instead of host and port.
    uds: str | None = None
    #: Empty: no key asked for.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    revision: str | None = None
    #: A file or the template itself; None: the checkpoint's.
    chat_template: str | None = None
    #: Whether a request may bring a template of its own: a program, if in a sandbox.
    trust_request_chat_template: bool = False
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

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ConfigError("a service needs at least one model name")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not a port: give one from 1 to 65535")
        for name in ("max_queue", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
