"""Settings of the HTTP API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.protocol.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ApiConfig:
    #: The first is what responses say; requests may use any of them.
    served_model_names: tuple[str, ...]
    #: Empty: no key asked for.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    #: For /admin, which the others do not open. Empty: on loopback only, without a key.
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 32 * MIB
    #: Draws the seeds of requests that bring none; None: from the operating system.
    seed: int | None = None
    #: The checkpoint's generation_config.json: sampling defaults for requests that set none.
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    #: One line for each answer: method, path, status and time.
    log_requests: bool = False
    #: Where OpenTelemetry traces go; None: there are none.
    otlp_traces_endpoint: str | None = None
    #: Whether a request may bring its own chat template (vLLM: --trust-request-chat-template).
    trust_request_chat_template: bool = False

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ConfigError("the API needs at least one served model name")
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes must be at least 1, got {self.max_body_bytes}")
        if any(not key for key in (*self.api_keys, *self.admin_keys)):
            raise ConfigError("an API key is empty: leave it out, or give it a value")
